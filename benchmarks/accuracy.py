"""Zero-shot, CoOp and SYNC-CLIP on every built-in data set, three seeds: a Markdown table and a JSON file.

    python benchmarks/accuracy.py --out runs/accuracy --jobs 2

Each number is the mean over the seeds, with the standard deviation; the harmonic mean is that of the averages, as in
the papers. Weights are those of the last step; nothing is selected on test images. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from clipship.core.cli import main as clipship
from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.training.evaluate import harmonic_mean

RECIPES = ("zero-shot-tiny", "coop-tiny", "sync-clip-tiny")
SEEDS = (1, 2, 3)
KEYS = ("base", "new", "open_base", "open_new")

Scores = dict[str, Any]


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


def scores_of(recipe: str, data: Path, seed: int, out: Path) -> Scores:
    """Train and evaluate one recipe with one seed, or read what an earlier run stored."""
    checkpoint = out / "checkpoints" / data.name / f"{recipe}-seed{seed}"
    started_s = time.perf_counter()
    command("train", recipe, "--data", data, "--seed", str(seed), "--out", checkpoint, "--resume", "--json")
    scores: Scores | None = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))["scores"]
    if scores is None:
        scores = json.loads(command("evaluate", checkpoint, "--data", data, "--json"))
    sys.stderr.write(f"{data.name} {recipe} seed {seed}: {time.perf_counter() - started_s:.0f} s\n")
    return scores


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def row(name: str, recipe: str, runs: Sequence[Scores]) -> str:
    """One line of the table, over the seeds of one recipe on one data set."""
    means = {key: statistics.mean(run[key] for run in runs) for key in KEYS}
    cells = [cell([run[key] for run in runs]) for key in KEYS]
    closed, opened = harmonic_mean(means["base"], means["new"]), harmonic_mean(means["open_base"], means["open_new"])
    return f"| {name} | {recipe} | {cells[0]} | {cells[1]} | {closed:.1f} | {cells[2]} | {cells[3]} | {opened:.1f} |"


def table(results: dict[str, dict[str, list[Scores]]]) -> str:
    """The whole table in Markdown, averages over data sets last."""
    lines = [
        "| data set | recipe | base | new | H | open-vocabulary base | open-vocabulary new | H |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, recipes in results.items():
        lines += [row(name, recipe, runs) for recipe, runs in recipes.items()]
    for recipe in RECIPES:
        averages = [
            {key: statistics.mean(results[name][recipe][seed][key] for name in results) for key in KEYS}
            for seed in range(len(SEEDS))
        ]
        lines.append(row("**average**", recipe, averages))
    return "\n".join(lines) + "\n"


def all_scores(folders: Sequence[Path], out: Path, jobs: int) -> dict[str, dict[str, list[Scores]]]:
    """Every recipe on every data set with every seed, ``jobs`` at a time, each on its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // jobs))  # read by the workers when they import PyTorch
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            data.name: {
                recipe: [pool.submit(scores_of, recipe, data, seed, out) for seed in SEEDS] for recipe in RECIPES
            }
            for data in folders
        }
        return {
            name: {recipe: [one.result() for one in runs] for recipe, runs in recipes.items()}
            for name, recipes in waiting.items()
        }


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    given = parser.parse_args()
    out: Path = given.out
    written = json.loads(command("world", "--out", out / "world", "--json"))["datasets"]
    results = all_scores([Path(one["path"]) for one in written], out, given.jobs)
    write_json_atomic(out / "accuracy.json", results)
    text = table(results)
    write_text_atomic(out / "accuracy.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
