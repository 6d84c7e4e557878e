"""Every method on every built-in data set, three seeds: tables, plots and one HTML page, by ``clipship compare``.

    python benchmarks/accuracy.py --out runs/accuracy --jobs 2

Three comparisons, each in its own folder: base to new classes (with open vocabulary), accuracy against shots, and
other data sets (with the variants of ``prints``: domain generalisation). Weights are those of the last step or of the
average that the method defines; nothing is selected on test images. A killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from clipship.core.cli.main import main as clipship
from clipship.core.files import write_text_atomic
from clipship.training.compare.results import read_result
from clipship.training.compare.summary import Summary, SummaryRow, Variant
from clipship.world.datasets import WORLD_DATASETS

METHODS = (
    *("zero-shot", "zero-shot-ensemble", "coop", "cocoop", "kgcoop", "vpt-shallow", "vpt-deep", "ivlp", "maple"),
    *("promptsrc", "sync-clip", "clip-adapter", "tip-adapter", "tip-adapter-f", "linear-probe"),
    *("ship-coop", "ship-clip-adapter", "ship-tip-adapter-f"),
)
FEW_SHOT = ("zero-shot", "coop", "clip-adapter", "tip-adapter", "tip-adapter-f", "linear-probe")
CROSS = ("zero-shot", "coop", "kgcoop", "vpt-deep", "maple", "promptsrc", "sync-clip")
VARIANTS = ("prints_night", "prints_sketched")


def command(*arguments: str | Path) -> str:
    """One clipship command; returns what it prints.

    Raises:
        SystemExit: it failed; its one-line error is on stderr.
    """
    with redirect_stdout(StringIO()) as printed:
        code = clipship([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def world(out: Path, names: Sequence[str] = ()) -> list[str]:
    """The folders of the built-in data sets; missing ones are written."""
    only = [word for name in names for word in ("--only", name)]
    return [one["path"] for one in json.loads(command("world", "--out", out, *only, "--json"))["datasets"]]


def seeds_of(row: SummaryRow) -> int:
    """How many seeds a row is the mean of."""
    return 0 if row.stats["base"] is None else row.stats["base"].seeds


def groups_table(out: Path, seeds: Sequence[int]) -> str:
    """Averages over the data sets whose halves share their words, over those whose new classes have others, and all.

    ``open``: among all class names. ``ECE``: of these, before and after the temperature, in percent.
    """
    results = [read_result(path) for path in sorted(out.glob("runs/*/*/result.json"))]
    results = [one for one in results if one.seed in seeds]
    recipes = tuple(f"{method}-tiny" for method in METHODS)
    names = tuple(one.name for one in WORLD_DATASETS)
    summary = Summary(protocol="base-to-new", recipes=recipes, datasets=names, results=tuple(results))
    keys = ("base", "new", "harmonic_mean", "open_base", "open_new", "open_harmonic_mean", "ece_before", "ece_after")
    header = "| recipe | base | new | H | open base | open new | open H | ECE | after | seeds |"
    lines = [header, "| --- |" + " ---: |" * 9]
    tables = []
    for title, halves in (("all data sets", ("shared", "apart")), ("words shared", "shared"), ("words apart", "apart")):
        group = tuple(one.name for one in WORLD_DATASETS if one.halves in halves)
        rows = [summary.average(Variant(recipe, 16), group) for recipe in recipes]
        cells = [" | ".join("–" if row.stats[key] is None else str(row.stats[key]) for key in keys) for row in rows]
        each = [f"| {row.variant.recipe} | {text} | {seeds_of(row)} |" for row, text in zip(rows, cells, strict=True)]
        tables.append("\n".join([f"### Average over {title}: {', '.join(group)}", "", *lines, *each, ""]))
    return "\n".join(tables)


def main() -> None:
    """Run the given comparisons and print their tables."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--jobs", default="1", help="runs at the same time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    protocols = ("base-to-new", "few-shot", "cross-dataset")
    parser.add_argument("--protocols", nargs="+", default=protocols, choices=protocols)
    given = parser.parse_args()
    data = world(given.out / "world")
    prints = next(folder for folder in data if Path(folder).name == "prints")
    others = [folder for folder in data if folder != prints]
    plans = {
        "base-to-new": (METHODS, data),
        "few-shot": (FEW_SHOT, [prints]),
        "cross-dataset": (CROSS, [prints, *others, *world(given.out / "world", VARIANTS)]),
    }
    for protocol in given.protocols:
        methods, folders = plans[protocol]
        recipes = [f"{method}-tiny" for method in methods]
        out = given.out / protocol
        run = ("compare", *recipes, "--data", *folders, "--protocol", protocol, "--out", out)
        command(*run, "--seeds", *map(str, given.seeds), "--jobs", given.jobs)
        sys.stdout.write((out / "table.md").read_text(encoding="utf-8") + "\n")
        if protocol == "base-to-new":
            text = groups_table(out, given.seeds)
            write_text_atomic(out / "groups.md", text)
            sys.stdout.write(text)


if __name__ == "__main__":
    main()
