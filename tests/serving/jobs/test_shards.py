from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from clipship.core.errors import CheckFailed, ClipshipError, DataError, UsageError
from clipship.serving.client.classifier import Result
from clipship.serving.jobs.inputs import JobImage, Place
from clipship.serving.jobs.results import Header
from clipship.serving.jobs.shards import results_folder
from tests.serving.jobs.folders import SETTINGS, assert_complete, assert_whole, manifest_of, names_of
from tests.serving.processes import ENVIRONMENT

HEADER = Header(bundle_digest="b" * 64, vocabulary_digest="v" * 64)
NAMES = [f"{number}.jpg" for number in range(10)]


def result(number: int) -> Result:
    if number == 5:
        return Result(error="bad")
    return Result(labels=("cat" if number % 3 else "dog",), scores=(0.5,), indices=(1,))


def place(number: int) -> Place:
    return Place(files=number, digest="d" * 64, file=f"{number}.jpg", number=0)


def run(folder: Path, numbers: range, *, complete: bool = True, **changes: Any) -> None:
    settings: dict[str, Any] = {"settings": SETTINGS, "header": HEADER, "shard_size": 3, **changes}
    with results_folder(folder, **settings) as results:
        for number in numbers:
            results.write(JobImage(name=NAMES[number], place=place(number)), result(number))
        if complete:
            results.complete()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_shards_and_their_manifest(tmp_path: Path, kind: str) -> None:
    run(tmp_path / "out", range(10), shard_format=kind)
    assert_complete(tmp_path / "out", NAMES)
    manifest = manifest_of(tmp_path / "out")
    shards = manifest["shards"]
    assert [(shard["file"], shard["first_row"], shard["rows"], shard["errors"]) for shard in shards] == [
        (f"part-000000.{kind}", 0, 3, 0),
        (f"part-000001.{kind}", 3, 3, 1),
        (f"part-000002.{kind}", 6, 3, 0),
        (f"part-000003.{kind}", 9, 1, 0),
    ]
    assert (manifest["images"], manifest["errors"], manifest["classes"]) == (10, 1, {"cat": 5, "dog": 4})
    assert (manifest["bundle_digest"], manifest["vocabulary_digest"]) == ("b" * 64, "v" * 64)
    assert (manifest["inputs"], manifest["place"]["file"]) == (["x"], "9.jpg")


def test_a_job_goes_on_behind_its_last_whole_shard(tmp_path: Path) -> None:
    run(tmp_path, range(8), complete=False)
    assert assert_whole(tmp_path, NAMES) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    with results_folder(tmp_path, settings=SETTINGS, header=HEADER, shard_size=3) as results:
        assert results.progress.place == place(5)
        assert list(results.names()) == NAMES[:6]
    run(tmp_path, range(6, 10))
    assert_complete(tmp_path, NAMES)
    assert manifest_of(tmp_path)["classes"] == {"cat": 5, "dog": 4}


def test_a_shard_that_the_manifest_does_not_name_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, range(10))
    manifest = manifest_of(tmp_path)
    (tmp_path / ".part-000004.parquet.1-0a.part").write_bytes(b"of a killed process")  # process 1 is alive
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "shards": manifest["shards"][:2], "images": 6, "errors": 1, "place": vars_of(5)})
    )
    run(tmp_path, range(6, 6), complete=False)
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["part-000000.parquet", "part-000001.parquet"]
    assert not list(tmp_path.glob(".part*"))
    run(tmp_path, range(6, 10))
    assert_complete(tmp_path, NAMES)


def vars_of(number: int) -> dict[str, Any]:
    return asdict(place(number))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {**SETTINGS, "inputs": ["y"]}}, "inputs was x, is y"),
        ({"settings": {**SETTINGS, "top_k": 3}}, "top_k was None, is 3"),
        ({"header": replace(HEADER, bundle_digest="c" * 64)}, "bundle_digest was bbb.*, is ccc"),
        ({"header": replace(HEADER, vocabulary_digest="w" * 64)}, "vocabulary_digest was vvv.*, is www"),
        ({"shard_size": 0}, "shard size 0"),
    ],
)
def test_another_job_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path, range(6))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=message):
        run(tmp_path, range(6), **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_restart_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, range(10))
    run(tmp_path, range(4), restart=True, settings={**SETTINGS, "inputs": ["y"]})
    assert_complete(tmp_path, NAMES[:4])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard went": (lambda folder: (folder / "part-000001.parquet").unlink(), "part-000001.parquet: is missing"),
    "a shard was cut": (
        lambda folder: os.truncate(folder / "part-000000.parquet", 10),
        "part-000000.parquet: is missing",
    ),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "not JSON"),
    "another file": (lambda folder: (folder / "manifest.json").write_text("{}"), "format None"),
    "a key went": (lambda folder: without_key(folder / "manifest.json", "shards"), "'shards' is missing"),
    "manifest went": (lambda folder: (folder / "manifest.json").unlink(), "has shards and no manifest"),
}


def without_key(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    run(tmp_path, range(6))
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        run(tmp_path, range(6))
    assert "--restart" in str(caught.value)
    run(tmp_path, range(6), restart=True)
    assert_complete(tmp_path, NAMES[:6])


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for restart in (False, True):
        with pytest.raises(UsageError, match="which is not a result"):
            run(tmp_path, range(3), restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from clipship.serving.jobs.shards import *\n"
        f"with results_folder(Path({str(tmp_path)!r}), settings={SETTINGS!r}, shard_size=3,\n"
        f"                    header=Header(bundle_digest={'b' * 64!r}, vocabulary_digest={'v' * 64!r})):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(UsageError, match="another process writes"):
            run(tmp_path, range(3))
        other.kill()
        other.wait()
    run(tmp_path, range(3))
    assert_complete(tmp_path, NAMES[:3])


def test_a_shard_that_fails_its_check_is_not_named(tmp_path: Path) -> None:
    def refuse() -> None:
        if (tmp_path / "part-000001.parquet").exists():
            raise CheckFailed("another model")

    with pytest.raises(ClipshipError, match="another model"):
        run(tmp_path, range(10), check=refuse)
    assert assert_whole(tmp_path, NAMES) == 3
    run(tmp_path, range(3, 10))
    assert_complete(tmp_path, NAMES)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_full_disk_keeps_the_whole_shards(small_disk: Path, kind: str) -> None:
    """A shard with room for three thousand rows does not fit a second time; when there is room again it goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(os.urandom(48 * 1024))
    names = [f"{os.urandom(40).hex()}.jpg" for _ in range(400)]

    def write(first: int) -> None:
        with results_folder(
            small_disk / "out", settings=SETTINGS, header=HEADER, shard_size=50, shard_format=kind
        ) as results:
            for number in range(first, 400):
                results.write(JobImage(name=names[number], place=place(number)), result(0))
            results.complete()

    with pytest.raises(OSError, match=r"[Nn]o space") as caught:
        write(0)
    assert caught.value.errno == errno.ENOSPC
    done = assert_whole(small_disk / "out", names)
    assert not [path for path in (small_disk / "out").iterdir() if path.name.startswith(".")]
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    write(done)
    assert_complete(small_disk / "out", names)


def test_names_of_all_shards(tmp_path: Path) -> None:
    run(tmp_path, range(10))
    assert names_of(tmp_path) == NAMES


def test_numbers_in_a_manifest_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run(tmp_path, range(6))
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["place"] = {"files": 3}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="--restart"):
        run(tmp_path, range(6))
