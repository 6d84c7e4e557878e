"""What a job is given, and its images one after the other: lazily, in the same order each time.

An image is found again by its :class:`Place`: how many files come before its own, a digest of their names, and its
number within its file. The images of an archive are not listed, so archives count with their size and time of change.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from clipship.core.errors import DataError
from clipship.core.images.decoding import IMAGE_SUFFIXES
from clipship.serving.jobs.archives import (
    PARQUET_SUFFIXES,
    is_image_name,
    reader_of,
    validate_image_column,
)
from clipship.serving.jobs.walk import Folders, Found, Parts, files_in, files_matching, is_glob, matches, parts_of

_CHUNK_BYTES = 1 << 16
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<words>[^{}]*,[^{}]*))\}")
_NOTHING = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an image is among the inputs."""

    files: int
    """Files before its own."""
    digest: str
    """Of those files' identities, chained: SHA-256 of the digest so far and the next identity, in hexadecimal."""
    file: str
    """Its own file's identity: the path, and of an archive size and time of change."""
    number: int
    """Of the image in its file, from 0."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobImage:
    """One image of a job: what its row is called, and what the client is given."""

    name: str
    image: bytes | Path = b""
    error: str | None = None
    """Why there is nothing to classify; ``image`` is empty then."""
    place: Place | None = None
    """None where a job does not go on from places."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file, folder, glob or list, as it was given."""

    text: str
    kind: Literal["file", "folder", "glob", "list"]
    files: Callable[[Folders], Iterator[Found]]
    """Its files, given the folders that were searched before."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a job is given; :func:`inputs_from_arguments` makes it."""

    given: tuple[Input, ...]
    image_column: str | None = None
    """The column of images in Parquet files; None takes the one of bytes."""

    def files(self) -> Iterator[Found]:
        """Every file once, though several inputs name it; the lines of lists as they are."""
        searched: Folders = set()
        earlier = _Earlier()
        for given in self.given:
            for found in given.files(searched):
                if given.kind == "list" or not earlier.have(found.path):
                    yield found
            earlier.add(given)

    def items(self, after: Place | None = None) -> Iterator[JobImage]:
        """Every image, or those behind the one at ``after``.

        Raises:
            DataError: the files up to the one at ``after`` are not the ones they were.
        """
        digest = _NOTHING
        count = 0
        for count, found in enumerate(self.files(), start=1):
            identity = _identity(found.path)
            if after is None or count > after.files:
                place = Place(files=count - 1, digest=digest, file=identity, number=0)
                yield from self._items_of(found, place, _done_of(place, after))
            digest = hashlib.sha256(f"{digest}\0{identity}".encode()).hexdigest()
        if after is not None and count <= after.files:
            raise DataError(f"the inputs have {count} files, at least {after.files + 1} before: {_OTHER_INPUTS}")

    def _items_of(self, found: Found, place: Place, done: int) -> Iterator[JobImage]:
        """The images of one file from number ``done`` on."""
        name = text_of_path(found.path)
        reader = reader_of(found.path, self.image_column) if found.error is None else None
        if reader is None:
            if done == 0:
                yield _item(name, Path(found.path), found.error, place)
            return
        for number, member in enumerate(reader(found.path, done), start=done):
            inside = f"{name}/{text_of_path(member.name)}" if member.name else name
            there = Place(files=place.files, digest=place.digest, file=place.file, number=number)
            yield _item(inside, member.image, member.error, there)

    def total(self) -> int | None:
        """How many images there are; None where only reading everything would tell."""
        counted = all(given.kind == "file" and reader_of(given.text) is None for given in self.given)
        return len({given.text for given in self.given}) if counted else None


def _item(name: str, image: bytes | Path, error: str | None, place: Place) -> JobImage:
    if error is None and isinstance(image, Path) and ":" in str(image) and not image.exists():
        error = "no such file; addresses are not fetched"  # a client refuses them, and all other images with them
    return JobImage(name=name, image=b"" if error is not None else image, error=error, place=place)


class _Earlier:
    """Which files the inputs before have named, told from what was given and not from a list of them."""

    def __init__(self) -> None:
        self._here = os.getcwd()
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._globs: list[Parts] = []

    def add(self, given: Input) -> None:
        """From now on the files of ``given`` are among them."""
        path = os.path.join(self._here, given.text)
        if given.kind == "glob":
            self._globs.append(parts_of(path))
        elif given.kind != "list":
            (self._files if given.kind == "file" else self._folders).add(os.path.join("/", *parts_of(path)))

    def have(self, path: str) -> bool:
        """Whether the file at ``path`` is among them."""
        if not (self._files or self._folders or self._globs):
            return False
        parts = parts_of(os.path.join(self._here, path))
        image = is_image_name(path)
        return (
            os.path.join("/", *parts) in self._files
            or (image and any(os.path.join("/", *parts[:end]) in self._folders for end in range(len(parts))))
            or any(matches(parts, glob, inside=image) for glob in self._globs)
        )


