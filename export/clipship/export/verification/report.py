"""A verification for people: a table on the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.comparison import Answers, Comparison, Verification, VerificationSamples
from clipship.core.files import write_text_atomic
from clipship.core.tables import Table

WORST_SHOWN = 12
"""Images on the page."""

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_HEADER = (
    *("", "inputs", "form", "runtime", "batch", "n"),
    *("cosine min", "mean", "centred min", "max diff", "top-1", "top-5", "logits"),
)
_UNMEASURED = "-"
_PLAIN_WIDTH = 240


def table_from_verification(verification: Verification) -> Table:
    """One row a comparison; a number that was not measured is a dash."""
    return Table(header=_HEADER, rows=tuple(map(_cells, verification.rows)), text_columns=4)


def text_from_verification(verification: Verification, *, width: int | None = None) -> str:
    """The table, what failed and why, and what was not compared.

    Args:
        width: of the terminal, for a table with colours and rules; None: plain text.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as Grid

    table = table_from_verification(verification)
    grid = Grid(box=SIMPLE if width else None, pad_edge=False, padding=(0, 1), header_style="bold")
    for place, title in enumerate(table.header):
        grid.add_column(title, justify="left" if place < table.text_columns else "right", overflow="fold")
    for row, cells in zip(verification.rows, table.rows, strict=True):
        grid.add_row(*cells, style="" if row else "red")
    console = Console(file=io.StringIO(), width=width or _PLAIN_WIDTH, force_terminal=bool(width), highlight=False)
    with console.capture() as captured:
        console.print(grid)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([*lines, *_remarks(verification)])


def _remarks(verification: Verification) -> list[str]:
    failed = [
        f"FAILED {row.what}, {_form(row)} on {row.provider}, batch {row.batch_size}: {'; '.join(row.failures)}"
        for row in verification.rows
        if not row
    ]
    references = sorted({row.reference for row in verification.comparisons} - {"PyTorch"})
    without = (f"without a checkpoint, images are compared with {one}, not with PyTorch" for one in references)
    return [*failed, *(f"not compared: {reason}" for reason in verification.skipped), *without]


def _form(row: Comparison | Answers) -> str:
    return row.form if isinstance(row, Comparison) else row.model


def _cells(row: Comparison | Answers) -> tuple[str, ...]:
    sizes = (str(row.batch_size), str(row.count))
    about = ("ok" if row else "FAILED", row.what, _form(row), row.provider, *sizes)
    classes = (_share(row.top1_agreement, row.top1_excused), _number(100 * row.top5_agreement, ".1f"))
    if isinstance(row, Answers):
        difference = f"{_number(row.max_score_difference, '.1e')} (scores)"
        return (*about, *(_UNMEASURED,) * 3, difference, *classes, _UNMEASURED)
    cosines = (row.min_cosine, row.mean_cosine, row.min_centred_cosine)
    numbers = (*(_number(cosine, ".6f") for cosine in cosines), _number(row.max_abs, ".1e"))
    return (*about, *numbers, *classes, _number(row.max_logit_difference, ".1e"))


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else _UNMEASURED


def _share(agreement: float, excused: float) -> str:
    """The raw agreement in per cent, and what was excused of the rest."""
    raw = _number(100 * agreement, ".1f")
    return f"{raw} (+{100 * excused:.1f} ties)" if excused else raw


def worst_images(
    verification: Verification, samples: Sequence[VerificationSamples], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The images that differ most, each where it differs most, worst first, for the page."""
    by_what = {one.what: one for one in samples}
    found = [(worst, row) for row in verification.comparisons if row.what in by_what for worst in row.worst]
    shown: dict[str, dict[str, Any]] = {}
    for worst, row in sorted(found, key=lambda pair: pair[0].cosine):
        sample = by_what[row.what]
        name = f"{row.what}: {sample.names[worst.position]}"
        if name not in shown and len(shown) < WORST_SHOWN:
            shown[name] = {
                "name": name,
                "source": _data_uri(sample.pixels[worst.position]),
                "cosine": worst.cosine,
                "where": f"{row.form}, {row.provider}, batch {row.batch_size}",
                "passed": bool(row),
                "expected": [names[place] for place in worst.expected],
                "given": [names[place] for place in worst.given],
            }
    return list(shown.values())


def write_page(path: Path, bundle: Bundle, verification: Verification, samples: Sequence[VerificationSamples]) -> None:
    """Write the page to ``path``, whole or not at all; its text is escaped, its images are inside it."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    table = table_from_verification(verification)
    page = template.render(
        bundle=bundle.path.name,
        digest=bundle.digest,
        base_model=bundle.manifest.base_model,
        method=bundle.manifest.method,
        classes=len(bundle.vocabulary),
        passed=bool(verification),
        failed=sum(not row for row in verification.rows),
        count=len(verification.rows),
        table=table,
        verdicts=[bool(row) for row in verification.rows],
        remarks=_remarks(verification),
        worst=worst_images(verification, samples, bundle.vocabulary.names),
    )
    write_text_atomic(path, page)


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
