"""``clipship compare``: methods x data sets x seeds, and the report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, json_option
from clipship.core.cli.multi_value_option import MultiValueCommand
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.core.progress import log

if TYPE_CHECKING:
    from clipship.training.compare.grid import Grid
    from clipship.training.compare.launcher import Rank
    from clipship.training.compare.results import RunResult

_option = partial(click.option, show_default=True)


@click.command(cls=MultiValueCommand)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@_option(
    *("--data", "data"),
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR...",
    help="Data sets; for cross-dataset the source first.",
)
@_option(
    "--seeds", multiple=True, type=click.IntRange(min=0), default=(1, 2, 3), show_default="1 2 3", metavar="INT..."
)
@_option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the runs and the report.")
@_option(
    "--protocol",
    type=click.Choice(["base-to-new", "few-shot", "cross-dataset"]),
    default="base-to-new",
    help="Which classes are learned and which are tested.",
)
@_option(
    "--shots",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="INT...",
    help="Real images a class; default: the recipe's, 1 2 4 8 16 for few-shot.",
)
@_option("--synthetic-name", default="synthetic", help="Folder of synthetic images in each DIR.")
@_option(
    "--synthetic-shots",
    multiple=True,
    type=click.IntRange(min=0),
    metavar="INT...",
    help="Synthetic images a class, such as 0 1 2 4 8 16; default: all kept ones.",
)
@_option(
    "--synthetic-filter",
    type=click.Choice(["on", "off", "both"]),
    default="on",
    help="Take the best by CLIP score, the first by seed, or compare both.",
)
@_option("--jobs", type=click.IntRange(min=1), default=1, help="Runs at the same time.")
@_option("--device", help="A torch device; default: the GPUs if there are any.")
@_option("--workers", type=click.IntRange(min=0), default=0, help="Processes in each run that prepare images.")
@json_option
def compare(
    recipes: tuple[str, ...],
    out: Path,
    synthetic_name: str,
    jobs: int,
    device: str | None,
    workers: int,
    as_json: bool,
    **request: Any,
) -> None:
    """Train every RECIPE on every data set with every seed, and write tables, plots and one HTML page to OUT.

    Killed and started again, it resumes. Under torchrun or accelerate launch each process does its share of the runs,
    and the last one to end writes the report. Exit code 1 if a run failed; the others are kept.

    Example: clipship compare zero-shot-tiny coop-tiny --data world/prints world/neon --seeds 1 2 3 --out comparison
    """
    from clipship.training.requirements import needs_training, validated_device

    started_s = time.time()
    _require_report_packages()
    with needs_training():
        from clipship.training.compare.grid import GridRequest, grid_of
        from clipship.training.compare.launcher import alone_in, launched_rank
        from clipship.training.compare.results import ended_result, forget_failures
    with launched_rank(os.environ) as rank:
        grid = grid_of(GridRequest(recipes=recipes, out=out, synthetic=synthetic_name, **request))
        device = validated_device(device)
        with alone_in(out, rank):
            forget_failures(grid.runs, before_s=started_s)
            _do_share(grid, rank, jobs=jobs, device=device, workers=workers)
    results = [result for run in grid.runs if (result := ended_result(run)) is not None]
    if len(results) < len(grid.runs):
        left = len(grid.runs) - len(results)
        log(f"other processes have not ended {left} run{'s' * (left > 1)}: the last one writes the report")
        return
    failed = sum(bool(one.error) for one in results)
    content, text = write_report(grid, results)
    emit(content, f"{text}\n{out / 'report.html'}", as_json=as_json)
    if failed:
        raise CheckFailed(f"{failed} of {len(results)} runs failed: the table says why; start again to retry them")


def _require_report_packages() -> None:
    """Check before hours of training that the report can be written.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "training")


def _do_share(grid: Grid, rank: Rank, *, jobs: int, device: str | None, workers: int) -> None:
    """Do the runs of this process that have not ended."""
    from clipship.training.compare.results import finished_result
    from clipship.training.compare.workers import do_runs

    share = rank.share(grid.runs)
    left = [run for run in share if finished_result(run) is None]
    left.sort(key=lambda run: grid.request.seeds.index(run.config.seed))  # a whole table after the first seed
    done = len(share) - len(left)
    log(f"{len(grid.runs)} runs" + (f", {done} of them are done already" if done else ""))
    for _ in do_runs(left, jobs=jobs, device=device, loader_workers=workers, first_gpu=rank.local * jobs):
        pass


def write_report(grid: Grid, results: Sequence[RunResult]) -> tuple[dict[str, Any], str]:
    """Write results.json, table.md, plots/ and report.html; returns the JSON and the Markdown."""
    from clipship.training.compare.page import page_of
    from clipship.training.compare.plots import plots_of, standalone
    from clipship.training.compare.report import how_made, json_of, markdown_of, tables_of
    from clipship.training.compare.summary import Summary

    request = grid.request
    summary = Summary(
        protocol=request.protocol, recipes=request.recipes, datasets=grid.datasets, results=tuple(results)
    )
    tables, plots, versions = tables_of(summary), plots_of(summary), environment()
    content, text = json_of(summary, versions), markdown_of(summary, tables)
    page = page_of(f"Comparison: {request.protocol}", how_made(summary), tables, plots, versions)
    write_json_atomic(request.out / "results.json", content)
    write_text_atomic(request.out / "table.md", text)
    for name, svg in plots.items():
        write_text_atomic(request.out / "plots" / f"{name}.svg", standalone(svg))
    write_text_atomic(request.out / "report.html", page)
    return content, text


def environment() -> dict[str, str]:
    """The versions and the machine that made the report."""
    import torch

    from clipship.training.checkpoint import tool_versions

    gpu = {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}
    return {**tool_versions(), "machine": f"{platform.system()} {platform.machine()}", **gpu}
