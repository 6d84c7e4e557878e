"""The commands ``vocab publish`` and ``vocab rollback``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from clipship.core.cli.main import emit, existing_folder, json_option, option_group

_FILE = click.Path(path_type=Path)


_option = partial(click.option, show_default=True)

_server_options = option_group(
    _option("--repository", required=True, type=_FILE, help="The model repository that the server serves."),
    _option("--url", default="127.0.0.1:8001", help="Triton's gRPC endpoint, HOST:PORT."),
    _option("--name", help="Vocabulary name. [default: the first one]"),
    _option("--admin-secret", type=_FILE, help="File with the admin secret. [default: that of clipship serve here]"),
    _option("--tls-ca", type=_FILE, help="CA of the server certificate (PEM)."),
    _option("--tls-cert", type=_FILE, help="Client certificate (PEM), for mutual TLS."),
    _option("--tls-key", type=_FILE, help="Private key of the client certificate (PEM)."),
    _option("--timeout-s", default=120.0, help="Maximum time to load a model."),
    json_option,
)


@click.command()
@click.argument("bundle", type=_FILE)
@click.option("--keep", default=3, show_default=True, help="Number of versions to keep on disk.")
@_server_options
def publish(bundle: Path, repository: Path, name: str | None, keep: int, as_json: bool, **server: Any) -> None:
    """Switch a running Triton to the vocabulary of BUNDLE without downtime.

    The server must answer the bundle's golden images correctly, else the old vocabulary is restored. A new --name adds
    a vocabulary beside the others.

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
    emit({**asdict(done), "url": control.url}, text, as_json=as_json)


@click.command()
@click.option("--to", help="Version number, or first digits of a digest. [default: the version served before]")
@_server_options
def rollback(repository: Path, name: str | None, to: str | None, as_json: bool, **server: Any) -> None:
    """Switch back to a vocabulary that was served before.

    Example: clipship vocab rollback --repository repository --url 127.0.0.1:8001
    """
    from clipship.serving.publish.publisher import rollback as roll_back

    folder = existing_folder(repository, "the repository that the server serves")
    with _control(**server) as control:
        done = roll_back(folder, control, vocabulary=name, to=to)
    text = f"{done.model} at {control.url}: version {done.version} again, {done.classes} classes (was {done.before})"
    emit({**asdict(done), "url": control.url}, text, as_json=as_json)


def _control(*, url: str, admin_secret: Path | None, timeout_s: float, **tls: Any) -> Any:
    from clipship.serving.publish.control import Control
    from clipship.serving.transport.connection import Connection

    files = {"ca_file": tls["tls_ca"], "certificate_file": tls["tls_cert"], "key_file": tls["tls_key"]}
    return Control(Connection(urls=(url,), **files), secret_file=admin_secret, timeout_s=timeout_s)
