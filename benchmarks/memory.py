"""Peak memory and time of a training step on ViT-B/16 with the 1000 class names of ImageNet, on the CPU.

    python benchmarks/memory.py --out runs/memory

Every row is a process of its own: published batch size, random weights and pixels (neither changes memory or time),
the peak resident set of the whole process, and the mean of two steps after a first one. "Chunk" is the number of
prompts that pass the text tower at once; in chunks, activations are computed again on the way back. PromptSRC's frozen
class features, computed once before the first step, are those of one template instead of sixty.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clipship.core.tables import Table, with_spread, write_table

MODEL = "ViT-B-16/random"
RECIPES = ("sync-clip", "promptsrc")
CHUNKS = (1000, 128)
STEPS = 3


def measured(recipe: str, chunk: int, precision: str) -> dict[str, Any]:
    """Take the steps in this process."""
    import torch
    from open_clip import IMAGENET_CLASSNAMES

    from clipship.training.methods import Batch, ImageSet, Partners, Task, build_method
    from clipship.training.model.autocast import autocast
    from clipship.training.model.clip import load_clip
    from clipship.training.recipes import config_from_recipe

    config = dataclasses.replace(
        config_from_recipe(recipe, "ImageNet"),
        base_model=MODEL,
        text_chunk=chunk,
        precision=precision,
    )
    if config.method in ("kgcoop", "promptsrc"):
        config = config.with_settings(reference_templates=("a photo of a {}.",))
    names = tuple(dict.fromkeys(IMAGENET_CLASSNAMES))  # two of the thousand are called alike
    clip = load_clip(MODEL)
    whole = config.method not in ("sync-clip", "ivlp-synthetic")  # they learn from half and classify among all
    task = Task(class_names=names, num_base=len(names) if whole else len(names) // 2, templates=("a photo of a {}.",))
    method = build_method(clip, config, task)
    optimizer = torch.optim.SGD(method.parameters(), lr=config.learning_rate)
    draw = torch.Generator().manual_seed(0)
    size, side = config.batch_size, clip.image_spec.size_px
    images = [torch.randn(size, 3, side, side, generator=draw) for _ in range(3)]
    labels = torch.arange(size) * 7
    features = torch.nn.functional.normalize(torch.randn(size, clip.embed_dim, generator=draw), dim=-1)
    batch = Batch(real=ImageSet(images=features if method.image_side_frozen else images[0], labels=labels))
    if method.needs_synthetic:
        partners = Partners(images=images[1], labels=labels, rows=torch.arange(size), share=1.0)
        new = ImageSet(images=images[2], labels=labels + task.num_base - 1)
        batch = dataclasses.replace(batch, synthetic_base=partners, synthetic_new=new)
    times_s = []
    for _ in range(STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        with autocast(precision, clip.device):
            total = method.loss(batch)["total"]
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times_s.append(time.perf_counter() - started)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "peak_gib": peak_gib,
        "step_s": statistics.mean(times_s[1:]),
        "steps_s": times_s[1:],
        "classes": len(names),
    }


def in_a_process(recipe: str, chunk: int, precision: str) -> dict[str, Any]:
    """One row, from a process that does nothing else."""
    command = [sys.executable, __file__, "--row", recipe, str(chunk), precision]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = {"recipe": recipe, "chunk": chunk, "precision": precision, **json.loads(printed)}
    sys.stderr.write(f"{recipe} chunk {chunk} {precision}: {row['peak_gib']:.1f} GiB, {row['step_s']:.1f} s\n")
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """Times beside that of the recipe's first row, which takes all prompts at once."""
    from clipship.training.recipes import config_from_recipe

    first = {(row["recipe"], row["precision"]): row["step_s"] for row in reversed(rows)}
    cells = []
    for row in rows:
        chunk = "none" if row["chunk"] >= row["classes"] else str(row["chunk"])
        ratio = row["step_s"] / first[row["recipe"], row["precision"]]
        batch = config_from_recipe(row["recipe"], "ImageNet").batch_size
        numbers = (str(batch), chunk, f"{row['peak_gib']:.1f}", with_spread(row["steps_s"], ".1f"), f"{ratio:.2f}")
        cells.append((row["recipe"], row["precision"], *numbers))
    header = ("recipe", "precision", "batch", "chunk", "peak memory (GiB)", "step (s, and range of 2)", "no chunks = 1")
    return Table(header=header, rows=tuple(cells))


def main() -> None:
    """Measure every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS)
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--row", nargs=3, metavar=("RECIPE", "CHUNK", "PRECISION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        sys.stdout.write(json.dumps(measured(given.row[0], int(given.row[1]), given.row[2])))
        return
    rows = [
        in_a_process(recipe, chunk, precision)
        for recipe in given.recipes
        for precision in given.precisions
        for chunk in given.chunks
    ]
    write_table(given.out, "memory", rows, table(rows))
    sys.stdout.write(table(rows).to_markdown())


if __name__ == "__main__":
    main()
