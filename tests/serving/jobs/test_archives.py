from __future__ import annotations

import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipship.core.errors import DataError
from clipship.serving.jobs import archives
from clipship.serving.jobs.archives import (
    Member,
    parquet_members,
    reader_of,
    tar_members,
    validate_image_column,
)
from tests.serving.jobs.folders import write_tar

SHARD = [
    ("000.jpg", b"zero"),
    ("000.json", b"{}"),
    ("d/001.PNG", b"one" * 5000),
    ("002.seg.png", b""),
    ("002.cls", b"3"),
]
IMAGES = [Member("000.jpg", b"zero"), Member("d/001.PNG", b"one" * 5000), Member("002.seg.png", b"")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.TGZ", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.tar.xz", "w:xz")],
)
def test_tar(tmp_path: Path, name: str, mode: str) -> None:
    path = str(write_tar(tmp_path / name, SHARD, mode))
    assert reader_of(path) is tar_members
    assert list(tar_members(path)) == IMAGES
    assert [list(tar_members(path, skip)) for skip in (1, 2, 3)] == [IMAGES[1:], IMAGES[2:], []]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_tar_is_a_row_behind_its_images(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", bytes(range(256)) * 40) for number in range(9)], mode)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    members = list(tar_members(str(path)))
    assert members[-1].name == ""
    assert "damaged" in (members[-1].error or "")
    assert all(member.error is None for member in members[:-1])
    for skip in range(len(members) + 2):
        assert list(tar_members(str(path), skip)) == members[skip:]


def test_a_header_that_cannot_be_read_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", b"x" * 512) for number in range(4)])
    data = bytearray(path.read_bytes())
    data[2048:2060] = b"overwritten!"  # the third header
    path.write_bytes(data)
    first, second, damage = tar_members(str(path))
    assert (first.name, second.name) == ("0.jpg", "1.jpg")
    assert "more data follows" in (damage.error or "")


@pytest.mark.parametrize(("data", "reason"), [(b"", "damaged"), (b"<html>" * 999, "damaged"), (None, "No such file")])
def test_what_is_no_tar_is_a_row(tmp_path: Path, data: bytes | None, reason: str) -> None:
    if data is not None:
        (tmp_path / "a.tar").write_bytes(data)
    (member,) = tar_members(str(tmp_path / "a.tar"))
    assert reason in (member.error or "")


def test_a_tar_without_images_and_members_that_are_no_files(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "a.tar", [("a.json", b"{}")])
    assert list(tar_members(str(empty))) == [Member("", error="the archive holds no images")]
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        info = tarfile.TarInfo("link.jpg")
        info.type = tarfile.SYMTYPE
        archive.addfile(info)
    (member,) = tar_members(str(tmp_path / "b.tar"))
    assert (member.name, member.image) == ("link.jpg", b"")
    assert "a link or device" in (member.error or "")


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_IMAGE_BYTES", 5000)
    zero, one, two = tar_members(str(write_tar(tmp_path / "a.tar", SHARD)))
    assert (zero.error, two.error) == (None, None)
    assert one.error == "too large: 15000 bytes, at most 5000"


def test_memory_does_not_grow_with_the_members(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", ((f"{number}.jpg", b"x") for number in range(3000))))
    sizes = []
    tracemalloc.start()
    for number, _ in enumerate(tar_members(path)):
        if number in (500, 2999):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < sizes[0] + 100_000, "tarfile's list of members grows by some 2 MB here"


def hugging_face(path: Path, rows: list[dict[str, Any] | None], **settings: Any) -> str:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"label": list(range(len(rows))), "picture": pa.array(rows, kind)})
    pq.write_table(table, path, **settings)
    return str(path)


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    there = tmp_path / "there.jpg"
    rows: list[dict[str, Any] | None] = [
        {"bytes": b"a", "path": "x/a.jpg"},
        {"bytes": b"b", "path": None},
        {"bytes": None, "path": str(there)},
        {"bytes": None, "path": None},
        None,
    ]
    expected = [
        Member("0/x/a.jpg", b"a"),
        Member("1", b"b"),
        Member(f"2/{there}", there),
        Member("3", error="no image in this row (null)"),
        Member("4", error="no image in this row (null)"),
    ]
    path = hugging_face(tmp_path / "a.parquet", rows, row_group_size=2)
    for skip in range(7):
        assert list(parquet_members(path, skip)) == expected[skip:]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3)])
def test_parquet_of_bytes(tmp_path: Path, kind: Any) -> None:
    images = [f"{number:03d}".encode() for number in range(100)]
    pq.write_table(pa.table({"n": list(range(100)), "jpg": pa.array(images, kind)}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert list(parquet_members(path)) == [Member(str(number), image) for number, image in enumerate(images)]
    assert [member.name for member in parquet_members(path, 97)] == ["97", "98", "99"]


def test_which_column_holds_the_images(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"i"], "mask": [b"m"], "n": [1]}), path)
    assert [member.image for member in parquet_members(path)] == [b"i"], "the one called image"
    assert [member.image for member in parquet_members(path, 0, "mask")] == [b"m"]
    for wanted, message in (("n", "n: no such column of images; columns of bytes: image, mask"), ("x", "x: no such")):
        with pytest.raises(DataError, match=message):
            validate_image_column(path, wanted)
    pq.write_table(pa.table({"left": [b"i"], "right": [b"m"]}), path)
    with pytest.raises(DataError, match="several columns could hold images; columns of bytes: left, right"):
        validate_image_column(path, None)
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(DataError, match="columns of bytes: none"):
        validate_image_column(path, None)
    (member,) = parquet_members(path)
    assert "columns of bytes: none" in (member.error or ""), "met in mid-job it is a row"


def test_an_empty_parquet_file_has_no_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    assert list(parquet_members(str(tmp_path / "a.parquet"))) == []


def test_a_damaged_parquet_file_is_a_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | None] = [{"bytes": bytes([number]) * 4000, "path": None} for number in range(64)]
    path = hugging_face(tmp_path / "a.parquet", rows, row_group_size=16, compression="NONE", use_dictionary=False)
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2 - 30_000 : len(data) // 2 + 30_000] = bytes(60_000)
    Path(path).write_bytes(data)
    members = list(parquet_members(path))
    assert "cannot be read from row" in (members[-1].error or "")
    assert list(parquet_members(path, len(members))) == []
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    (member,) = parquet_members(str(tmp_path / "b.parquet"))
    assert "cannot be read from row 0 on" in (member.error or "")
