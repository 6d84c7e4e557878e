"""The secret of a server's admin protocols (loading models, tracing, logging), in a file for its owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.machine.caches import cache_folder, cache_places

_KEY = "clipship-admin"

ADMIN_PROTOCOLS = ("model-repository", "trace", "logging")
"""Triton's names of the protocols that clients do not need."""

ADMIN_HEADER = f"triton-grpc-protocol-{_KEY}"
"""The gRPC header of the secret; the prefix is Triton's (option ``--grpc-restricted-protocol``)."""


def restriction(secret: str) -> str:
    """The value of Triton's options ``--grpc-restricted-protocol`` and ``--http-restricted-api``."""
    return f"{','.join(ADMIN_PROTOCOLS)}:{_KEY}={secret}"


def usual_secret_file(url: str) -> Path:
    """The default secret file of the server at HOST:PORT on this machine: one per port, in the user's cache folder.

    Raises:
        UsageError: there is no cache folder.
    """
    folder = cache_folder()
    if folder is None:
        raise UsageError(
            "no cache folder for the admin secret: give --admin-secret FILE or --open-admin, or "
            "set CLIPSHIP_CACHE to a folder that can be written"
        )
    return folder / _place(url)


def found_secret_file(url: str) -> Path | None:
    """The file that ``clipship serve`` on this machine wrote for the server at HOST:PORT, or None."""
    files = [folder / _place(url) for folder in cache_places()]
    return max(
        filter(os.path.isfile, files), key=os.path.getmtime, default=None
    )  # others may be left from dead servers


def _place(url: str) -> Path:
    return Path("admin", f"{url.rpartition(':')[2]}.secret")


def write_secret(path: Path) -> str:
    """Write a new secret to ``path``, readable by its owner only from the start."""
    secret = secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(f"{secret}\n")
    return secret


def read_secret(path: Path) -> str:
    """The secret in ``path``.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise UsageError(f"{path}: cannot be read ({cause}): give the file that clipship serve wrote") from error
    if not secret:
        raise UsageError(f"{path}: is empty: give the file that clipship serve wrote")
    return secret
