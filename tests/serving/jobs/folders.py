"""What the tests of jobs share: archives of images, and what a folder of results must hold at any moment."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clipship.core.files import sha256_of
from clipship.serving.jobs.results import names_in
from tests.serving.bundles import jpeg_bytes

SETTINGS = {"inputs": ["x"]}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar archive of (name, content), written as a stream."""
    settings: Any = {"mode": mode}  # typeshed wants a literal
    with tarfile.open(path, **settings) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def many_images(path: Path, count: int) -> list[str]:
    """A tar archive of ``count`` images, ten of them different, each under a name of its own; the names of its rows."""
    pictures = [jpeg_bytes(seed) for seed in range(10)]
    write_tar(path, ((f"{number:06d}.jpg", pictures[number % 10]) for number in range(count)))
    return [f"{path}/{number:06d}.jpg" for number in range(count)]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest, of no images where there is none yet."""
    path = folder / "manifest.json"
    content: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else {"images": 0, "shards": [], "complete": False}
    )
    return content


def names_of(folder: Path) -> list[str]:
    """The names of all rows that the manifest's shards hold, in their order."""
    return [name for shard in manifest_of(folder)["shards"] for name in names_in(folder / shard["file"])]


def assert_whole(folder: Path, expected: list[str]) -> int:
    """Whatever happened to a job, its folder has the first so many images, each once; how many."""
    manifest = manifest_of(folder)
    for shard in manifest["shards"]:
        assert sha256_of(folder / shard["file"]) == shard["sha256"]
    names = names_of(folder)
    assert names == expected[: len(names)]
    assert len(names) == manifest["images"] == sum(shard["rows"] for shard in manifest["shards"])
    assert [shard["first_row"] for shard in manifest["shards"]] == [
        sum(shard["rows"] for shard in manifest["shards"][:number]) for number in range(len(manifest["shards"]))
    ]
    return len(names)


def assert_complete(folder: Path, expected: list[str]) -> None:
    """The job came to its end, and left nothing but what its manifest names."""
    assert assert_whole(folder, expected) == len(expected)
    manifest = manifest_of(folder)
    assert manifest["complete"]
    named = {shard["file"] for shard in manifest["shards"]} | {"manifest.json"}
    assert {path.name for path in folder.iterdir()} == named
