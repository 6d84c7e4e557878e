"""The files of folders and globs: lazily, in one fixed order, in memory that does not grow with their number.

The order is that of the names, folder by folder, so that a job can go on where an earlier one was stopped.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

_NAMES_AT_ONCE = 100_000
"""Names of one folder held at the same time; a larger folder is listed once for every so many of them."""

Folders = set[tuple[int, int]]
"""Device and inode of the folders that were searched: none is searched twice, however many links lead to it."""
Parts = tuple[str, ...]
"""A path or a glob, cut at its slashes."""
Wanted = Callable[[str], bool]
"""Whether a file of this name is to be found."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file, or a folder that could not be searched."""

    path: str
    error: str | None = None


def files_in(folder: str, searched: Folders, wanted: Wanted) -> Iterator[Found]:
    """The files below ``folder`` whose names are ``wanted``, links followed, sorted by the parts of their paths.

    Links to nowhere are found, for whoever reads them to say so; pipes, sockets and devices are not. A folder that
    cannot be searched is found with the reason.
    """
    levels = [_entries(folder, searched, wanted)]
    while levels:
        for entry in levels[-1]:
            if isinstance(entry, Found):
                yield entry
            else:
                levels.append(_entries(entry, searched, wanted))
                break
        else:
            levels.pop()


def _entries(folder: str, searched: Folders, wanted: Wanted) -> Iterator[Found | str]:
    """What lies directly in ``folder``: files found, and folders to be searched as their paths."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in searched:
            return
        searched.add((status.st_dev, status.st_ino))
        for name, is_folder in _sorted_names(folder, wanted):
            path = join(folder, name)
            yield path if is_folder else Found(path)
    except OSError as error:
        yield Found(folder, f"cannot be searched: {error.strerror or error}")


def _sorted_names(folder: str, wanted: Wanted) -> Iterator[tuple[str, bool]]:
    """Names in ``folder`` and whether each is a folder: its folders, and the files that are ``wanted``."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            found = (_name_and_kind(entry, wanted) for entry in entries if entry.name > last)
            names = heapq.nsmallest(_NAMES_AT_ONCE, (each for each in found if each is not None))
        yield from names
        if len(names) < _NAMES_AT_ONCE:
            return
        last = names[-1][0]


def _name_and_kind(entry: os.DirEntry[str], wanted: Wanted) -> tuple[str, bool] | None:
    try:
        if entry.is_dir():
            return entry.name, True
        readable = entry.is_file() or not os.path.exists(entry.path)
    except OSError:  # a link to itself
        readable = True
    return (entry.name, False) if readable and wanted(entry.name) else None


def is_glob(text: str) -> bool:
    """Whether ``text`` has a wildcard."""
    return any(character in text for character in "*?[")


def files_matching(pattern: str, searched: Folders, wanted: Wanted) -> Iterator[Found]:
    """What the glob ``pattern`` matches, sorted: files whatever their names, in matched folders the ``wanted`` ones.

    As in a shell, ``*`` does not cross a ``/`` and passes over names that begin with a dot; ``**`` stands for any
    number of folders.
    """
    for path in _matches("/" if pattern.startswith("/") else ".", parts_of(pattern), wanted):
        if os.path.isdir(path):
            yield from files_in(path, searched, wanted)
        else:
            yield Found(path)


def _matches(folder: str, pattern: Parts, wanted: Wanted) -> Iterator[str]:
    """The paths below ``folder`` that the parts of ``pattern`` match; nothing from folders that cannot be searched."""
    if not pattern:
        yield folder
    elif pattern[0] == "**":
        yield from _matches_at_any_depth(folder, pattern, wanted)
    elif not is_glob(pattern[0]):
        path = join(folder, pattern[0])
        if os.path.lexists(path):
            yield from _matches(path, pattern[1:], wanted)
    else:
        with suppress(OSError):
            for name, is_folder in _sorted_names(folder, lambda name: True):
                if _name_matches(name, pattern[0]) and (is_folder or len(pattern) == 1):
                    yield from _matches(join(folder, name), pattern[1:], wanted)


def _matches_at_any_depth(folder: str, pattern: Parts, wanted: Wanted) -> Iterator[str]:
    """The files below ``folder`` that ``pattern`` matches, and the ``wanted`` ones in folders that it matches."""
    depth = len(parts_of(folder))
    for found in files_in(folder, set(), lambda name: True):
        if found.error is None and matches(parts_of(found.path)[depth:], pattern, inside=wanted(found.path)):
            yield found.path


def join(folder: str, name: str) -> str:
    """``folder``/``name``, and ``name`` alone for the working folder."""
    return name if folder == "." else os.path.join(folder, name)


def parts_of(path: str) -> Parts:
    """What stands between the slashes."""
    return tuple(part for part in path.split("/") if part and part != ".")


def matches(parts: Parts, pattern: Parts, *, inside: bool) -> bool:
    """Whether the path of ``parts`` matches the glob of ``pattern``; with ``inside``, or lies in a folder that does."""
    if not pattern or not parts:
        return not pattern and (inside or not parts)
    if pattern[0] == "**":
        deeper = _name_matches(parts[0], "*") and matches(parts[1:], pattern, inside=inside)
        return deeper or matches(parts, pattern[1:] or ("*",), inside=inside)
    return _name_matches(parts[0], pattern[0]) and matches(parts[1:], pattern[1:], inside=inside)


def _name_matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))
