"""Making a synthetic set: batch by batch over all processes, then scores, choice, table and sheets.

Rounds: first every image with its first seed, then those that could not be used with the next one. Within a round each
process makes every n-th batch.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
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
from clipship.training.synthesis.class_prompts import Subjects
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.contact_sheets import write_sheet
from clipship.training.synthesis.image_generator import ImageGenerator, Made, precision_for
from clipship.training.synthesis.pipelines import PipelineFolder, pipeline_folder
from clipship.training.synthesis.workspace import KIND, CandidateRecord, Workspace, is_finished
from clipship.training.synthetic_set import SyntheticImage, SyntheticSet, complete

_AT_WORK = "another clipship synthesize works there: wait for it, or give another --out"
_WAVE = 8
"""Batches of a process between two waits for the others: a wait has a time limit, a long run has none."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the steps of a run share."""

    config: SynthesisConfig
    subjects: Subjects
    pipeline: PipelineFolder
    processes: Distributed
    workspace: Workspace

    @property
    def settings(self) -> dict[str, Any]:
        """What another start must have in common with this one; all of it is JSON."""
        return {
            **self.config.to_json(),
            "class_names": list(self.subjects.class_names),
            "prompts_digest": self.subjects.digest,
            "pipeline_revision": self.pipeline.revision,
        }


def synthesize(
    config: SynthesisConfig, subjects: Subjects, *, out: Path, device: str | None = None
) -> SyntheticSet | None:
    """Make the synthetic set of ``config`` in ``out``, or go on where an earlier run stopped.

    Args:
        config: the settings.
        subjects: classes, prompts, and real images for image-to-image.
        out: the set's folder; a whole set of the same settings is left as it is.
        device: of torch; None: the GPU if there is one.

    Returns:
        The set; None in the processes of a launcher that do not finish it.

    Raises:
        RecipeError: a pipeline that cannot be used, or a card too small for one image.
        DataError: names or prompts that the models cannot take, or ``out`` holds something else.
        UsageError: another run works in ``out``.
        OSError: the disk is full; what is done is kept.
    """
    processes = Distributed(device)
    config = replace(config, precision=precision_for(config.precision, processes.device))
    if config.strength and not subjects.sources:
        raise RecipeError(f"recipe {config.recipe}: strength={config.strength} needs real images: give --images DIR")
    if subjects.sources and not config.strength:
        raise RecipeError(f"recipe {config.recipe}: real images need a strength: give --strength, such as 0.75")
    run = _Run(
        config=config,
        subjects=subjects,
        pipeline=pipeline_folder(config),
        processes=processes,
        workspace=Workspace(folder=out),
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out, _AT_WORK) if processes.is_main else nullcontext():
        if is_finished(out, run.settings):
            return _whole(run)
        return _made_set(run)


def _whole(run: _Run) -> SyntheticSet | None:
    if not run.processes.is_main:
        return None
    log(f"{run.workspace.folder}: is whole already")
    run.workspace.finish()
    return SyntheticSet.load(run.workspace.folder)


def _made_set(run: _Run) -> SyntheticSet | None:
    scorer = Scorer(run.config.scorer, run.subjects) if run.config.filter != "none" and run.processes.is_main else None
    scheduler = _make_all(run)
    if not run.processes.is_main:
        return None
    _finish(run, scorer, scheduler)
    return SyntheticSet.load(run.workspace.folder)


def _make_all(run: _Run) -> str:
    """Make what is missing; returns the class of the scheduler."""
    engine = ImageGenerator(run.pipeline, run.config, run.processes.device)
    engine.validate_prompts(run.subjects)
    if run.processes.is_main:
        run.workspace.begin(run.settings)
    total = len(run.subjects.class_names) * run.config.candidates
    with progress("synthesizing", total) as report:
        for attempt in range(run.config.tries):
            run.processes.wait()
            made = run.workspace.records()
            wanted = wanted_in_round(run.config, run.subjects, made, attempt)
            run.processes.wait()  # no process adds records while another reads them
            if wanted:
                _make_round(run, engine, wanted, made, report)
    return engine.scheduler


def wanted_in_round(
    config: SynthesisConfig, subjects: Subjects, made: Mapping[tuple[int, int], CandidateRecord], attempt: int
) -> list[Candidate]:
    """The images of a round, made or not: all in the first, and then those whose seeds so far could not be used."""
    return [
        one
        for one in candidates_of(config, subjects, attempt)
        if all((row := made.get((one.place, earlier))) and row.reason for earlier in range(attempt))
    ]


def _make_round(
    run: _Run,
    engine: ImageGenerator,
    wanted: Sequence[Candidate],
    made: Mapping[tuple[int, int], CandidateRecord],
    report: Report,
) -> None:
    batches = list(batches_of(wanted, run.config.batch_size, made.keys()))
    total, count = len(run.subjects.class_names) * run.config.candidates, run.processes.count
    done = first = total - sum(map(len, batches))
    report(done)  # what is there already is not counted in the time left
    started = time.perf_counter()
    for start in range(0, len(batches), _WAVE * count):
        for batch in batches[start + run.processes.rank : start + _WAVE * count : count]:
            _make_batch(run, engine, batch)
            done = min(done + len(batch) * count, total)  # the other processes are as far
            report(done, f"{(done - first) / (time.perf_counter() - started):.2f} images/s")
        run.processes.wait()


