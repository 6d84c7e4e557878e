"""A job's inputs as a command line names them, and their images: lazily, in the same order each time.

A :class:`Place` identifies an image: the number of files before its own, a digest of their names, and its own number
within its file. The images of an archive are not listed; its size and time of change stand for them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import bracex
from wcmatch import glob

from clipship.core.errors import DataError
from clipship.core.images.files import IMAGE_SUFFIXES, Folders, Found, files_in, is_image_name
from clipship.serving.jobs.archives import PARQUET_SUFFIXES, reader_of, validate_image_column

_CHUNK_BYTES = 1 << 16
_NOTHING = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An image's position among the inputs."""

    files: int
    """Files before its own."""
    digest: str
    """Of those files' identities, chained: hexadecimal SHA-256 of the digest so far and the next identity."""
    file: str
    """Its own file's identity: the path, and of an archive size and time of change."""
    number: int
    """Of the image in its file, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobImage:
    """One image of a job, under the name of its row."""

    name: str
    image: bytes | Path = b""
    error: str | None = None
    """Why the image could not be read; ``image`` is then empty."""
    place: Place | None = None
    """None for a watch, which resumes by names."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file, folder, glob or list of the command line."""

    text: str
    kind: Literal["file", "folder", "glob", "list"]
    files: Callable[[Folders], Iterator[Found]]
    """Its files, given the folders that were already searched."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All inputs of a job; :func:`inputs_from_arguments` makes it."""

    given: tuple[Input, ...]
    image_column: str | None = None
    """The column of images in Parquet files; None takes the one of bytes."""

    def files(self) -> Iterator[Found]:
        """Every file once, even if several inputs name it; the lines of lists as they are."""
        searched: Folders = set()
        earlier = _Named()
        for given in self.given:
            for found in given.files(searched):
                if given.kind == "list" or found.path not in earlier:
                    yield found
            earlier.add(given)

    def images(self, after: Place | None = None) -> Iterator[JobImage]:
        """Every image, or those that follow the one at ``after``.

        Raises:
            DataError: the files up to the one at ``after`` have changed.
        """
        digest = _NOTHING
        count = 0
        for count, found in enumerate(self.files(), start=1):
            identity = _identity(found.path)
            if after is None or count > after.files:
                place = Place(files=count - 1, digest=digest, file=identity, number=0)
                yield from self._images_of(found, place, _done_of(place, after))
            digest = hashlib.sha256(f"{digest}\0{identity}".encode()).hexdigest()
        if after is not None and count <= after.files:
            raise DataError(f"the inputs have {count} files, at least {after.files + 1} before: {_OTHER_INPUTS}")

    def _images_of(self, found: Found, place: Place, done: int) -> Iterator[JobImage]:
        """The images of one file from number ``done`` on."""
        name = text_of_path(found.path)
        reader = reader_of(found.path, self.image_column) if found.error is None else None
        if reader is None:
            if done == 0:
                yield _image(name, Path(found.path), found.error, place)
            return
        for number, member in enumerate(reader(found.path, done), start=done):
            inside = f"{name}/{text_of_path(member.name)}" if member.name else name
            there = Place(files=place.files, digest=place.digest, file=place.file, number=number)
            yield _image(inside, member.image, member.error, there)

    def total(self) -> int | None:
        """The number of images; None if it takes reading everything to know."""
        counted = all(given.kind == "file" and reader_of(given.text) is None for given in self.given)
        return len({given.text for given in self.given}) if counted else None


def _image(name: str, image: bytes | Path, error: str | None, place: Place) -> JobImage:
    if error is None and isinstance(image, Path) and ":" in str(image) and not image.exists():
        error = "no such file; addresses are not fetched"  # the client would refuse the whole request
    return JobImage(name=name, image=b"" if error is not None else image, error=error, place=place)


