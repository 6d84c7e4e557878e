"""Files that are whole or absent: everything is written beside its place and renamed into it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipship.core.errors import UsageError

_CHUNK_BYTES = 1 << 20
_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def locked_file(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lock the file ``path``, which is created; wait for another process's lock after calling ``waiting``.

    The kernel releases the lock when this process ends, also by a kill.
    """
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_folder(folder: Path, refusal: str) -> Iterator[None]:
    """Lock ``folder`` against other processes; the kernel releases the lock when this process ends, also by a kill.

    Args:
        folder: an existing folder. :func:`replace_folder` makes another one of it, without the lock.
        refusal: the error message after the folder's name.

    Raises:
        UsageError: another process has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), folder.stat()):  # replaced between opening and locking it
                raise BlockingIOError
        except BlockingIOError as error:
            raise UsageError(f"{folder}: {refusal}") from error
        yield
    finally:
        os.close(descriptor)


def _sibling(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner_is_running(name: str) -> bool:
    """Whether the process named in a ``.NAME.PID-HEX.part`` left-over still runs."""
    pid = name.rsplit(".", 2)[1].split("-")[0]
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def remove_leftovers(final: Path) -> None:
    """Delete what killed runs left beside ``final`` while they wrote it."""
    for path in final.parent.glob(f".{final.name}.*-*.part"):
        if not _owner_is_running(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _exchange(first: Path, second: Path) -> None:
    """Swap two paths of one file system atomically (Linux ``renameat2``; elsewhere two renames)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        aside = _sibling(second)
        os.replace(second, aside)
        os.replace(first, second)
        os.replace(aside, first)
        return
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


@contextmanager
def replace_file(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``final``; on success it is flushed to disk and renamed to ``final``.

    On any exception the temporary file is removed and ``final`` is left as it was.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    temporary = _sibling(final)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
        _sync_folder(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``final``; on success it takes ``final``'s place.

    An older ``final`` is exchanged with the new folder in one system call and deleted afterwards, so that a kill at any
    moment leaves the old or the new folder whole under the final name.

    Raises:
        OSError: the disk is full, or the parent folder cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    temporary = _sibling(final)
    temporary.mkdir()
    try:
        yield temporary
        if final.exists():
            _exchange(temporary, final)
        else:
            os.replace(temporary, final)
        _sync_folder(final.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` whole or not at all."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON to ``path`` whole or not at all."""
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_record(
    path: Path, *, record_format: str, version: int | tuple[int, ...], error: type[UsageError], advice: str
) -> dict[str, Any]:
    """The JSON object at ``path``, whose ``format`` and ``format_version`` must be the given ones, or one of them.

    Raises:
        error: not JSON, no object, or another format or version; the message ends in ``advice``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:  # JSONDecodeError and UnicodeDecodeError
        raise error(f"{path}: not JSON ({cause}): {advice}") from cause
    given = (content.get("format"), content.get("format_version")) if isinstance(content, dict) else (None, None)
    versions = version if isinstance(version, tuple) else (version,)
    if given[0] != record_format or given[1] not in versions:
        accepted = " or ".join(map(str, versions))
        raise error(
            f"{path}: format {given[0]!r} version {given[1]!r} is not {record_format!r} version {accepted}: {advice}"
        )
    record: dict[str, Any] = content
    return record


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """The SHA-256 of ``data``, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_text(text: str) -> str:
    """The SHA-256 of ``text`` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
