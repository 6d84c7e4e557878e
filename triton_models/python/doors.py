"""Limits how far a model may run ahead of the next one in an ensemble, so that the next one's queue stays short.

When a client disconnects, Triton drops the next steps of its request, but not a step that is already queued
(triton-inference-server/server#6739): that is computed for nothing. So requests wait before the step, in the model that
produces its inputs. A model publishes at its door, a few bytes of shared memory, how much work it has accepted and how
fast it works; the model before it waits there while more than a turn's work is on its way.

No request is rejected, and the order is kept. Without a door, as with backends other than Python, nothing waits.
"""

import fcntl
import glob
import math
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

TURN_S = 0.3
"""Work, in seconds, that may be on its way to a model."""
_ON_THE_WAY_S = 0.02
"""Work that has not arrived at an idle model by then was dropped."""
_POLL_S = 0.001
_LAST = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
_LONGEST_S = 10.0
"""Then stop waiting, whatever the door says: its model may have died."""
_STATE = struct.Struct("<Qdd")
"""All work accepted so far; when the model became idle, by the monotonic clock (0: it is busy); work per second.

Written by the model."""
_WAY = struct.Struct("<Qd")
"""All work sent to the door so far, and when the last was sent. Written by the senders, one at a time."""


def work_of(array: Any) -> int:
    """The work in a batch: bytes of files [N, 1] plus one per file, or the number of images [N, H, W, 3]."""
    return len(array) + sum(map(len, array.flat)) if array.dtype == np.object_ else len(array)


def _path(kind: str, name: str) -> str:
    """A file in shared memory; ``clipship serve`` deletes files with its prefix."""
    prefix = os.environ.get("CLIPSHIP_SHM_PREFIX", f"clipship_{os.getppid()}_")
    return f"/dev/shm/{prefix}{kind}_{name}"


class _Shared:
    """Numbers in memory that several processes share."""

    def __init__(self, path: str, form: struct.Struct) -> None:
        self._form = form
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._descriptor, form.size)
        self._memory = mmap.mmap(self._descriptor, form.size)

    def read(self) -> tuple[Any, ...]:
        """All of them."""
        return self._form.unpack(self._memory[:])

    def write(self, *values: float) -> None:
        """All of them."""
        self._memory[:] = self._form.pack(*values)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes; the kernel releases the lock when this one dies."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def answered(requests: list[Any], responses: Iterator[Any]) -> list[Any] | None:
    """The return value of ``execute``: several requests are each answered as soon as the response is ready.

    A single response is returned instead: its client may stop the server at once, and a stub of Triton 2.51 that has
    sent a response without returning would wait for the server forever.
    """
    if len(requests) == 1:
        return list(responses)
    for request, response in zip(requests, responses, strict=True):
        request.get_response_sender().send(response, flags=_LAST)
    return None


class Door:
    """The door of a model instance, by its name in Triton (``preprocess_0_0``), seen from the model."""

    def __init__(self, instance: str) -> None:
        self._state = _Shared(_path("door", instance), _STATE)
        self._taken = self._state.read()[0]
        self._work_per_s = math.inf
        self._show(time.monotonic())

    @contextmanager
    def closed(self, work: int) -> Iterator[None]:
        """Close the door while the block does ``work``."""
        began_s = time.monotonic()
        self._taken += work
        self._show(0.0)
        try:
            yield
        finally:
            ended_s = time.monotonic()
            self._work_per_s = work / max(ended_s - began_s, 1e-6)
            self._show(ended_s)

    def _show(self, idle_s: float) -> None:
        self._state.write(self._taken, idle_s, self._work_per_s)


class Doors:
    """The doors of all instances of ``model``, seen from the models before it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._sides: dict[str, _Outside] = {}
        self._looked_s = -math.inf

    def wait(self, work: int) -> None:
        """Wait until ``work`` may be sent."""
        ends_s = time.monotonic() + _LONGEST_S
        while self._look() and not any(side.admits(work) for side in self._sides.values()):
            if time.monotonic() > ends_s:
                return
            time.sleep(_POLL_S)

    def _look(self) -> bool:
        """Whether any doors exist; new ones are found within a second."""
        now_s = time.monotonic()
        if now_s - self._looked_s > 1.0:
            self._looked_s = now_s
            door = _path("door", "")
            for path in glob.glob(f"{door}{self._model}_*"):
                if path not in self._sides:
                    self._sides[path] = _Outside(path[len(door) :])
        return bool(self._sides)


class _Outside:
    """One door, seen from outside."""

    def __init__(self, instance: str) -> None:
        self._state = _Shared(_path("door", instance), _STATE)
        self._way = _Shared(_path("way", instance), _WAY)

    def admits(self, work: int) -> bool:
        """Whether ``work`` may be sent; if so, it counts as sent."""
        with self._way.locked():
            (taken, idle_s, work_per_s), (sent, last_s) = self._state.read(), self._way.read()
            now_s = time.monotonic()
            on_the_way = max(0, sent - taken)
            if idle_s and now_s - max(idle_s, last_s) > _ON_THE_WAY_S:
                on_the_way = 0
            if on_the_way and on_the_way + work > work_per_s * TURN_S:
                return False
            self._way.write(taken + on_the_way + work, now_s)
            return True
