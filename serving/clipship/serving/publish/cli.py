"""The commands ``vocab publish`` and ``vocab rollback``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipship.core.cli.main import emit, existing_folder, json_option, option_group

_FILE = click.Path(path_type=Path)


_server_options = option_group(
    click.option(
        "--repository", required=True, type=_FILE, help="The model repository that the server serves, or its share."
    ),
    click.option("--url", default="127.0.0.1:8001", show_default=True, help="Triton's gRPC endpoint, HOST:PORT."),
    click.option("--name", help="Which of the repository's vocabularies. [default: the first]"),
    click.option("--admin-secret", type=_FILE, help="The secret's file. [default: that of clipship serve here]"),
    click.option("--tls-ca", type=_FILE, help="PEM file that the server's certificate is checked against."),
    click.option("--tls-cert", type=_FILE, help="This client's certificate, for servers that ask for one."),
    click.option("--tls-key", type=_FILE, help="Its private key."),
    click.option("--timeout-s", default=120.0, show_default=True, help="How long a load may take."),
    json_option,
)
"""What both need to reach the server and to know what it serves."""


@click.command()
@click.argument("bundle", type=_FILE)
@click.option("--keep", default=3, show_default=True, help="Versions kept on disk to roll back to.")
@_server_options
def publish(bundle: Path, repository: Path, name: str | None, keep: int, as_json: bool, **server: Any) -> None:
    """Serve the vocabulary of BUNDLE on a running Triton, without a failed request.

    Its golden images are sent through the server; if they fail, the old vocabulary is served again. A --name that the
    repository does not have yet becomes a further vocabulary beside the others.

    Example: clipship vocab publish bundle --repository repository --url 127.0.0.1:8001
    """
    from clipship.core.bundle import read_bundle
    from clipship.serving.publish.publisher import publish as publish_bundle

    opened = read_bundle(existing_folder(bundle, "a bundle that clipship pack or clipship vocab add wrote"))
    folder = existing_folder(repository, "the repository that the server serves")
    with _control(**server) as control:
        done = publish_bundle(folder, opened, control, vocabulary=name, keep=keep)
    before = "new" if done.before is None else f"before: version {done.before}"
    text = f"{done.model} at {control.url}: version {done.version}, {done.classes} classes ({before})"
    emit({**done.to_json(), "url": control.url}, text, as_json=as_json)


@click.command()
@click.option(
    "--to", help="A version's number, or the first digits of its vocabulary's digest. [default: the last one]"
)
@_server_options
def rollback(repository: Path, name: str | None, to: str | None, as_json: bool, **server: Any) -> None:
    """Serve a vocabulary again that was served before.

    Example: clipship vocab rollback --repository repository --url 127.0.0.1:8001
    """
    from clipship.serving.publish.publisher import rollback as roll_back

    folder = existing_folder(repository, "the repository that the server serves")
    with _control(**server) as control:
        done = roll_back(folder, control, vocabulary=name, to=to)
    text = f"{done.model} at {control.url}: version {done.version} again, {done.classes} classes (was {done.before})"
    emit({**done.to_json(), "url": control.url}, text, as_json=as_json)


def _control(
    *,
    url: str,
    admin_secret: Path | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    timeout_s: float,
) -> Any:
    from clipship.serving.publish.control import Control
    from clipship.serving.transport.connection import Connection

    connection = Connection(urls=(url,), ca_file=tls_ca, certificate_file=tls_cert, key_file=tls_key)
    return Control(connection, secret_file=admin_secret, timeout_s=timeout_s)
