"""Reports: Markdown tables, JSON and a plot.

The plot needs matplotlib, which the base install lacks.
"""

from __future__ import annotations

import importlib.util
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.core.tables import Table, with_spread
from clipship.serving.bench.load import PERCENTILES
from clipship.serving.bench.run import BenchRow
from clipship.serving.bench.steps import PHASES

_LATENCIES = tuple(f"p{rank}" for rank in PERCENTILES)
_SHORT = dict(zip(PHASES, ("queue", "in", "run", "out"), strict=True))
_MARKERS = "osD^vPX*"
_SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "clipship", "text.parse_math": False}


def throughput_table(rows: Sequence[BenchRow], title: str) -> Table:
    """One row per point: rate, latencies, and ratios to the engine in process and to bare requests."""
    cells = [
        (
            *(row.point.where, row.point.mode, str(row.point.batch), str(row.point.concurrency)),
            with_spread(row.rates, ".1f"),
            *(_number(row.latency_ms(name)) for name in _LATENCIES),
            *(_share(row, rows, "in process"), _share(row, rows, "server") if row.point.where == "client" else ""),
        )
        for row in rows
    ]
    latencies = [f"{name} ms" for name in _LATENCIES]
    header = ("where", "mode", "batch", "in flight", "images/s", *latencies, "of in process", "of bare requests")
    notes = (
        "A closed loop: that many requests are always in flight. images/s: median (smallest-largest) of the rounds.",
        "Shares are ratios within a round; in process runs one batch of that size after the other, on as many threads.",
    )
    return Table(title=title, header=header, rows=tuple(cells), notes=notes)


def steps_table(rows: Sequence[BenchRow]) -> Table:
    """One row per point on the server: the share of each ensemble step in a request's latency."""
    found = [(row.point, steps) for row in rows if (steps := row.middle().steps) is not None]
    models = list(dict.fromkeys(step.model for _, parts in found for step in parts.steps))
    cells = []
    for point, parts in found:
        by_model, shares = {step.model: step for step in parts.steps}, parts.shares()
        each = [_step_cell(by_model.get(model), shares) for model in models]
        rest = [f"{shares[name]:.1%}" for name in ("between", "outside")]
        images = "/".join(f"{step.images_a_run:.1f}" for step in parts.steps)
        numbers = (str(point.batch), str(point.concurrency), f"{parts.latency_ms:.1f}")
        cells.append((point.mode, *numbers, *each, *rest, images))
    header = ("mode", "batch", "in flight", "mean ms", *models, "between", "outside", "images a run")
    notes = (
        f"Of a step: {', '.join(_SHORT.values())} = waiting in its queue, gathering inputs, computing (an admission:"
        " waiting for the next model), giving outputs.",
        "outside: the wire, the client, and the server's reading and writing. images a run: by step, after batching.",
    )
    return Table(title="Where a request's time goes", header=header, rows=tuple(cells), notes=notes, text_columns=1)


def _step_cell(step: Any, shares: dict[str, float]) -> str:
    """ "31.0% queue 2.1% in ..." without the parts under a thousandth."""
    if step is None:
        return "-"
    parts = [(shares[f"{step.model}.{phase}"], name) for phase, name in _SHORT.items()]
    parts.append((step.cached, "of requests from the cache"))
    return " ".join(f"{share:.1%} {name}" for share, name in parts if share >= 0.001) or "0%"


def _share(row: BenchRow, rows: Sequence[BenchRow], where: str) -> str:
    """The ratio to the same images in process, or on the server at the same concurrency."""
    point = row.point
    mode = "pixels" if where == "in process" and point.mode == "shm" else point.mode
    for other in rows:
        same = (other.point.where, other.point.mode, other.point.batch) == (where, mode, point.batch)
        if same and other is not row and (where == "in process" or other.point.concurrency == point.concurrency):
            return with_spread([a / b for a, b in zip(row.rates, other.rates, strict=True)])
    return ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write_report(folder: Path, rows: Sequence[BenchRow], tables: Sequence[Table], about: dict[str, Any]) -> list[Path]:
    """Write ``serve.json``, ``serve.md`` and, if matplotlib is installed, ``serve.svg``, each atomically.

    Raises:
        OSError: the disk is full, or ``folder`` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "serve.json", [{**about, **row.to_json()} for row in rows])
    write_text_atomic(folder / "serve.md", "\n".join(table.to_markdown() for table in tables))
    written = [folder / "serve.json", folder / "serve.md"]
    if importlib.util.find_spec("matplotlib") is not None:
        write_text_atomic(folder / "serve.svg", plot(rows))
        written.append(folder / "serve.svg")
    return written


def plot(rows: Sequence[BenchRow]) -> str:
    """SVG: throughput, and median and 99th percentile of latency, by requests in flight.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines: dict[str, list[BenchRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.point.concurrency):
        if row.point.where == "server":
            lines[f"{row.point.mode}, batch {row.point.batch}"].append(row)
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, line) in enumerate(lines.items()):
            look = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
            at = [row.point.concurrency for row in line]
            left.plot(at, [median(row.rates) for row in line], label=name, **look)
            right.plot(at, [row.latency_ms("p50") for row in line], **look)
            right.plot(at, [row.latency_ms("p99") for row in line], linestyle="--", **look)
        left.set(title="Throughput", ylabel="images per second", ylim=(0, None))
        right.set(title="Latency: median, dashed 99th percentile", ylabel="milliseconds per request", yscale="log")
        for axes in (left, right):
            axes.set_xlabel("requests in flight")
            axes.grid(alpha=0.2)
        left.legend(fontsize=7, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
