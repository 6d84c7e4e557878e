"""Images a second of `clipship synthesize` beside diffusers' own pipeline called one prompt at a time, in one run.

    python benchmarks/generation.py --out runs/generation
    python benchmarks/generation.py --recipe sdxl-turbo --device cuda --batch-sizes 1 4 16 64 --out runs/generation

Both have the same files, prompts, seeds, steps and guidance, and write the same image files; `synthesize` also records
every batch, so that a kill loses one at most. Every round runs all ways in turn, and ratios are of times of one round:
a machine that slows down slows all of them. On a GPU wall time counts, on a CPU the time of the process. Loading is
left out; the CLIP filter has its own line.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipship.core.tables import Table, with_spread, write_table
from clipship.core.vocabulary import Vocabulary
from clipship.training.model.clip import default_device
from clipship.training.synthesis.candidate_filter import Scorer
from clipship.training.synthesis.candidates import Candidate, candidates_of
from clipship.training.synthesis.class_prompts import class_prompts_of
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.image_generator import ImageGenerator, precision_for
from clipship.training.synthesis.pipelines import PipelineFolder, pipeline_folder
from clipship.training.synthesis.recipes import synthesis_config
from clipship.training.synthesis.run import records_and_files
from clipship.training.synthesis.workspace import Workspace

NAMES = ("red star", "blue house", "green striped heart", "three yellow fish")
NAIVE = "diffusers, one prompt a call"


def naive(pipeline: Any, config: SynthesisConfig, size_px: int, wanted: Sequence[Candidate], folder: Path) -> None:
    """What a script does that calls the pipeline for every image and saves what comes."""
    for one in wanted:
        image = pipeline(
            one.prompt,
            height=size_px,
            width=size_px,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=torch.Generator("cpu").manual_seed(one.seed),
        ).images[0]
        path = folder / one.file_path(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, config.image_format.upper(), quality=config.quality)


def batched(generator: ImageGenerator, size: int, wanted: Sequence[Candidate], folder: Path) -> None:
    """What `clipship synthesize` does between loading and the filter."""
    workspace = Workspace(folder=folder)
    for start in range(0, len(wanted), size):
        batch = wanted[start : start + size]
        workspace.add(*records_and_files(generator.config, len(wanted), batch, generator.make(batch)))


def seconds(work: Callable[[Path], None], clock: Callable[[], float]) -> float:
    """Time of ``work`` in a new folder."""
    with tempfile.TemporaryDirectory() as scratch:
        started = clock()
        work(Path(scratch))
        return clock() - started


def plain_pipeline(folder: PipelineFolder, config: SynthesisConfig, device: torch.device) -> Any:
    """The pipeline as diffusers loads it."""
    from diffusers import AutoPipelineForText2Image

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    pipeline = AutoPipelineForText2Image.from_pretrained(
        folder.path, dtype=types[config.precision], variant=folder.variant, use_safetensors=True
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measured(config: SynthesisConfig, device: torch.device, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each way, ``rounds`` of each in turn behind one that is not counted."""
    class_prompts = class_prompts_of(config, Vocabulary(names=NAMES))
    wanted = candidates_of(config, class_prompts)
    folder = pipeline_folder(config)
    plain, generator = plain_pipeline(folder, config, device), ImageGenerator(folder, config, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ways: dict[str, Callable[[Path], None]] = {NAIVE: partial(naive, plain, config, generator.size_px, wanted)}
    for size in sizes:
        ways[f"synthesize, batches of {size}"] = partial(batched, generator, size, wanted)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            taken = seconds(work, clock)
            if number:
                times[name].append(taken)
            sys.stderr.write(f"round {number}, {name}: {len(wanted) / taken:.2f} images/s\n")
    rows = [{"way": name, "images": len(wanted), "seconds": taken} for name, taken in times.items()]
    return [
        *rows,
        {
            "way": "CLIP filter",
            "images": len(wanted),
            "seconds": filter_times(generator, wanted, device, rounds, clock),
        },
    ]


def filter_times(
    generator: ImageGenerator,
    wanted: Sequence[Candidate],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> list[float]:
    """Seconds to score the images, the scorer being loaded."""
    config = generator.config
    scorer = Scorer(config.scorer, class_prompts_of(config, Vocabulary(names=NAMES)))
    with tempfile.TemporaryDirectory() as scratch:
        batched(generator, 16, wanted, Path(scratch))
        paths = [Path(scratch) / one.file_path(config) for one in wanted]

        def score(_: Path) -> None:
            scorer.features(paths, device)

        return [seconds(score, clock) for _ in range(rounds)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Images a second, and how many times as many as one prompt a call gives."""
    first = next(row["seconds"] for row in rows if row["way"] == NAIVE)
    cells = []
    for row in rows:
        rate = row["images"] / statistics.median(row["seconds"])
        ratios = [one / other for one, other in zip(first, row["seconds"], strict=True)]
        is_way = row["way"] != "CLIP filter"
        cells.append((row["way"], f"{rate:,.2f}", with_spread(ratios) if is_way else "-"))
    header = ("way", "images/s", "times as many (range)")
    return Table(header=header, rows=tuple(cells), text_columns=1)


def main() -> None:
    """Measure all ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/generation"))
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--pipeline", help="a folder or hub id; default: the recipe's")
    parser.add_argument("--scorer", help="the CLIP of the filter; default: the recipe's")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--images", type=int, default=4, help="of each of four classes")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    device = torch.device(given.device)
    config = synthesis_config(given.recipe)
    changes = {name: getattr(given, name) for name in ("pipeline", "scorer", "steps") if getattr(given, name)}
    config = dataclasses.replace(
        config, **changes, precision=precision_for(config.precision, device), candidates=given.images, keep=1
    )
    rows = measured(config, device, given.batch_sizes, given.rounds)
    write_table(given.out, "generation", rows, table(rows))
    sys.stdout.write(table(rows).to_markdown())


if __name__ == "__main__":
    main()
