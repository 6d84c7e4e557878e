"""The commands and programs of ``docs/serving.md``, run as they stand against the tests' own server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipship.core.bundle import Bundle
from clipship.serving.server import Server
from tests.serving.processes import CLIPSHIP, ENVIRONMENT, ROOT

DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
URL = "127.0.0.1:8001"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Every command but the one that does not end."""
    for block in blocks("sh"):
        for line in block.splitlines():
            if line != "clipship serve repository":
                assert line.startswith("clipship ")
                yield line.split()[1:]


@pytest.fixture
def folder(bundle: Bundle, photos: Path, tmp_path: Path) -> Path:
    """Where the documents' relative paths hold."""
    (tmp_path / "bundle").symlink_to(bundle.path)
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


@pytest.mark.triton
def test_the_commands(folder: Path, server: Server) -> None:
    ran = 0
    for arguments in commands():
        here = [server.endpoints.url if argument == URL else argument for argument in arguments]
        done = subprocess.run(
            [*CLIPSHIP, *here], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        ran += 1
    assert ran == 4
    assert (folder / "results.parquet").exists()


@pytest.mark.triton
@pytest.mark.parametrize("program", blocks("python"), ids=["client", "server"])
def test_the_programs(folder: Path, server: Server, program: str) -> None:
    here = program.replace(URL, server.endpoints.url)
    done = subprocess.run(
        [sys.executable, "-c", here], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_error_tree_of_the_readme_is_the_code() -> None:
    """The classes, in the order of the module's own drawing."""
    readme = (ROOT / "serving" / "README.md").read_text(encoding="utf-8")
    code = (ROOT / "serving/clipship/serving/errors.py").read_text(encoding="utf-8")
    drawn = readme.split("## Errors")[1]
    for name in re.findall(r"^class (\w+)", code, re.MULTILINE):
        assert name in drawn
