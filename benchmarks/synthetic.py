"""Accuracy against the number of synthetic images a class, with CLIP's filter and without it, by ``clipship compare``.

    python -m benchmarks.synthetic --out runs/synthetic                          # the built-in pipeline's images
    python -m benchmarks.synthetic --out runs/synthetic --synthetic synthetic    # the renderer's, for comparison

SYNC-CLIP and the plain baseline ``ivlp-synthetic`` (cross entropy alone) on a data set whose classes share their words
and on one whose new classes have other words; zero-shot as the baseline. An existing synthetic set is
used. Results are in ``OUT/NAME``. Nothing is selected on test images. A killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.accuracy import command
from clipship.training.synthetic_set import SYNTHETIC

DATASETS = ("prints", "games")
"""One whose halves share their words, one whose new classes have others."""
RECIPES = ("zero-shot-tiny", "ivlp-synthetic-tiny", "sync-clip-tiny")
COUNTS = (0, 1, 2, 4, 8, 16)
PIPELINE = "diffusion"
"""The folder, below each data set's, of the images that the built-in pipeline makes."""


def datasets(out: Path) -> list[Path]:
    """The folders of the built-in data sets with the renderer's images; missing ones are written."""
    only = [word for name in DATASETS for word in ("--only", name)]
    return [Path(one["path"]) for one in json.loads(command("world", "--out", out, *only, "--json"))["datasets"]]


def synthesized(data: Path, name: str, recipe: str) -> dict[str, object]:
    """Counts of the synthetic set ``name`` of ``data``, which ``recipe`` makes if it is missing."""
    from clipship.training.synthetic_set import SyntheticSet

    if name != SYNTHETIC:
        command("synthesize", recipe, "--classes", data, "--out", data / name)
    made = SyntheticSet.load(data / name)
    kept = [len(made.kept(one)) for one in made.class_names]
    return {"candidates": len(made.images), "kept": sum(kept), "fewest": min(kept), "most": max(kept)}


def main() -> None:
    """Make what is missing, run the comparison and print its tables."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--synthetic", default=PIPELINE, metavar="NAME", help="folder of the images in each data set")
    parser.add_argument("--recipe", default="tiny", help="of clipship synthesize, for images that are missing")
    parser.add_argument("--jobs", default="1", help="runs at the same time")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    given = parser.parse_args()
    data = datasets(given.out / "world")
    for folder in data:
        sys.stdout.write(f"{folder / given.synthetic}: {synthesized(folder, given.synthetic, given.recipe)}\n")
    out = given.out / given.synthetic
    run = ("compare", *RECIPES, "--data", *data, "--synthetic-name", given.synthetic, "--out", out)
    counts = ("--synthetic-shots", *map(str, COUNTS), "--synthetic-filter", "both")
    command(*run, *counts, "--seeds", *given.seeds, "--jobs", given.jobs)
    sys.stdout.write((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