def _make_batch(run: _Run, engine: ImageGenerator, batch: Sequence[Candidate]) -> None:
    """Make and keep a batch; halves of it, where the card is too small."""
    try:
        made = engine.make(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise RecipeError(
                f"one image of {engine.size_px} px is too much for {run.processes.device}: give a smaller --size, "
                "--precision bf16 or fp16, or --device cpu"
            ) from error
    else:
        total = len(run.subjects.class_names) * run.config.candidates
        run.workspace.add(*rows_and_files(run.config, total, batch, made))
        return
    torch.cuda.empty_cache()
    log(f"{len(batch)} images at once are too many for {run.processes.device}: half as many")
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        _make_batch(run, engine, half)


def rows_and_files(
    config: SynthesisConfig, total: int, batch: Sequence[Candidate], made: Sequence[Made]
) -> tuple[list[CandidateRecord], dict[str, bytes]]:
    """What the workspace keeps of a batch: its rows, and the bytes of its image files by path.

    Args:
        config: format and quality of the files.
        total: number of images of the whole set, which makes the batch's number its own in all rounds.
        batch: what was asked for.
        made: what came of it.
    """
    number = batch[0].attempt * total + batch[0].place
    rows, files = [], {}
    for candidate, one in zip(batch, made, strict=True):
        path = candidate.path(config)
        rows.append(CandidateRecord(**asdict(candidate), path=path, batch=number, reason=one.reason))
        if one.image is not None:
            files[path] = file_of(one.image, config)
    return rows, files


def file_of(image: Image.Image, config: SynthesisConfig) -> bytes:
    """The bytes of an image file: equal pixels and settings give equal ones."""
    data = io.BytesIO()
    image.save(data, config.image_format.upper(), quality=config.quality)
    return data.getvalue()


def _finish(run: _Run, scorer: Scorer | None, scheduler: str) -> None:
    folder, config = run.workspace.folder, run.config
    rows = [row for _, row in sorted(run.workspace.records().items())]
    verdicts = _verdicts(run, scorer, [row for row in rows if row.reason is None])
    images = [_image(run, row, verdicts, scheduler) for row in rows]
    if not any(image.kept for image in images):
        raise DataError(
            f"{folder}: none of {len(images)} images can be used, the first is {images[0].reason}: "
            "look at prompts and pipeline, or take --precision bf16 or fp32"
        )
    for name in run.subjects.class_names:
        write_sheet(folder, name, [image for image in images if image.class_name == name])
    _tell_of_small_classes(run, images)
    complete(
        folder,
        [_columns(folder, image) for image in images],
        generator={"kind": KIND, "settings": run.settings, "versions": _versions()},
        template=run.subjects.template,
        class_names=run.subjects.class_names,
        images_per_class=config.keep,
    )
    run.workspace.finish()


def _verdicts(run: _Run, scorer: Scorer | None, rows: Sequence[CandidateRecord]) -> dict[int, FilterDecision]:
    """By place, what becomes of the images that can be used."""
    by_class: dict[str, list[int]] = {name: [] for name in run.subjects.class_names}
    for number, row in enumerate(rows):
        by_class[row.class_name].append(number)
    if scorer is not None:
        features = scorer.features([run.workspace.folder / row.path for row in rows], run.processes.device)
    found: dict[int, FilterDecision] = {}
    for name, numbers in by_class.items():
        if scorer is None:
            verdicts = first_ones(run.config, len(numbers))
        else:
            seeds = [rows[number].seed for number in numbers]
            verdicts = scorer.verdicts(run.config, name, seeds, features[numbers])
        found |= {rows[number].place: one for number, one in zip(numbers, verdicts, strict=True)}
    return found


def _image(run: _Run, row: CandidateRecord, verdicts: Mapping[int, FilterDecision], scheduler: str) -> SyntheticImage:
    verdict = FilterDecision(score=None, reason=row.reason) if row.reason else verdicts[row.place]
    config = run.config
    return SyntheticImage(
        path=run.workspace.folder / row.path,
        class_name=row.class_name,
        prompt=row.prompt,
        seed=row.seed,
        score=verdict.score,
        kept=verdict.reason is None,
        reason=verdict.reason,
        negative_prompt=config.negative_prompt or None,
        pipeline=config.pipeline,
        revision=run.pipeline.revision,
        scheduler=scheduler,
        steps=config.steps,
        guidance=config.guidance,
        source=row.source,
        batch=row.batch,
    )


def _columns(folder: Path, image: SyntheticImage) -> dict[str, Any]:
    content = {field.name: getattr(image, field.name) for field in fields(image)}
    return content | {"path": image.path.relative_to(folder).as_posix()}


def _tell_of_small_classes(run: _Run, images: Sequence[SyntheticImage]) -> None:
    kept = {name: 0 for name in run.subjects.class_names}
    for image in images:
        kept[image.class_name] += image.kept
    few = [f"{name} {count}" for name, count in kept.items() if count < run.config.keep]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        log(f"fewer than {run.config.keep} images are kept of {', '.join(few[:5])}{more}: see the column reason")


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {one.__name__: str(one.__version__) for one in (torch, diffusers, transformers)}
