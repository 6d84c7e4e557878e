"""The images in tar archives (webdataset shards) and in Parquet files, read as a stream.

A tar archive is read from front to back, compressed or not, and held member by member; a Parquet file a few rows at a
time. What is damaged becomes an image with an error, at the place where the damage was met.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.images.files import is_image_name
from clipship.serving.client.inputs import MAX_IMAGE_BYTES

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET_SUFFIXES = (".parquet",)

_ROWS_AT_ONCE = 16
_READ_BYTES = 1 << 20
_DAMAGE = (tarfile.TarError, zlib.error, LZMAError, EOFError, OSError)


@dataclass(frozen=True, slots=True)
class Member:
    """One image of an archive: what the client is given, or why there is nothing to give."""

    name: str
    """Within the archive; empty for what concerns the archive itself."""
    image: bytes | Path = b""
    error: str | None = None


Reader = Callable[[str, int], Iterator[Member]]
"""``reader(path, skip)``: the members of an archive from number ``skip`` on."""


def reader_of(path: str, image_column: str | None = None) -> Reader | None:
    """How the archive at ``path`` is read; None: by its name it is no archive."""
    name = path.lower()
    if name.endswith(TAR_SUFFIXES):
        return tar_members
    if name.endswith(PARQUET_SUFFIXES):
        return lambda path, skip: parquet_members(path, skip, image_column)
    return None


def tar_members(path: str, skip: int = 0) -> Iterator[Member]:
    """The images of a tar archive, by their names' endings; those before number ``skip`` are passed over unread."""
    number, damage = 0, None
    try:
        archive: Any  # typeshed does not know of its list of members
        with tarfile.open(path, "r|*", bufsize=_READ_BYTES) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # every header it has seen: a leak of 1 kB an image
                if info.isdir() or not is_image_name(info.name):
                    continue
                if number + 1 >= skip:  # the one before is read to see whether it is whole, as it was seen then
                    member = _tar_member(archive, info)
                    if number >= skip:
                        yield member
                number += 1
            damage = _damage_behind(archive)
    except _DAMAGE as error:
        damage = _reason(error)
    if number == 0 and damage is None:
        damage = "the archive holds no images"
    if damage is not None and number >= skip:
        yield Member("", error=damage)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"damaged: {error or type(error).__name__}"


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    if not info.isreg():
        return Member(info.name, error="a link or device in an archive: pack the file itself")
    if info.size > MAX_IMAGE_BYTES:
        return Member(info.name, error=f"too large: {info.size} bytes, at most {MAX_IMAGE_BYTES}")
    content = archive.extractfile(info)
    assert content is not None  # of a regular file it is never None
    return Member(info.name, content.read())


def _damage_behind(archive: tarfile.TarFile) -> str | None:
    """What is wrong behind the end: tarfile takes a header it cannot read for the end, and members would be lost."""
    stream: Any = archive.fileobj
    while chunk := stream.read(_READ_BYTES):
        if chunk.strip(b"\0"):
            return "damaged: after the last member that can be read, more data follows"
    return None


def parquet_members(path: str, skip: int = 0, image_column: str | None = None) -> Iterator[Member]:
    """One image a row of a Parquet file, by its number; those before number ``skip`` are passed over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # without pre-buffering a row group, hundreds of megabytes of images at times, is never held as a whole
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
            column = column_of_images(path, file.schema_arrow, image_column)
            groups, number = _groups_after(file, skip)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if number >= skip:
                        yield _parquet_member(number, value)
                    number += 1
        return
    except (pa.ArrowException, OSError, DataError) as error:
        reason = " ".join(str(error).split())
    if number >= skip:
        yield Member("", error=f"cannot be read from row {number} on: {reason}")


def validate_image_column(path: str, image_column: str | None) -> None:
    """Raise :class:`DataError` where a Parquet file has no such column of images; damaged files are met later."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(pa.ArrowException, OSError):
        column_of_images(path, pq.read_schema(path), image_column)


def _groups_after(file: Any, skip: int) -> tuple[list[int], int]:
    """The row groups that row ``skip`` and later ones are in, and the number of the first of their rows."""
    first = group = 0
    while group < file.num_row_groups and first + file.metadata.row_group(group).num_rows <= skip:
        first += file.metadata.row_group(group).num_rows
        group += 1
    return list(range(group, file.num_row_groups)), first


def _parquet_member(number: int, value: Any) -> Member:
    """A row of bytes, or of Hugging Face's {bytes, path}, where ``path`` stands for a file if there are no bytes."""
    name = str(number)
    if isinstance(value, dict):
        path = value.get("path")
        name = f"{number}/{path}" if path else name
        value = value["bytes"]
        if value is None and path and "\0" not in path:
            return Member(name, Path(path))
    if value is None:
        return Member(name, error="no image in this row (null)")
    return Member(name, value)


def column_of_images(path: str, schema: Any, wanted: str | None) -> str:
    """The name of the column that holds images: the one of binary type, or struct{bytes, path}.

    Raises:
        DataError: there is none, or there are several and none is ``wanted``; says which there are.
    """
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None and wanted in candidates:
        return wanted
    if wanted is None and len(candidates) == 1:
        return str(candidates[0])
    if wanted is None and "image" in candidates:
        return "image"
    columns = ", ".join(candidates) or "none"
    given = "several columns could hold images" if wanted is None and candidates else "no such column of images"
    raise DataError(f"{path}: {given if wanted is None else f'{wanted}: {given}'}; columns of bytes: {columns}")


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return "bytes" in names and _holds_bytes(kind.field("bytes").type)
    checks = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(check(kind) for check in checks)
