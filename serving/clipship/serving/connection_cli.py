"""Command-line options of a connection: token, headers, TLS. They map to the fields of ``Connection``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import option_group
from clipship.core.errors import UsageError

if TYPE_CHECKING:
    from clipship.serving.transport.connection import Connection

_PATH = click.Path(path_type=Path)

connection_options = option_group(
    click.option("--token-file", type=_PATH, help="A file with the bearer token to send."),
    click.option(
        "--header", "headers", multiple=True, help="'NAME: VALUE' to send with every request; may be repeated."
    ),
    click.option("--tls", is_flag=True, help="Encrypt; implied by the three files below."),
    click.option(
        "--tls-ca", type=_PATH, help="CA certificates (PEM) to verify the server with. [default: the system's]"
    ),
    click.option("--tls-cert", type=_PATH, help="This client's certificate (PEM), with --tls-key."),
    click.option("--tls-key", type=_PATH, help="This client's private key (PEM)."),
)
"""For a command that connects to a server; :func:`connection_from_options` takes their values."""


def connection_from_options(
    urls: tuple[str, ...],
    *,
    headers: tuple[str, ...],
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    **same: Any,
) -> Connection:
    """The connection to ``urls`` (HOST:PORT each); ``same``: further fields of ``Connection``.

    Raises:
        UsageError: a header without a colon; as :class:`~clipship.serving.transport.connection.Connection`.
    """
    from clipship.serving.transport.connection import Connection

    files: dict[str, Any] = {"ca_file": tls_ca, "certificate_file": tls_cert, "key_file": tls_key}
    return Connection(urls=urls, headers=dict(_header(text) for text in headers), **files, **same)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise UsageError("--header: give 'NAME: VALUE'")  # what was given may be a secret
    return name.strip().lower(), value.strip()
