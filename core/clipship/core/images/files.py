"""Image files by their names, and a walk over folders: lazy, in one fixed order, in memory that does not grow.

The order is that of the names, folder by folder, so that a job can resume where an earlier one stopped.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import FORMATS

IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
"""In lower case, of every format that is decoded."""

_NAMES_AT_ONCE = 100_000
"""Names of one folder held at the same time; a larger folder is listed once for every so many of them."""

Folders = set[tuple[int, int]]
"""Device and inode of the folders that were searched: none is searched twice, however many links lead to it."""
Wanted = Callable[[str], bool]
"""Whether to take the file, or enter the folder, of this path."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file, or a folder that could not be searched."""

    path: str
    error: str | None = None


def is_image_name(name: str) -> bool:
    """Whether a file's name ends in one of :data:`IMAGE_SUFFIXES`."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def files_in(
    folder: str,
    searched: Folders | None = None,
    *,
    wanted: Wanted = is_image_name,
    entered: Wanted = lambda path: True,
) -> Iterator[Found]:
    """The ``wanted`` files below ``folder``, links followed, sorted by the parts of their paths.

    Dangling links are found, and fail when they are read; pipes, sockets and devices are not. A folder that cannot be
    searched is found with the reason.

    Args:
        searched: folders to pass over; those that are searched here are added.
        entered: which folders to search.
    """
    seen: Folders = set() if searched is None else searched
    levels = [iter([(Found(folder), True)])]
    while levels:
        found, is_folder = next(levels[-1], (None, False))
        if found is None:
            levels.pop()
        elif is_folder:
            levels.append(_entries(found.path, seen, wanted, entered))
        else:
            yield found


def _entries(folder: str, searched: Folders, wanted: Wanted, entered: Wanted) -> Iterator[tuple[Found, bool]]:
    """What lies directly in ``folder``, and whether each is a folder."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in searched:
            return
        searched.add((status.st_dev, status.st_ino))
        for path, is_folder in _sorted_paths(folder, wanted, entered):
            yield Found(path), is_folder
    except OSError as error:
        yield Found(folder, f"cannot be searched: {error.strerror or error}"), False


def _sorted_paths(folder: str, wanted: Wanted, entered: Wanted) -> Iterator[tuple[str, bool]]:
    last = ""
    while True:
        with os.scandir(folder) as entries:
            found = ((join(folder, entry.name), _is_folder(entry)) for entry in entries if entry.name > last)
            taken = ((path, kind) for path, kind in found if kind is not None and (entered if kind else wanted)(path))
            paths = heapq.nsmallest(_NAMES_AT_ONCE, taken)
        yield from paths
        if len(paths) < _NAMES_AT_ONCE:
            return
        last = os.path.basename(paths[-1][0])


def _is_folder(entry: os.DirEntry[str]) -> bool | None:
    """None: neither a folder nor a file."""
    try:
        if entry.is_dir():
            return True
        return False if entry.is_file() or not os.path.exists(entry.path) else None
    except OSError:  # a link to itself
        return False


def join(folder: str, name: str) -> str:
    """``folder``/``name``, and ``name`` alone for the working folder."""
    return name if folder == "." else os.path.join(folder, name)


def some_image_files(folder: Path, count: int) -> list[Path]:
    """``count`` image files spread evenly over ``folder`` and its subfolders (all of them when there are fewer).

    Raises:
        DataError: no such folder, or no image file in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: give --images a folder of images")
    paths = [path for path in (Path(found.path) for found in files_in(str(folder))) if path.is_file()]
    if not paths:
        looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder}: no images in it (looked for {looked_for}): give --images another folder")
    return [paths[position * len(paths) // count] for position in range(count)] if len(paths) > count else paths
