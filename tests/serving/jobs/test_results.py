from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipship.core.errors import UsageError
from clipship.serving.client.classifier import Result
from clipship.serving.jobs.results import COLUMNS, Header, names_in, results_file, table_lines

HEADER = Header(bundle_digest="b" * 64, vocabulary_digest="v" * 64)
FOX = Result(labels=("🦊, fox", 'the "cat"'), scores=(0.75, 0.25), indices=(6, 2))
BAD = Result(error="empty file (0 bytes)")
ROWS = [("a/ü.jpg", FOX), ("bad.jpg", BAD)]
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


def interrupted() -> Iterator[tuple[str, Result]]:
    """One row, then Ctrl-C."""
    yield ROWS[0]
    raise KeyboardInterrupt


def write(out: Path, rows: Iterable[tuple[str, Result]], header: Header = HEADER) -> None:
    with results_file(out, header) as write_row:
        for name, result in rows:
            write_row(name, result)


def test_parquet(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", ROWS)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == [FOX_ROW, BAD_ROW]
    assert table.schema.names == list(COLUMNS)
    metadata = table.schema.metadata
    assert metadata[b"clipship.bundle_digest"] == b"b" * 64
    assert metadata[b"clipship.vocabulary_digest"] == b"v" * 64


def test_parquet_is_written_in_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", [(f"{number}.jpg", FOX) for number in range(10_000)])
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4096, 4096, 1808]
    assert file.read(["path"]).column(0).to_pylist() == [f"{number}.jpg" for number in range(10_000)]


def test_parquet_of_errors_only_and_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "bad.parquet", [("bad.jpg", BAD)])
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
def test_features(tmp_path: Path, suffix: str) -> None:
    features = np.array([0.6, -0.8], dtype=np.float32)
    out = tmp_path / f"out.{suffix}"
    write(out, [("a.jpg", replace(FOX, embedding=features)), ("b.jpg", BAD)], replace(HEADER, embed_dim=2))
    if suffix == "parquet":
        table = pq.read_table(out)
        assert table.schema.field("embedding").type == pa.list_(pa.float32())
        rows = table.to_pylist()
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        with out.open(newline="", encoding="utf-8") as handle:
            rows = [{**row, "embedding": json.loads(row["embedding"] or "null")} for row in csv.DictReader(handle)]
    assert rows[0]["embedding"] == features.tolist()
    assert rows[1]["embedding"] is None
    assert list(rows[0]) == [*COLUMNS, "embedding"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_the_names_of_a_files_rows(tmp_path: Path, suffix: str) -> None:
    names = ["a.jpg", "new\nline.jpg", "cr\r.jpg", 'quo"te.jpg', "ü, 🦊.jpg"]
    write(tmp_path / f"out.{suffix}", [(name, FOX) for name in names])
    assert list(names_in(tmp_path / f"out.{suffix}")) == names


def test_the_table_keeps_a_row_on_a_line() -> None:
    shown = io.StringIO()
    table_lines(shown)("a\nb\x1b[2J.jpg", FOX)
    table_lines(shown)("ü.jpg", BAD)
    assert shown.getvalue() == "0.7500  🦊, fox  a\\nb\\x1b[2J.jpg\n error  ü.jpg: empty file (0 bytes)\n"


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
    with pytest.raises(UsageError, match=r"\.parquet, \.jsonl, \.csv"), results_file(tmp_path / name, HEADER):
        pass


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"), results_file(tmp_path / "out.csv", HEADER):
        pass


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_full_disk_leaves_nothing(small_disk: Path, suffix: str) -> None:
    long = Result(labels=("x" * 50, "y" * 50), scores=(0.5, 0.5), indices=(0, 1))
    rows = [(f"{os.urandom(20).hex()}.jpg", long) for _ in range(10_000)]
    with pytest.raises(OSError, match=r"[Nn]o space") as caught:
        write(small_disk / f"out.{suffix}", rows)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