def inputs_from_arguments(
    arguments: Sequence[str], *, lists: Sequence[str] = (), image_column: str | None = None
) -> Inputs:
    """What a command line names: files, folders, globs, numbered names in braces, ``@LIST``; and lists of files.

    Only the first file of each is looked for here, so that a mistyped name is told before the job begins.

    Raises:
        DataError: nothing was given, a path does not exist, a glob matches nothing, a folder holds no image, or the
            first file is Parquet without a column of images.
    """
    given = [each for text in arguments for each in _inputs_from_text(text)] + [_list_input(text) for text in lists]
    if not given:
        raise DataError("no images were given: give files, folders, globs, archives, or --list FILE")
    for each in given:
        if each.kind != "list" and next(each.files(set()), None) is None:
            raise DataError(_nothing_there(each))
    if given[0].kind != "list":
        first = next(given[0].files(set()))
        if first.path.lower().endswith(PARQUET_SUFFIXES):
            validate_image_column(first.path, image_column)
    return Inputs(given=tuple(given), image_column=image_column)


def _inputs_from_text(text: str) -> list[Input]:
    if os.path.isdir(text):
        return [Input(text=text, kind="folder", files=partial(files_in, str(Path(text)), wanted=is_image_name))]
    if os.path.lexists(text):
        path = str(Path(text))
        return [Input(text=text, kind="file", files=lambda searched: iter([Found(path)]))]
    if text.startswith("@"):
        return [_list_input(text[1:])]
    if _BRACES.search(text):
        return [each for name in _without_braces(text) for each in _inputs_from_text(name)]
    if is_glob(text):
        return [Input(text=text, kind="glob", files=partial(files_matching, text, wanted=is_image_name))]
    if "://" in text:
        raise DataError(f"{text}: addresses are not fetched: give files of this machine")
    raise DataError(f"{text}: no such file or folder: give images, folders, globs, archives or Parquet files")


def _nothing_there(given: Input) -> str:
    if given.kind == "glob":
        return f"{given.text}: nothing matches this glob: give images, folders, globs, archives or Parquet files"
    endings = ", ".join(sorted(IMAGE_SUFFIXES))
    return (
        f"{given.text}: no images in this folder (names ending in {endings}); archives are given as {given.text}/*.tar"
    )


def _without_braces(text: str) -> Iterator[str]:
    """``a-{000..002}.tar`` as a-000.tar, a-001.tar, a-002.tar, as webdatasets name their shards; {x,y} likewise."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    words = found["words"].split(",") if found["words"] is not None else _numbers(found["first"], found["last"])
    for word in words:
        yield from _without_braces(text[: found.start()] + word + text[found.end() :])


def _numbers(first: str, last: str) -> Iterator[str]:
    width = len(first) if first.startswith("0") else 0
    return (f"{number:0{width}}" for number in range(int(first), int(last) + 1))


def _list_input(text: str) -> Input:
    """The list of files ``text``, "-" for stdin.

    Raises:
        DataError: there is no such file.
    """
    if text != "-" and (os.path.isdir(text) or not os.path.exists(text)):
        raise DataError(f"{text}: no such list: give a file with one path a line (or NUL between them), or - for stdin")
    return Input(text=text, kind="list", files=lambda searched: _files_listed(text))


def _files_listed(text: str) -> Iterator[Found]:
    if text == "-":
        yield from map(Found, _paths_in(sys.stdin.buffer))
        return
    with open(text, "rb") as handle:
        yield from map(Found, _paths_in(handle))


def _paths_in(handle: BinaryIO) -> Iterator[str]:
    """The paths in a list: one a line, or NUL between them, which lets them hold newlines."""
    chunk = handle.read(_CHUNK_BYTES)
    separator = b"\0" if b"\0" in chunk else b"\n"
    rest = b""
    while chunk:
        *lines, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip())
        chunk = handle.read(_CHUNK_BYTES)
    if rest.strip():
        yield os.fsdecode(rest)


def text_of_path(path: str) -> str:
    """The path as text; bytes that are not UTF-8 as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _identity(path: str) -> str:
    """What tells whether a file is the one it was: its path, and of an archive its size and time of change."""
    name = text_of_path(path)
    if reader_of(path) is None:
        return name
    try:
        status = os.stat(path)
    except OSError:
        return f"{name} (missing)"
    return f"{name} ({status.st_size} bytes, {status.st_mtime_ns} ns)"


def _done_of(place: Place, after: Place | None) -> int:
    """How many images of the file at ``place`` are done when the image at ``after`` is.

    Raises:
        DataError: it should be the file of ``after``, and it or one before is another.
    """
    if after is None or place.files > after.files:
        return 0
    if (place.digest, place.file) != (after.digest, after.file):
        raise DataError(f"the inputs have changed: file number {place.files + 1} was {after.file}: {_OTHER_INPUTS}")
    return after.number + 1


_OTHER_INPUTS = "give the inputs of the first run as they were, or --restart to begin anew"
