"""Makes a synthetic set: all images, batch by batch over all processes, then scores, filter, sheets and table.

Round 1 makes every image with its first seed; each further round makes those that could not be used with the next seed.
In a round each of N processes makes every N-th batch.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipship.core.errors import DataError, RecipeError
from clipship.core.files import locked_folder
from clipship.core.progress import Report, log, progress
from clipship.training.distributed import Distributed
from clipship.training.synthesis.candidate_filter import FilterDecision, Scorer, first_ones
from clipship.training.synthesis.candidates import Candidate, batches_of, candidates_of
from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.contact_sheets import write_sheet
from clipship.training.synthesis.image_generator import GeneratedImage, ImageGenerator, precision_for
from clipship.training.synthesis.pipelines import PipelineFolder, pipeline_folder
from clipship.training.synthesis.workspace import KIND, CandidateRecord, Workspace, is_finished
from clipship.training.synthetic_set import SyntheticImage, SyntheticSet, complete

_AT_WORK = "another clipship synthesize works there: wait for it, or give another --out"
_WAVE = 8
"""Batches of a process between two barriers: a barrier times out, however long the run."""


@dataclass(frozen=True, kw_only=True)
class _Synthesis:
    """What the steps share."""

    config: SynthesisConfig
    class_prompts: ClassPrompts
    pipeline: PipelineFolder
    processes: Distributed
    workspace: Workspace

    @property
    def settings(self) -> dict[str, Any]:
        """What every start in the same folder must agree on, as JSON."""
        return {
            **self.config.to_json(),
            "class_names": list(self.class_prompts.class_names),
            "prompts_digest": self.class_prompts.digest,
            "pipeline_revision": self.pipeline.revision,
        }


def synthesize(
    config: SynthesisConfig, class_prompts: ClassPrompts, *, out: Path, device: str | None = None
) -> SyntheticSet | None:
    """Make the synthetic set of ``config`` in ``out``, or resume an earlier start.

    Args:
        out: the set's folder; a finished set of the same settings is kept.
        device: of torch; None: the GPU if there is one.

    Returns:
        The set; None in the processes of a launcher that only make images.

    Raises:
        RecipeError: the pipeline cannot be used, or the GPU is too small for one image.
        DataError: the models cannot take a name or prompt, or ``out`` holds something else.
        UsageError: another run works in ``out``.
        OSError: the disk is full; finished batches are kept.
    """
    processes = Distributed(device)
    config = replace(config, precision=precision_for(config.precision, processes.device))
    if config.strength and not class_prompts.sources:
        raise RecipeError(f"recipe {config.recipe}: strength={config.strength} needs real images: give --images DIR")
    if class_prompts.sources and not config.strength:
        raise RecipeError(f"recipe {config.recipe}: real images need a strength: give --strength, such as 0.75")
    run = _Synthesis(
        config=config,
        class_prompts=class_prompts,
        pipeline=pipeline_folder(config),
        processes=processes,
        workspace=Workspace(folder=out),
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out, _AT_WORK) if processes.is_main else nullcontext():
        if not is_finished(out, run.settings):
            _make(run)
        elif processes.is_main:
            log(f"{out}: is finished already")
            run.workspace.finish()
    return SyntheticSet.load(out) if processes.is_main else None


def _make(run: _Synthesis) -> None:
    is_main = run.processes.is_main
    scorer = Scorer(run.config.scorer, run.class_prompts) if run.config.filter != "none" and is_main else None
    scheduler = _make_all(run)
    if is_main:
        _finish(run, scorer, scheduler)


def _make_all(run: _Synthesis) -> str:
    """Make the missing images; returns the class of the scheduler."""
    generator = ImageGenerator(run.pipeline, run.config, run.processes.device)
    generator.validate_prompts(run.class_prompts)
    if run.processes.is_main:
        run.workspace.begin(run.settings)
    total = len(run.class_prompts.class_names) * run.config.candidates
    with progress("synthesizing", total) as report:
        for attempt in range(run.config.tries):
            run.processes.wait()
            made = run.workspace.records()
            wanted = wanted_in_round(run.config, run.class_prompts, made, attempt)
            run.processes.wait()  # no process adds records while another reads them
            if wanted:
                _make_round(run, generator, wanted, made, report)
    return generator.scheduler


def wanted_in_round(
    config: SynthesisConfig, class_prompts: ClassPrompts, made: Mapping[tuple[int, int], CandidateRecord], attempt: int
) -> list[Candidate]:
    """The images of a round, made or not: all in the first, then those whose seeds so far could not be used."""
    return [
        one
        for one in candidates_of(config, class_prompts, attempt)
        if all((row := made.get((one.place, earlier))) and row.reason for earlier in range(attempt))
    ]


def _make_round(
    run: _Synthesis,
    generator: ImageGenerator,
    wanted: Sequence[Candidate],
    made: Mapping[tuple[int, int], CandidateRecord],
    report: Report,
) -> None:
    batches = list(batches_of(wanted, run.config.batch_size, made.keys()))
    total, count = len(run.class_prompts.class_names) * run.config.candidates, run.processes.count
    done = first = total - sum(map(len, batches))
    report(done)  # before the clock starts: images of earlier starts say nothing about the time left
    started = time.perf_counter()
    for start in range(0, len(batches), _WAVE * count):
        for batch in batches[start + run.processes.rank : start + _WAVE * count : count]:
            _make_batch(run, generator, batch)
            done = min(done + len(batch) * count, total)  # assuming that the other processes are as fast
            report(done, f"{(done - first) / (time.perf_counter() - started):.2f} images/s")
        run.processes.wait()


def _make_batch(run: _Synthesis, generator: ImageGenerator, batch: Sequence[Candidate]) -> None:
    """Make a batch and record it; in halves if the GPU runs out of memory."""
    try:
        made = generator.make(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise RecipeError(
                f"one image of {generator.size_px} px is too much for {run.processes.device}: give a smaller --size, "
                "--precision bf16 or fp16, or --device cpu"
            ) from error
    else:
        total = len(run.class_prompts.class_names) * run.config.candidates
        run.workspace.add(*records_and_files(run.config, total, batch, made))
        return
    torch.cuda.empty_cache()
    log(f"{len(batch)} images are too many for {run.processes.device}: batches of half the size")
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        _make_batch(run, generator, half)


def records_and_files(
    config: SynthesisConfig, total: int, batch: Sequence[Candidate], made: Sequence[GeneratedImage]
) -> tuple[list[CandidateRecord], dict[str, bytes]]:
    """What the workspace keeps of a batch: its records, and the bytes of its image files by path.

    ``total``, the number of images of the whole set, makes the batch's number unique in all rounds.
    """
    number = batch[0].attempt * total + batch[0].place
    paths = [candidate.file_path(config) for candidate in batch]
    records = [
        CandidateRecord(**asdict(candidate), path=path, batch=number, reason=one.reason)
        for candidate, path, one in zip(batch, paths, made, strict=True)
    ]
    files = {path: file_of(one.image, config) for path, one in zip(paths, made, strict=True) if one.image is not None}
    return records, files


def file_of(image: Image.Image, config: SynthesisConfig) -> bytes:
    """The bytes of an image file; equal for equal pixels and settings."""
    data = io.BytesIO()
    image.save(data, config.image_format.upper(), quality=config.quality)
    return data.getvalue()


def _finish(run: _Synthesis, scorer: Scorer | None, scheduler: str) -> None:
    folder, config = run.workspace.folder, run.config
    records = [record for _, record in sorted(run.workspace.records().items())]
    decisions = _decisions(run, scorer, [record for record in records if record.reason is None])
    rows = [
        _row(run, record, decisions.get(record.key, FilterDecision(score=None, reason=record.reason)), scheduler)
        for record in records
    ]
    images = [SyntheticImage(**row | {"path": folder / row["path"]}) for row in rows]
    if not any(image.kept for image in images):
        raise DataError(
            f"{folder}: none of {len(images)} images can be used, the first is {images[0].reason}: "
            "look at prompts and pipeline, or take --precision bf16 or fp32"
        )
    for name, group in groupby(images, key=lambda image: image.class_name):
        write_sheet(folder, name, list(group))
    _log_small_classes(run, images)
    complete(
        folder,
        rows,
        generator={"kind": KIND, "settings": run.settings, "versions": _versions()},
        template=run.class_prompts.template,
        class_names=run.class_prompts.class_names,
        images_per_class=config.keep,
    )
    run.workspace.finish()


def _decisions(
    run: _Synthesis, scorer: Scorer | None, usable: Sequence[CandidateRecord]
) -> dict[tuple[int, int], FilterDecision]:
    """Which of the images that can be used are kept, by key. ``usable`` is sorted class by class."""
    if scorer is not None:
        features = scorer.features([run.workspace.folder / record.path for record in usable], run.processes.device)
    found: dict[tuple[int, int], FilterDecision] = {}
    for name, group in groupby(usable, key=lambda record: record.class_name):
        of_class, start = list(group), len(found)
        if scorer is None:
            decisions = first_ones(run.config, len(of_class))
        else:
            seeds = [record.seed for record in of_class]
            decisions = scorer.decisions(run.config, name, seeds, features[start : start + len(seeds)])
        found |= {record.key: one for record, one in zip(of_class, decisions, strict=True)}
    return found


def _row(run: _Synthesis, record: CandidateRecord, decision: FilterDecision, scheduler: str) -> dict[str, Any]:
    """The image's row in the table of the set."""
    config = run.config
    return {
        "path": record.path,
        "class_name": record.class_name,
        "prompt": record.prompt,
        "seed": record.seed,
        "score": decision.score,
        "kept": decision.reason is None,
        "reason": decision.reason,
        "negative_prompt": config.negative_prompt or None,
        "pipeline": config.pipeline,
        "revision": run.pipeline.revision,
        "scheduler": scheduler,
        "steps": config.steps,
        "guidance": config.guidance,
        "source": record.source,
        "batch": record.batch,
    }


def _log_small_classes(run: _Synthesis, images: Sequence[SyntheticImage]) -> None:
    kept = Counter(image.class_name for image in images if image.kept)
    few = [f"{name} {kept[name]}" for name in run.class_prompts.class_names if kept[name] < run.config.keep]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        log(f"fewer than {run.config.keep} images are kept of {', '.join(few[:5])}{more}: the column reason says why")


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {one.__name__: str(one.__version__) for one in (torch, diffusers, transformers)}
