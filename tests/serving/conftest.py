"""One bundle, one repository a backend and one real Triton for all tests of the serving stage."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipship.core.bundle import Bundle
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from tests.serving.bundles import jpeg_bytes, write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the python backend, with small batches, so that a few images make several."""
    return repository_from_bundle(
        bundle, tmp_path_factory.mktemp("python") / "repository", backend="python", max_batch_size=8
    )


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    with start_server(repository) as running:
        yield running


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 JPEG files of several sizes, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for seed in range(30):
        name = f"more/{seed}.JPG" if seed < 2 else f"{seed:02d}.jpg"
        (folder / name).write_bytes(jpeg_bytes(seed, width=40 + 3 * seed, height=90 - 2 * seed))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
