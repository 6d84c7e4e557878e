"""Times an epoch from cached features and one that encodes its images, with the same recipe, in turns of one run.

    python benchmarks/feature_cache.py --out runs/feature-cache

The few-shot images of the base classes of prints, on ViT-B/16 with random weights (they do not change the time) and on
clipship-tiny. An epoch is everything that `clipship train` does in it: reading images, crops,
the tower, the steps. Medians and spread of several epochs of each kind, taken in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from clipship.core.cli.main import main as clipship
from clipship.core.tables import Table, with_spread, write_table

MANY_EPOCHS = {"coop": 20, "kgcoop": 20, "ship": 20, "clip-adapter": 1000, "tip-adapter-f": 1000}
"""Epochs from cached features that are timed together: without the text tower they last milliseconds."""

MODELS = ("ViT-B-16/random", "clipship-tiny")
RECIPES = ("coop", "kgcoop", "clip-adapter", "tip-adapter-f", "ship")


def epoch_times(model: str, recipe: str, data: Path, shots: int, rounds: int, cache: Path) -> dict[str, Any]:
    """Seconds of an epoch that encodes the images, and of one from cached features, ``rounds`` of each in turn.

    What a run needs besides its epochs is taken off: it is timed with one epoch from cached features.
    """
    from clipship.training.datasets.load import load_dataset
    from clipship.training.loop.loop import RunOptions, train
    from clipship.training.model.clip import load_clip
    from clipship.training.recipes import config_from_recipe

    clip, dataset = load_clip(model), load_dataset(data)
    config = dataclasses.replace(config_from_recipe(recipe), base_model=model, shots=shots)
    if config.method.startswith("tip-adapter"):
        config = config.with_settings(cache_views=1)
    with tempfile.TemporaryDirectory() as scratch:

        def seconds(views: int, epochs: int, name: str) -> float:
            run = dataclasses.replace(config, feature_views=views, epochs=epochs)
            started = time.perf_counter()
            train(run, dataset, out=Path(scratch) / name, clip=clip, options=RunOptions(cache=cache))
            return time.perf_counter() - started

        many = MANY_EPOCHS[config.method]
        seconds(1, 1, "warm")  # encodes the kept view and the validation images
        encoded, kept = [], []
        for number in range(rounds):
            base = seconds(1, 1, f"one{number}")
            kept.append((seconds(1, 1 + many, f"kept{number}") - base) / many)
            encoded.append(seconds(0, 1, f"encoded{number}") - base + kept[-1])
    return {"model": model, "recipe": recipe, "anew_s": encoded, "kept_s": kept}


def table(rows: list[dict[str, Any]]) -> Table:
    """Medians in seconds, and how many times faster the cached features are."""
    cells = []
    for row in rows:
        ratios = [encoded / kept for encoded, kept in zip(row["anew_s"], row["kept_s"], strict=True)]
        seconds = (f"{statistics.median(row['anew_s']):.2f}", f"{statistics.median(row['kept_s']):.4f}")
        cells.append((row["model"], row["recipe"], *seconds, with_spread(ratios, ",.0f")))
    header = ("model", "recipe", "encoding every time (s)", "cached features (s)", "times faster (range)")
    return Table(header=header, rows=tuple(cells))


def main() -> None:
    """Measure every model and recipe and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/feature-cache"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with redirect_stdout(StringIO()) as printed:
        code = clipship(["world", "--only", "prints", "--out", str(given.out / "world"), "--json"])
    if code:
        raise SystemExit(code)
    data = Path(json.loads(printed.getvalue())["datasets"][0]["path"])
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for model, recipe in itertools.product(given.models, given.recipes):
            rows.append(epoch_times(model, recipe, data, given.shots, given.rounds, Path(cache)))
            sys.stderr.write(table(rows[-1:]).to_markdown().splitlines()[-1] + "\n")
    write_table(given.out, "feature-cache", rows, table(rows))
    sys.stdout.write(table(rows).to_markdown())


if __name__ == "__main__":
    main()
