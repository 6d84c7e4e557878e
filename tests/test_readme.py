"""The README's commands, run as they stand. The other documents: ``test_documentation.py``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_below(heading: str, language: str) -> str:
    section = README.split(f"{heading}\n", 1)[1]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found.group(1)


CALIBRATED = block_below("**In PyTorch, without a server**, with calibrated probabilities:", "python")


def test_setup_is_two_commands_of_the_makefile() -> None:
    commands = [line.split("#")[0].split() for line in block_below("# clipship", "sh").splitlines()]
    assert [command[0] for command in commands] == ["make", "make"]
    makefile = (ROOT / "Makefile").read_text()
    for _, target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.triton
@pytest.mark.timeout(900)
def test_the_line_runs_as_it_stands(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    lines = block_below("## The line", "sh").splitlines()
    assert [line.split()[1] for line in lines][-2:] == ["serve", "classify"]
    for line in lines[:-2]:
        subprocess.run(line, shell=True, cwd=tmp_path, env=environment, check=True, timeout=600)
    command = f"exec {lines[-2].removesuffix('&')} --http-port 0 --metrics-port 0"
    server = subprocess.Popen(command, shell=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert "ready" in server.stdout.readline()
        subprocess.run(lines[-1], shell=True, cwd=tmp_path, env=environment, check=True, timeout=600)
        printed = [
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=tmp_path,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for program in (python_example(), CALIBRATED)
        ]
        assert "label='black fish', probability=" in printed[1]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
        server.stdout.close()
    assert (tmp_path / "results.parquet").stat().st_size > 10_000


def python_example() -> str:
    """The README's Python, checked to have classified something."""
    return block_below("**From Python**:", "python") + "\nassert result.label and result.error is None\n"
