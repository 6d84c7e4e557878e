"""Streams the images in tar archives (webdataset shards) and in Parquet files.

A tar archive, compressed or not, is read member by member, a Parquet file a few rows at a time. Damage becomes an image
with an error, at the place of the damage.
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
    """One image of an archive, or an error."""

    name: str
    """Within the archive; empty for an error of the archive itself."""
    image: bytes | Path = b""
    error: str | None = None


Reader = Callable[[str, int], Iterator[Member]]
"""``reader(path, skip)``: the members of an archive from number ``skip`` on."""


def reader_of(path: str, image_column: str | None = None) -> Reader | None:
    """What reads the archive at ``path``; None if its name is not an archive's."""
    name = path.lower()
    if name.endswith(TAR_SUFFIXES):
        return tar_members
    if name.endswith(PARQUET_SUFFIXES):
        return lambda path, skip: parquet_members(path, skip, image_column)
    return None


def tar_members(path: str, skip: int = 0) -> Iterator[Member]:
    """The images of a tar archive, by suffix, from number ``skip`` on; those before are not read."""
    number, damage = 0, None
    try:
        archive: Any  # typeshed lacks its list of members
        with tarfile.open(path, "r|*", bufsize=_READ_BYTES) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # it keeps every header: a leak of 1 kB an image
                if info.isdir() or not is_image_name(info.name):
                    continue
                if number + 1 >= skip:  # the one before is read too, to see whether it is whole
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
    """Damage that tarfile takes for the end of the archive: members would be lost without an error."""
    stream: Any = archive.fileobj
    while chunk := stream.read(_READ_BYTES):
        if chunk.strip(b"\0"):
            return "damaged: more data follows the last readable member"
    return None


def parquet_members(path: str, skip: int = 0, image_column: str | None = None) -> Iterator[Member]:
    """The images of a Parquet file, one a row, from row ``skip`` on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # pre-buffering would hold a whole row group, which may be hundreds of megabytes of images
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
    """Raise :class:`DataError` if a Parquet file has no such column of images; a damaged file fails later."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(pa.ArrowException, OSError):
        column_of_images(path, pq.read_schema(path), image_column)


def _groups_after(file: Any, skip: int) -> tuple[list[int], int]:
    """The row groups of row ``skip`` and later ones, and the number of their first row."""
    first = group = 0
    while group < file.num_row_groups and first + file.metadata.row_group(group).num_rows <= skip:
        first += file.metadata.row_group(group).num_rows
        group += 1
    return list(range(group, file.num_row_groups)), first


def _parquet_member(number: int, value: Any) -> Member:
    """A row of bytes, or of Hugging Face's {bytes, path}, where ``path`` names a file if there are no bytes."""
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
    """The name of the column of images, of a binary type or struct{bytes, path}.

    Raises:
        DataError: there is none, or none of several is ``wanted``; the message lists them.
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
