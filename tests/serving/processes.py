"""Running the command line as a user does, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipship.serving.server.process import Server

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / stage) for stage in ("core", "serving"))}
CLIPSHIP = (sys.executable, "-m", "clipship")


def clipship(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``clipship`` to its end."""
    return subprocess.run(
        [*CLIPSHIP, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def python(program: str) -> str:
    """What a program in a fresh interpreter prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True).stdout


def children_of(pid: int) -> list[int]:
    """The processes that process ``pid`` has started, of all its threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text().split()]


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """In the block Triton, the guard's child, does nothing, as one that hangs."""
    (triton,) = children_of(server._process.pid)
    os.kill(triton, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(triton, signal.SIGCONT)
