"""Pixels for a server on the same machine, in POSIX shared memory: copied once, not sent.

Triton's system shared memory extension: the client creates a region, the server maps it when it is registered, and a
request names the region instead of carrying the bytes. The region's file is unlinked as soon as the server has mapped
it, so no file stays in ``/dev/shm``, however the client ends. Regions that a killed client leaves registered are
unregistered by the next client on the same machine.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipship.serving.errors import ServingError

_FOLDER = Path("/dev/shm")
_PREFIX = "clipship-client"
_log = logging.getLogger(__name__)


class Caller(Protocol):
    """The part of a transport that manages regions."""

    url: str

    def call(self, method: str, **fields: Any) -> Any:
        """Call one of the protocol's methods; raises ServingError."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A registered region."""

    name: str
    size_bytes: int
    memory: mmap.mmap

    def hold(self, array: NDArray[Any]) -> None:
        """Copy ``array`` into the region."""
        np.copyto(np.ndarray(array.shape, array.dtype, buffer=self.memory), array)


def registered(server: Caller, size_bytes: int) -> Slot:
    """A new region that ``server`` has mapped; its file is already unlinked.

    Raises:
        ServingError: the server refuses: it lacks the extension, or runs on another machine or in a container.
        OSError: ``/dev/shm`` is full.
    """
    name = f"{_PREFIX}.{_namespace()}.{os.getpid()}.{_started(os.getpid())}.{uuid.uuid4().hex[:12]}"
    file = _FOLDER / name
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)  # a full /dev/shm is an error here, not a signal later
        memory = mmap.mmap(descriptor, size_bytes)
        server.call("SystemSharedMemoryRegister", name=name, key=f"/{name}", byte_size=size_bytes)
    finally:
        os.close(descriptor)
        file.unlink(missing_ok=True)
    return Slot(name=name, size_bytes=size_bytes, memory=memory)


def unregister(server: Caller, name: str) -> None:
    """Have ``server`` unmap a region.

    Raises:
        ServingError: the region is unknown, or still in use.
    """
    server.call("SystemSharedMemoryUnregister", name=name)


class SharedSlots:
    """The regions of one client at one server: one for each request in flight, created on demand."""

    def __init__(self, server: Caller) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._free: list[Slot] = []
        self._all: dict[str, Slot] = {}
        self._forgotten: set[str] = set()
        self._on = True
        self._is_clean = False

    def lend(self, array: NDArray[Any]) -> Slot | None:
        """A region with a copy of ``array``; None if the server or this machine refuses, which is logged once."""
        slot = self._take(array.nbytes)
        if slot is None and self._on:
            slot = self._made(array.nbytes)
        if slot is not None:
            slot.hold(array)
        return slot

    def give_back(self, slots: list[Slot]) -> None:
        """Make ``slots`` available again: the requests that used them have ended."""
        with self._lock:
            self._free += [slot for slot in slots if slot.name in self._all]

    def forget(self, slots: list[Slot]) -> None:
        """Stop using all regions: the server no longer knows ``slots``, so it has restarted and lost the others too.

        A region registered since the restart is not used again either; :meth:`close` unregisters it.
        """
        with self._lock:
            if any(slot.name in self._all for slot in slots):
                self._forgotten |= self._all.keys()
                self._all.clear()
                self._free.clear()

    def close(self) -> None:
        """Unregister the regions, if the server still runs."""
        with self._lock:
            names, self._on = [*self._all, *self._forgotten], False
            self._all.clear()
            self._forgotten.clear()
            self._free.clear()
        try:
            for name in names:
                unregister(self._server, name)
        except ServingError as error:
            _log.debug("%s: regions stay registered: %s", self._server.url, error)

    def _take(self, size_bytes: int) -> Slot | None:
        with self._lock:
            for position, slot in enumerate(self._free):
                if slot.size_bytes >= size_bytes:
                    return self._free.pop(position)
            too_small = self._free.pop() if self._free else None
            if too_small is not None:
                del self._all[too_small.name]
        if too_small is not None:
            self._unregister_quietly(too_small.name)
        return None

    def _made(self, size_bytes: int) -> Slot | None:
        try:
            if not self._is_clean:
                self._unregister_dead_clients()
            slot = registered(self._server, max(size_bytes, mmap.PAGESIZE))
        except (ServingError, OSError) as error:
            with self._lock:
                was_on, self._on = self._on, False
            if was_on:
                _log.warning("%s: no shared memory, pixels are sent instead: %s", self._server.url, error)
            return None
        with self._lock:
            self._all[slot.name] = slot
        return slot

    def _unregister_dead_clients(self) -> None:
        """Unregister the regions of dead clients of this machine."""
        self._is_clean = True
        for name in self._server.call("SystemSharedMemoryStatus").regions:
            prefix, *rest = name.split(".")
            if prefix == _PREFIX and len(rest) == 4 and rest[0] == _namespace() and _started(int(rest[1])) != rest[2]:
                self._unregister_quietly(name)

    def _unregister_quietly(self, name: str) -> None:
        try:
            unregister(self._server, name)
        except ServingError as error:
            _log.debug("%s: %s stays registered: %s", self._server.url, name, error)


def _namespace() -> str:
    """The boot and the PID namespace: process ids mean nothing in another container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").partition("-")[0]
    return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"


def _started(process: int) -> str | None:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat); None if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