class _Glob:
    """A pattern as in a shell: ``*`` stays within a folder and skips hidden names, ``**`` stands for any folders.

    It names the files that it matches, whatever they are called, and the images in the folders that it matches.
    """

    def __init__(self, text: str) -> None:
        self._here = Path.cwd()
        parts = Path(text).parts
        fixed = list(itertools.takewhile(lambda part: not glob.is_magic(part), parts))
        self._folder = Path(*fixed)
        self._root = self._here / self._folder
        self._parts = parts[len(fixed) :]
        self._match = self._matcher(len(self._parts))
        self._match_parents = [self._matcher(depth) for depth in range(1, len(self._parts))]

    def _matcher(self, depth: int) -> Callable[[str], bool]:
        match: Callable[[str], bool] = glob.compile("/".join(self._parts[:depth]), flags=glob.GLOBSTAR).match
        return match

    def files(self) -> Iterator[Found]:
        """The files that it names, sorted; nothing from folders that cannot be searched."""
        found = files_in(str(self._folder), wanted=self.names, entered=self._may_hold)
        return (each for each in found if each.error is None)

    def names(self, path: str) -> bool:
        """Whether the file at ``path`` is one of them."""
        inside = self._inside(path)
        return bool(inside) and (self._match(inside[-1]) or (is_image_name(path) and any(map(self._match, inside))))

    def _inside(self, path: str) -> list[str]:
        """``path`` and the folders that it is in, from below ``self._folder`` on; empty where it is elsewhere."""
        try:
            parts = (self._here / path).relative_to(self._root).parts
        except ValueError:
            return []
        return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]

    def _may_hold(self, folder: str) -> bool:
        """Whether files that it names may be below ``folder``."""
        inside = self._inside(folder)
        if "**" in self._parts[: len(inside)]:
            return True
        if len(inside) < len(self._parts):
            return self._match_parents[len(inside) - 1](inside[-1])
        return any(map(self._match, inside))


class _Named:
    """The files that inputs name, known by the inputs' text rather than from a list of files."""

    def __init__(self) -> None:
        self._here = Path.cwd()
        self._paths: set[str] = set()
        self._globs: list[_Glob] = []

    def add(self, given: Input) -> None:
        """Add the files of ``given``."""
        if given.kind == "glob":
            self._globs.append(_Glob(given.text))
        elif given.kind != "list":
            self._paths.add(str(self._here / given.text))

    def __contains__(self, path: str) -> bool:
        if not (self._paths or self._globs):
            return False
        full = self._here / path
        return (
            str(full) in self._paths
            or (is_image_name(path) and any(str(folder) in self._paths for folder in full.parents))
            or any(pattern.names(path) for pattern in self._globs)
        )


def inputs_from_arguments(
    arguments: Sequence[str], *, lists: Sequence[str] = (), image_column: str | None = None
) -> Inputs:
    """The inputs that a command line names: files, folders, globs, names with braces, ``@LIST``; and lists of files.

    The first file of each is looked up here, so that a mistyped name fails before the job begins.

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
        return [Input(text=text, kind="folder", files=partial(files_in, str(Path(text))))]
    if os.path.lexists(text):
        path = str(Path(text))
        return [Input(text=text, kind="file", files=lambda searched: iter([Found(path)]))]
    if text.startswith("@"):
        return [_list_input(text[1:])]
    names = bracex.expand(text, keep_escapes=True, limit=0)
    if names != [text]:
        return [each for name in names for each in _inputs_from_text(name)]
    if glob.is_magic(text):
        return [Input(text=text, kind="glob", files=lambda searched: _Glob(text).files())]
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
    """The paths in a list: one a line, or separated by NUL, so that they may contain newlines."""
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
    """By what a file is recognised: its path, and an archive's size and time of change."""
    name = text_of_path(path)
    if reader_of(path) is None:
        return name
    try:
        status = os.stat(path)
    except OSError:
        return f"{name} (missing)"
    return f"{name} ({status.st_size} bytes, {status.st_mtime_ns} ns)"


def _done_of(place: Place, after: Place | None) -> int:
    """How many images of the file at ``place`` are done once the image at ``after`` is.

    Raises:
        DataError: it is not the file of ``after``, or a file before it is another.
    """
    if after is None or place.files > after.files:
        return 0
    if (place.digest, place.file) != (after.digest, after.file):
        raise DataError(f"the inputs have changed: file number {place.files + 1} was {after.file}: {_OTHER_INPUTS}")
    return after.number + 1


_OTHER_INPUTS = "give the inputs of the first run, or --restart to start over"
