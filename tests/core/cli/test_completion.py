"""``python -m clipship``, and the shell's completion through Click."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clipship.core.cli.main import VERBS


def clipship(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipship", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_python_runs_the_package_as_a_command() -> None:
    done = clipship("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("clipship, version ")
    refused = clipship("packs")
    assert refused.returncode == 2
    assert refused.stderr == "clipship: unknown verb 'packs': did you mean pack?\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(shell: str) -> None:
    done = clipship(_CLIPSHIP_COMPLETE=f"{shell}_source")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_CLIPSHIP_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clipship ", tuple(VERBS)),
        ("clipship ve", ("verify",)),
        ("clipship pack --opset ", ("18", "20", "23")),
        ("clipship pack --prec", ("--precision",)),
        ("clipship vocab re", ("remove", "rename")),
        ("clipship no-verb --", ("--version", "--help")),
    ],
)
def test_verbs_options_and_choices_are_completed(line: str, expected: tuple[str, ...]) -> None:
    words = str(len(line.split(" ")) - 1)
    done = clipship(COMP_WORDS=line, COMP_CWORD=words, _CLIPSHIP_COMPLETE="bash_complete")
    assert (done.returncode, done.stderr) == (0, "")
    assert tuple(each.removeprefix("plain,") for each in done.stdout.split()) == expected
