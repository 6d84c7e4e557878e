"""Progress on stderr: a bar with rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """``report(done, note)``: how many units are done so far, and a few words beside the bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show ``done`` of the total."""


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Report]:
    """A progress bar for the body of the ``with`` statement; ``total`` None where the amount is not known."""
    if not sys.stderr.isatty():
        yield lambda done, note="": None
        return
    from rich import progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TextColumn("{task.fields[note]}"),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
    )
    with bar.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total, note="")

        def report(done: int, note: str = "") -> None:
            bars.update(task, completed=done, note=note)

        yield report


def log(message: str) -> None:
    """One line on stderr: what is being done. stdout is for results."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
