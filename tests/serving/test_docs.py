"""The commands of ``guides/serving.md`` and the programs of the serving documents, run on the tests' own server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipship.core.bundle import Bundle
from clipship.serving.server.process import Server
from tests.serving.processes import CLIPSHIP, ENVIRONMENT, ROOT

URL = "127.0.0.1:8001"


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "guides" / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Every command but those that do not end or are the shell's."""
    for line in "\n".join(blocks("serving.md", "sh")).splitlines():
        command = line.partition("#")[0].split()
        if command[:1] == ["clipship"] and command[1:] != ["serve", "repository"]:
            yield command[1:]


def programs() -> list[str]:
    """But those that name servers of others."""
    found = blocks("serving.md", "python") + blocks("client.md", "python")
    return [program for program in found if ".example" not in program]


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
@pytest.mark.parametrize("program", programs(), ids=["server", "client", "asyncio"])
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
