"""Tables as data: what a benchmark, a comparison or a check prints, as Markdown for people and documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.core.machine.processor import this_processor
from clipship.core.machine.runtimes import available_cores


def machine() -> str:
    """What figures were measured on: "AMD EPYC 7763 (avx2 fma), 2 cores"; the cores are those this process may use."""
    cores = available_cores()
    return f"{this_processor()}, {cores} core{'s' * (cores > 1)}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text."""

    title: str = ""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Footnotes, in the order of their marks [1], [2]..."""
    text_columns: int = 2
    """How many columns, from the first, are names; the others are aligned to the right."""

    def to_markdown(self) -> str:
        """A heading if there is a title, the table, its notes."""
        rule = ["---" if number < self.text_columns else "---:" for number in range(len(self.header))]
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in (self.header, rule, *self.rows)]
        notes = [f"[{number}] {note}" for number, note in enumerate(self.notes, start=1)]
        title = (f"### {self.title}", "") if self.title else ()
        return "\n".join([*title, *lines, *(("", *notes) if notes else ()), ""])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def with_spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median and, in brackets, the smallest and the largest: "1.37 (1.30-1.52)"."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def write_table(folder: Path, name: str, rows: Sequence[dict[str, Any]], table: Table) -> None:
    """``name``.json with all that was measured and ``name``.md with the table, each whole or not at all."""
    write_json_atomic(folder / f"{name}.json", rows)
    write_text_atomic(folder / f"{name}.md", table.to_markdown())
