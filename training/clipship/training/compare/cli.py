"""``clipship compare``: methods x data sets x seeds, and the report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
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


@click.command(cls=MultiValueCommand)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option(
    *("--data", "data"),
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR...",
    help="Data sets; for cross-dataset the source first.",
)
@click.option(
    "--seeds", multiple=True, type=click.IntRange(min=0), default=(1, 2, 3), show_default="1 2 3", metavar="INT..."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the runs and the report.")
@click.option(
    "--protocol",
    type=click.Choice(["base-to-new", "few-shot", "cross-dataset"]),
    default="base-to-new",
    show_default=True,
    help="Which classes are learned, and what is classified.",
)
@click.option(
    "--shots",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="INT...",
    help="Real images a class; default: the recipe's, 1 2 4 8 16 for few-shot.",
)
@click.option(
    "--synthetic-name", default="synthetic", show_default=True, help="Folder of synthetic images in each DIR."
)
@click.option(
    "--synthetic-shots",
    multiple=True,
    type=click.IntRange(min=0),
    metavar="INT...",
    help="Synthetic images a class, such as 0 1 2 4 8 16; default: all kept ones.",
)
@click.option(
    "--synthetic-filter",
    type=click.Choice(["on", "off", "both"]),
    default="on",
    show_default=True,
    help="Those with CLIP's best scores, the first by seed, or each in turn.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--device", help="A torch device; default: the GPUs if there are any.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Distributed a run that prepare images."
)
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

    Killed and started again it goes on where it was. Under torchrun or accelerate launch each process takes its share
    of the runs. The exit code is 1 if a run failed; the others are kept.

    Example: clipship compare zero-shot-tiny coop-tiny --data world/prints world/neon --seeds 1 2 3 --out comparison
    """
    from clipship.training.requirements import needs_training, validated_device

    _require_report_packages()
    with needs_training():
        from clipship.training.compare.grid import Request, plan_of
        from clipship.training.compare.launcher import alive, rank_of
    with rank_of(os.environ) as rank:
        plan = plan_of(Request(recipes=recipes, out=out, synthetic=synthetic_name, **request))
        device = validated_device(rank.device(device))
        with alive(out, rank):
            results = _results(plan, rank, jobs=jobs, device=device, workers=workers)
    if rank.is_first:
        failed = sum(bool(one.error) for one in results)
        content, text = write_report(plan, results)
        emit(content, f"{text}\n{out / 'report.html'}", as_json=as_json)
        if failed:
            raise CheckFailed(f"{failed} of {len(results)} runs failed: the table says why; start again to retry them")


def _require_report_packages() -> None:
    """Say before hours of training, and not after them, that the report cannot be written.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "training")


def _results(plan: Grid, rank: Rank, *, jobs: int, device: str | None, workers: int) -> list[RunResult]:
    """The results of all runs in the first process, of its own in the others."""
    from clipship.training.compare.launcher import results_of_others
    from clipship.training.compare.results import failure_path, finished_result
    from clipship.training.compare.workers import do_runs

    if rank.is_first:
        for run in plan.runs:
            failure_path(run).unlink(missing_ok=True)
    mine = rank.share(plan.runs)
    results = [result for run in mine if (result := finished_result(run)) is not None]
    done = {one.identity for one in results}
    left = [run for run in mine if run.identity not in done]
    left.sort(key=lambda run: plan.request.seeds.index(run.config.seed))  # a whole table after the first seed
    log(f"{len(plan.runs)} runs" + (f", {len(results)} of them are there already" if results else ""))
    if left:
        results += do_runs(left, jobs=jobs, device=device, loader_workers=workers)
    if rank.is_first:
        results += results_of_others(plan.request.out, rank, plan.runs)
    order = {run.identity: number for number, run in enumerate(plan.runs)}
    return sorted(results, key=lambda one: order[one.identity])


def write_report(plan: Grid, results: Sequence[RunResult]) -> tuple[dict[str, Any], str]:
    """Write results.json, table.md, plots/ and report.html; returns the JSON and the Markdown."""
    from clipship.training.compare.page import page_of
    from clipship.training.compare.plots import plots_of, standalone
    from clipship.training.compare.report import how_made, json_of, markdown_of, tables_of
    from clipship.training.compare.summary import Summary

    request = plan.request
    summary = Summary(
        protocol=request.protocol, recipes=request.recipes, datasets=plan.datasets, results=tuple(results)
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
    """What made the report: versions, the machine's kind and its GPU."""
    import torch

    from clipship.training.checkpoint import tool_versions

    gpu = {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}
    return {**tool_versions(), "machine": f"{platform.system()} {platform.machine()}", **gpu}
