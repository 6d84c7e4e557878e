"""Serving by a user id without an account: nothing fails for want of a home, and secrets stay private."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clipship.core.bundle import Bundle
from clipship.core.machine.caches import cache_folder
from clipship.serving.server.install import embedded_environment
from tests.serving.processes import CLIPSHIP
from tests.strangers import UID, own, run_as_stranger, stranger


@pytest.fixture
def installed() -> Path:
    """A cache that holds the embedded Triton, and that a stranger cannot write."""
    folder = cache_folder()
    assert folder is not None
    assert folder in embedded_environment().tritonserver.parents
    return folder


@contextmanager
def serving(repository: Path, cwd: Path, **how: Any) -> Iterator[dict[str, Any]]:
    """What ``clipship serve`` of a stranger prints; its log has one line about caches."""
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--json")
    command = stranger([*CLIPSHIP, "serve", repository, *ports], cwd=cwd, **how)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        try:
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGINT)
            log = process.stderr.read().splitlines()
        assert process.wait(60) == 0
        assert len(log) == 2, log
        assert "caches go to" in log[0]
        assert log[1] == "stopping"


@pytest.fixture
def folder(repository: Path, photos: Path, bundle: Bundle, stranger_folder: Path) -> Path:
    """The stranger's own copies of them."""
    shutil.copytree(repository, stranger_folder / "repository")
    shutil.copytree(photos, stranger_folder / "photos")
    shutil.copytree(bundle.path, stranger_folder / "bundle")
    for name in ("tmp", "cache"):
        (stranger_folder / name).mkdir()
    return own(stranger_folder)


@pytest.mark.triton
def test_serve_classify_and_publish_without_a_home(folder: Path, installed: Path) -> None:
    """The server is installed in a cache that is read-only: it runs from there, and the secret goes elsewhere."""
    place: dict[str, Any] = {"TMPDIR": str(folder / "tmp"), "CLIPSHIP_CACHE": str(folder / "cache")}
    place["mounted"] = {folder / "cache": installed}
    with serving(folder / "repository", folder, **place) as ready:
        secret = Path(ready["admin_secret"])
        assert folder / "tmp" / f"clipship-{UID}" in secret.parents
        assert (secret.stat().st_uid, secret.stat().st_mode & 0o777) == (UID, 0o600)
        url = f"127.0.0.1:{ready['grpc_port']}"
        done = run_as_stranger([*CLIPSHIP, "classify", "photos", "--url", url], cwd=folder, **place)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("30 images classified, in "), "a client needs no cache, and does not speak of it"
        publish = [*CLIPSHIP, "vocab", "publish", "bundle", "--repository", "repository", "--name", "more"]
        done = run_as_stranger([*publish, "--url", url], cwd=folder, **place)
        assert (done.returncode, done.stderr) == (0, "")
    assert not secret.exists()


@pytest.mark.parametrize("home", [{}, {"HOME": "/"}])
def test_a_bundle_in_this_process_without_a_home(folder: Path, home: dict[str, str]) -> None:
    command = [*CLIPSHIP, "classify", "photos", "--bundle", "bundle"]
    done = run_as_stranger(command, cwd=folder, TMPDIR=str(folder / "tmp"), **home)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("30 images classified, in ")


@pytest.mark.parametrize(
    ("has_server", "expected"),
    [
        (
            True,
            "no cache folder for the admin secret: give --admin-secret FILE or --open-admin, or set CLIP",
        ),
        (False, "the embedded Triton needs 350 MB of disk: set CLIPSHIP_CACHE to a folder that can be written"),
    ],
)
def test_where_nothing_can_be_written_serve_says_what_to_do(
    folder: Path, installed: Path, has_server: bool, expected: str
) -> None:
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    command = [*CLIPSHIP, "serve", str(folder / "repository"), *ports]
    mounted = {folder / "cache": installed} if has_server else {}
    place = {"HOME": "/", "CLIPSHIP_CACHE": str(folder / "cache")}
    done = run_as_stranger(command, cwd=Path("/"), read_only=True, mounted=mounted, **place)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]
