"""Finds the new and complete images in watched folders.

Folders are polled: change notifications (inotify) miss network file systems, and tell nothing of files that came while
no watch ran or that are still being written.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType

from clipship.core.images.files import files_in
from clipship.serving.jobs.inputs import JobImage, text_of_path

_State = tuple[int, int]
"""Size in bytes and time of change in ns of a file."""


class Watcher:
    """Finds the images that arrive in ``folders``, each once, when it is complete.

    A file is complete when its size and time of change have not changed for ``settle_s`` seconds, and no process of
    this machine has it open for writing.

    Args:
        done: the row names of images to skip.
    """

    def __init__(self, folders: Sequence[str], *, settle_s: float, done: set[str]) -> None:
        self.pause_s = min(1.0, settle_s / 2)
        """Between two looks into the folders."""
        self._folders = folders
        self._settle_s = settle_s
        self._done = done
        self._changing: dict[str, tuple[_State, float]] = {}

    def images(self) -> Iterator[JobImage]:
        """The images that became complete since the last call."""
        before, self._changing = self._changing, {}
        for folder in self._folders:
            for found in files_in(folder):
                name = text_of_path(found.path)
                if found.error is None and name not in self._done and self._is_whole(found.path, before):
                    self._done.add(name)
                    yield JobImage(name=name, image=Path(found.path))

    def _is_whole(self, path: str, before: dict[str, tuple[_State, float]]) -> bool:
        now_s = time.monotonic()
        try:
            status = os.stat(path)
        except OSError:  # deleted meanwhile, or a dangling link
            return False
        state = (status.st_size, status.st_mtime_ns)
        known, since_s = before.get(path, (None, now_s))
        if known == state and now_s - since_s >= self._settle_s and not is_being_written(path):
            return True
        self._changing[path] = (state, since_s if known == state else now_s)
        return False


def is_being_written(path: str) -> bool:
    """Whether a process of this machine has the file open for writing, found out by a read lease (fcntl(2)).

    False where the file system has no leases, or the file is another user's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # reading it will give the error
        return False
    try:
        # a new writer breaks the lease by a signal; the default one, SIGIO, would end this process
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """An event that the first Ctrl-C or SIGTERM in the block sets; the second one raises KeyboardInterrupt."""
    stop = Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
