"""Runs a command until its parent ends, then ends it with all its descendants.

Run as a file, with the standard library only: ``python supervisor.py GRACE_S SHM_PREFIX COMMAND...``. Standard input
is a pipe that the parent holds open. When it closes, also because the parent was killed, the command gets SIGTERM,
after ``GRACE_S`` seconds SIGKILL, and its files in ``/dev/shm`` with the prefix are deleted.
The exit code is the command's, or 128 + the number of the signal that ended it. When the supervisor itself is
killed, the kernel kills the command.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Start the command, wait for its end or the parent's, clean up."""
    grace_s, shm_prefix, command = float(arguments[0]), arguments[1], arguments[2:]
    starter = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become our children
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prepare_child(libc))
    try:
        _wait_for_either(process, starter)
        code = stop(process, grace_s)
        return code if code >= 0 else 128 - code
    finally:
        _kill_orphans()
        _remove_shared_memory(shm_prefix)


def _prepare_child(libc: ctypes.CDLL) -> None:
    """In the child, before the command runs: die with the supervisor, and handle signals again."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for restored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(restored, signal.SIG_DFL)


def _wait_for_either(process: subprocess.Popen[bytes], starter: int) -> None:
    """Return when the command has ended, the pipe is closed, or the parent has ended (a fork may hold the pipe)."""
    while process.poll() is None and os.getppid() == starter:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, 1):
            return


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """End the command, with SIGTERM first; its exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _kill_orphans() -> None:
    """Kill and reap all remaining descendants, which are children of this subreaper."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        time.sleep(0.01)


def _remove_shared_memory(prefix: str) -> None:
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
