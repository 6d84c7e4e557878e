from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipship.core.errors import DataError, UsageError
from clipship.serving.client import ModelFacts, Result
from clipship.serving.job import image_paths
from clipship.serving.results import COLUMNS, results_file
from tests.serving.bundles import SPEC

FACTS = ModelFacts(bundle_digest="b" * 64, vocabulary_digest="v" * 64, image_spec=SPEC, max_batch_size=8, top_k=2)
FOX = Result(labels=("🦊, fox", 'the "cat"'), scores=(0.75, 0.25), indices=(6, 2))
BAD = Result(error="empty file (0 bytes)")
ROWS = [(Path("a/ü.jpg"), FOX), (Path("bad.jpg"), BAD)]
FOX_ROW = {
    "path": "a/ü.jpg",
    "label": "🦊, fox",
    "score": 0.75,
    "labels": ["🦊, fox", 'the "cat"'],
    "scores": [0.75, 0.25],
    "indices": [6, 2],
    "error": None,
}
BAD_ROW = {**dict.fromkeys(COLUMNS), "path": "bad.jpg", "error": "empty file (0 bytes)"}


def interrupted() -> Iterator[tuple[Path, Result]]:
    """One row, then Ctrl-C."""
    yield ROWS[0]
    raise KeyboardInterrupt


def write(out: Path, rows: Iterable[tuple[Path, Result]]) -> None:
    with results_file(out, FACTS) as sink:
        for path, result in rows:
            sink.write(path, result)


def test_parquet(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", ROWS)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == [FOX_ROW, BAD_ROW]
    assert table.schema.names == list(COLUMNS)
    metadata = table.schema.metadata
    assert metadata[b"clipship.bundle_digest"] == b"b" * 64
    assert metadata[b"clipship.vocabulary_digest"] == b"v" * 64


def test_parquet_is_written_in_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", [(Path(f"{number}.jpg"), FOX) for number in range(10_000)])
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4096, 4096, 1808]
    assert file.read(["path"]).column(0).to_pylist() == [f"{number}.jpg" for number in range(10_000)]


def test_parquet_of_errors_only_and_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "bad.parquet", [(Path("bad.jpg"), BAD)])
    assert pq.read_table(tmp_path / "bad.parquet").to_pylist() == [BAD_ROW]
    write(tmp_path / "none.parquet", [])
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "out.JSONL", ROWS)
    lines = (tmp_path / "out.JSONL").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [FOX_ROW, BAD_ROW]
    assert "🦊" in lines[0]


def test_csv(tmp_path: Path) -> None:
    write(tmp_path / "out.csv", ROWS)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as handle:
        fox, bad = csv.DictReader(handle)
    assert (fox["path"], fox["label"], fox["score"], fox["error"]) == ("a/ü.jpg", "🦊, fox", "0.75", "")
    assert json.loads(fox["labels"]) == FOX_ROW["labels"]
    assert bad == {**dict.fromkeys(COLUMNS, ""), "path": "bad.jpg", "error": "empty file (0 bytes)"}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_path_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"out.{suffix}", [(Path(os.fsdecode(b"caf\xe9.jpg")), FOX)])
    assert rb"caf\xe9" in (tmp_path / f"out.{suffix}").read_bytes().replace(rb"\\", b"\\")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_an_interrupted_job_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    write(out, ROWS)
    before = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(out, interrupted())
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("name", ["out.txt", "out", "out.parquet.bak"])
def test_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.parquet, \.jsonl, \.csv"), results_file(tmp_path / name, FACTS):
        pass


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"), results_file(tmp_path / "out.csv", FACTS):
        pass


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_full_disk_leaves_nothing(small_disk: Path, suffix: str) -> None:
    long = Result(labels=("x" * 50, "y" * 50), scores=(0.5, 0.5), indices=(0, 1))
    rows = [(Path(f"{os.urandom(20).hex()}.jpg"), long) for _ in range(10_000)]
    with pytest.raises(OSError, match=r"[Nn]o space") as caught:
        write(small_disk / f"out.{suffix}", rows)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_image_paths(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt", "odd.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inside = [tmp_path / name for name in ("a.PNG", "b.jpg", "sub/c.webp")]
    assert image_paths([str(tmp_path)]) == inside
    assert image_paths([str(tmp_path / "odd.dat"), str(tmp_path)]) == [tmp_path / "odd.dat", *inside]
    assert image_paths([str(tmp_path / "*.jpg"), str(tmp_path / "b.jpg")]) == [tmp_path / "b.jpg"]
    assert image_paths([str(tmp_path / "**/*.webp")]) == [tmp_path / "sub/c.webp"]
    assert image_paths([str(tmp_path / "s*")]) == [tmp_path / "sub/c.webp"]


def test_image_paths_that_are_not_there(tmp_path: Path) -> None:
    for name in ("gone.jpg", "*.jpg"):
        with pytest.raises(DataError, match="no such file or folder"):
            image_paths([str(tmp_path / name)])
    with pytest.raises(DataError, match="no images in this folder"):
        image_paths([str(tmp_path)])
