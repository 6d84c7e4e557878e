"""The command line: help without imports, one-line errors, exit codes, and a frozen set of options."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest

from clipship.core.cli import main as cli
from clipship.core.errors import CheckFailed, DataError


def test_help_lists_every_verb_and_imports_no_stage() -> None:
    script = (
        "import sys; from clipship.core.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'onnxruntime', 'tritonclient', 'pyarrow', 'clipship.training'} & set(sys.modules);"
        "sys.exit(code or bool(heavy))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert run.returncode == 0, run.stderr
    assert all(verb in run.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"clipship {verb}" in text
    assert "--json" in text


def test_an_unknown_verb_names_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clasify"]) == 2
    assert capsys.readouterr().err == "clipship: unknown verb 'clasify': did you mean classify?\n"


def test_an_unknown_command_of_a_verb_names_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vocab", "ad"]) == 2
    assert cli.main(["bench", "x"]) == 2
    assert capsys.readouterr().err == (
        "clipship: unknown command vocab ad: did you mean add?\nclipship: unknown command bench x: accepted: serve\n"
    )


@pytest.mark.parametrize("words", [[], ["vocab"], ["bench"]])
def test_a_group_without_a_command_prints_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert cli.main(words) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("no such\nfolder"), 2, "clipship: no such folder\n"),
        (CheckFailed("cosine 0.9"), 1, "clipship: cosine 0.9\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out.csv"), 1, "clipship: out.csv: no space left;"),
        (PermissionError(errno.EACCES, "Permission denied", "out.csv"), 2, "clipship: out.csv: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "clipship: torch is not installed: run pip"),
        (KeyboardInterrupt(), 130, "clipship: interrupted\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: fails)
    assert cli.main(["doctor"]) == code
    captured = capsys.readouterr().err.lstrip("\n")  # click ends the line that ^C is shown on
    assert captured.startswith(message)
    assert captured.count("\n") == 1


def test_a_programming_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: fails)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def commands() -> dict[str, click.Command]:
    """All commands by what stands before their options: a verb, or a group's verb and its own."""
    found: dict[str, click.Command] = {}
    for verb in cli.VERBS:
        command = cli.root.get_command(click.Context(cli.root), verb)
        assert command is not None
        parts = command.commands if isinstance(command, click.Group) else None
        found |= {verb: command} if parts is None else {f"{verb} {name}": parts[name] for name in sorted(parts)}
    return found


def options_of(command: click.Command) -> str:
    return " ".join(sorted(name for parameter in command.params for name in parameter.opts))


def test_every_part_of_a_group_has_help_with_an_example_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (words for words in commands() if " " in words):
        assert cli.main([*words.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert "Example" in text
        assert f"clipship {words}" in text
        assert "--json" in text


def test_the_set_of_options_is_frozen() -> None:
    pinned = (Path(__file__).parent / "options.txt").read_text()
    assert "".join(f"{words} {options_of(command)}\n" for words, command in commands().items()) == pinned, (
        "an option came or went: knobs live in recipes; where a new option is right, pin it in options.txt"
    )
