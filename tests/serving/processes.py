"""Running the command line as a user does, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / stage) for stage in ("core", "serving"))}
CLIPSHIP = (sys.executable, "-m", "clipship.core")


def clipship(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``clipship`` to its end."""
    return subprocess.run(
        [*CLIPSHIP, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def python(program: str) -> str:
    """What a program in a fresh interpreter prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True).stdout
