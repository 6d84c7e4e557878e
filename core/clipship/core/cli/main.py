"""``clipship VERB ...``: the verbs, each of which imports its stage when it is called.

stdout is the result (JSON with ``--json``), stderr the log. Exit codes: 0 done, 1 a check failed, 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from clipship.core.errors import ClipshipError, MissingExtraError, UsageError, near
from clipship.core.machine.caches import settle_home

VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("clipship.core.cli.doctor:doctor", "What this machine has, what is missing and how to get it."),
    "world": ("clipship.world.cli:world", "Write the built-in data sets."),
    "synthesize": ("clipship.training.synthesis.cli:synthesize", "Make images of classes: text-to-image, filtered."),
    "recipes": ("clipship.training.cli:recipes", "List the recipes of synthesis and of training."),
    "train": ("clipship.training.cli:train", "Learn prompts: recipe + data -> checkpoint."),
    "evaluate": ("clipship.training.cli:evaluate", "Base, new, harmonic mean and open-vocabulary accuracy."),
    "compare": ("clipship.training.compare.cli:compare", "Methods x data sets x seeds: table, plots, one HTML page."),
    "pack": ("clipship.export.cli:pack", "Checkpoint + vocabulary -> verified ONNX bundle."),
    "engine": ("clipship.export.tensorrt.cli:engine", "Bundle -> TensorRT plan for the GPUs you name."),
    "verify": ("clipship.export.cli:verify", "Compare a bundle with its golden samples and your images."),
    "vocab": ("clipship.export.vocab.cli:vocab", "List, add, remove, rename, compare class names, without PyTorch."),
    "repository": ("clipship.serving.cli:repository", "Bundle -> Triton model repository."),
    "serve": ("clipship.serving.cli:serve", "Run a real Triton on a model repository."),
    "classify": ("clipship.serving.jobs.cli:classify", "Classify images in batches, over gRPC or in this process."),
    "bench": ("clipship.serving.bench.cli:bench", "Throughput and latency of a server beside the in-process engine."),
}
"""Every verb: where its command lives, and its line in ``clipship --help``."""

PARTS: dict[str, tuple[str, ...]] = {
    "vocab": ("clipship.serving.publish.cli:publish", "clipship.serving.publish.cli:rollback")
}
"""By verb, its subcommands of another stage."""

CALLS: dict[str, str] = {"verify_server": "clipship.serving.verify_server:verify_server"}
"""Functions that a verb calls in a stage that its own stage does not import."""


class VerbGroup(click.Group):
    """A group that names the near ones where a command is unknown."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; while the shell completes a line, None for an unknown one.

        Raises:
            UsageError: there is no such command.
        """
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:
            raise UsageError(f"unknown command {ctx.info_name} {cmd_name}: {near(cmd_name, self.commands)}")
        return command


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that ``--help`` and the client start at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the line, not of the alphabet."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's command."""
        if cmd_name not in VERBS and ctx.resilient_parsing:  # the shell completes a line
            return None
        if cmd_name not in VERBS:
            raise UsageError(f"unknown verb {cmd_name!r}: {near(cmd_name, VERBS)}")
        command: click.Command = _attribute_at(VERBS[cmd_name][0])
        for part in PARTS.get(cmd_name, ()):
            assert isinstance(command, click.Group)
            command.add_command(_attribute_at(part))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs and their lines, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


def other_stage(name: str) -> Callable[..., Any]:
    """The function ``name`` of :data:`CALLS`."""
    function: Callable[..., Any] = _attribute_at(CALLS[name])
    return function


def _attribute_at(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="clipship")
def root() -> None:
    """Adapt CLIP with learned prompts, export it, serve it on Triton, classify in batches.

    Example: clipship world --out world && clipship train sync-clip-tiny --data world/prints --out runs/prints
    """
    settle_home()


def option_group(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several ``click.option`` as one decorator, in the order of the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return decorate


def emit(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a verb's result on stdout: ``result`` as one JSON object, or ``text`` for people."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
"""Every verb takes it."""


def require_packages(extra: str, *packages: str) -> None:
    """Validate that ``packages`` can be imported, before anything else is done.

    Raises:
        MissingExtraError: one cannot; names the ``extra`` that has it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, extra) from error


def existing_folder(value: str | Path, what: str) -> Path:
    """``value`` as a folder that exists.

    Raises:
        UsageError: it does not exist, or is no folder.
    """
    path = Path(value)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder: give {what}")
    return path


def _line(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for an exception a user may meet."""
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, ClipshipError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'the disk'}: no space left; nothing half-written was kept: free some space", 1
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return "no folder for temporary files can be written: set TMPDIR or CLIPSHIP_CACHE to one that can", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or error}: check the path and its permissions", 2
    assert isinstance(error, ImportError)
    missing = MissingExtraError(error.name or str(error), "all")
    return str(missing), missing.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: the process's own) and return the exit code."""
    try:
        root.main(args=list(arguments) if arguments is not None else None, prog_name="clipship", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as bare:
        click.echo(bare.format_message(), err=True)
        return bare.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("clipship: interrupted", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (ClipshipError, click.ClickException, OSError, ImportError) as error:
        message, code = _line(error)
        click.echo(f"clipship: {' '.join(message.split())}", err=True)
        return code
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
