"""The one training loop: learns a method's tensors, saves its state, resumes bit-exactly."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipship.core.errors import CheckFailed, ClipshipError, RecipeError, UsageError
from clipship.core.files import replace_folder, sha256_of_text
from clipship.core.progress import Report, log, progress
from clipship.training.checkpoint import GENERATOR, RECORD, Checkpoint, load_checkpoint, save_checkpoint
from clipship.training.config import TrainConfig
from clipship.training.datasets.base import Dataset
from clipship.training.distributed import Distributed
from clipship.training.evaluation.temperature import calibrate
from clipship.training.inputs.features import frozen_features
from clipship.training.inputs.synthetic import log_missing, synthetic_images
from clipship.training.loop.feature_generator import generation_from_checkpoint, validate_generator
from clipship.training.loop.few_shot import FewShot, sample_of
from clipship.training.loop.run_state import Losses, Position, RunState, WeightAverage
from clipship.training.methods import Batch, FeatureGenerator, Method, build_method
from clipship.training.model.autocast import autocast
from clipship.training.model.clip import Clip, load_clip

if TYPE_CHECKING:
    from clipship.training.synthetic_set import SyntheticSet

STATE = "state"


def learning_rate(config: TrainConfig, epoch: int, step: int = 0, steps: int = 1) -> float:
    """The rate of step ``step`` (from 0) of the ``steps`` in ``epoch`` (from 1).

    "epoch-cosine" is Dassl's: the cosine starts after the warm-up, so epoch e of E has
    ``(1 + cos(pi (e - 1 - warm-up) / E)) / 2`` of the full rate and the last one is not at 0. "step-cosine" falls from
    the first step on, to 0 after the last.
    """
    if epoch <= config.warmup_epochs:
        return config.warmup_learning_rate
    if config.schedule == "constant":
        return config.learning_rate
    done = epoch - 1 - config.warmup_epochs
    total = config.epochs
    if config.schedule == "step-cosine":
        done, total = done * steps + step, (total - config.warmup_epochs) * steps
    return config.learning_rate * (1 + math.cos(math.pi * done / total)) / 2


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; no option changes the result."""

    resume: bool = False
    """Continue an interrupted run; a finished one is returned."""
    device: str | None = None
    """A torch device; None: the GPU if there is one."""
    workers: int = 0
    """Processes that prepare images."""
    cache: Path | None = None
    """Folder for what other runs can use again, features of frozen image towers and generators; None: for this run."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files; None: none are written."""
    save_every_s: float = 30.0
    """Seconds of training between two states on disk: what a kill can cost."""


def train(
    config: TrainConfig,
    dataset: Dataset,
    *,
    out: Path,
    synthetic: SyntheticSet | None = None,
    generator: Path | None = None,
    clip: Clip | None = None,
    options: RunOptions | None = None,
) -> Checkpoint:
    """Learn ``config.method`` from a few images of ``dataset`` and write the checkpoint to the folder ``out``.

    The state is saved in ``out/state`` twice a minute; a resumed run ends with exactly the tensors and losses of an
    uninterrupted one. ``clip`` is the loaded base model if there is one already, ``generator`` the
    checkpoint of a feature generator that takes the place of the one the recipe would learn first.

    Raises:
        RecipeError: settings the model cannot take, or ``out`` holds a run with other settings.
        UsageError: ``out`` holds something that is not to be overwritten.
        DataError: images that are missing or broken, or no synthetic ones where the method needs them.
        CheckFailed: a loss that is not finite.
        ClipshipError: out of memory; the message says what lowers it.
    """
    options = options or RunOptions()
    sample = sample_of(dataset, config)
    finished = _finished_run(out, config, sample.digest, resume=options.resume)
    if finished is not None:
        return finished
    processes = Distributed(options.device)
    clip = (clip or load_clip(config.base_model)).to(processes.device)
    validate_generator(config, sample.task, generator)
    generation = None
    if config.generator is not None:
        where = generator or out / GENERATOR
        if generator is None:
            learned = _learned_generator(config.generator, dataset, where, clip, options, processes)
        else:
            learned = load_checkpoint(generator)
        generation = generation_from_checkpoint(learned, where, clip, sample.task)
    method = build_method(clip, config, sample.task)
    paths = synthetic_images(config, sample.task.class_names, synthetic)
    if processes.is_main:
        log_missing(config, paths, dataset.class_names)
    losses: Losses = []
    if method.learned():
        data = FewShot(sample=sample, config=config, clip=clip, generation=generation, cache=options.cache)
        losses = _Run(method, data, paths, processes, options, out / STATE).learn()
    is_classifier = not isinstance(method, FeatureGenerator)
    checkpoint = Checkpoint(
        config=config,
        task=sample.task,
        dataset=dataset.record.name,
        data_digest=sample.digest,
        base_model_digest=clip.digest,
        learned=method.learned(),
        losses=losses,
        notes=method.notes,
        selection=_selection(method),
        calibration=asdict(calibrate(method, sample.validation, cache=options.cache)) if is_classifier else None,
    )
    if processes.is_main:
        save_checkpoint(out, checkpoint)
    processes.wait()
    return checkpoint


def _learned_generator(
    config: TrainConfig, dataset: Dataset, out: Path, clip: Clip, options: RunOptions, processes: Distributed
) -> Checkpoint:
    """Learn a feature generator in ``out``; with a cache, once for all recipes that share it."""
    sample = sample_of(dataset, config)
    depends = [config.digest, sample.digest, clip.digest, [str(item.path.resolve()) for item in sample.train[:1]]]
    shared = None if options.cache is None else options.cache / GENERATOR / sha256_of_text(json.dumps(depends))
    resumed = replace(options, resume=True, tensorboard=None)
    checkpoint = train(config, dataset, out=shared or out, clip=clip, options=resumed)
    if shared is not None and not out.exists() and processes.is_main:
        with replace_folder(out) as copy:
            shutil.copytree(shared, copy, dirs_exist_ok=True)
    return checkpoint


def _selection(method: Method) -> str:
    """The rule by which the weights were kept. Never: those that are best on the test images."""
    config = method.config
    rule = "last step"
    if config.average_std:
        rule = f"Gaussian average over epochs (mean {config.average_mean:g}, std {config.average_std:g})"
    return f"{rule}; {method.selection}" if method.selection else rule


def _finished_run(out: Path, config: TrainConfig, data_digest: str, *, resume: bool) -> Checkpoint | None:
    """The finished run in ``out`` if it is to be reused, None if there is something to learn.

    Raises:
        RecipeError: another run, or one that must not be resumed.
        UsageError: ``out`` is a file, or a folder with other things in it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder for the checkpoint")
    if not out.exists() or not any(out.iterdir()):
        return None
    has_checkpoint = (out / RECORD).is_file()
    if not has_checkpoint and not (out / STATE).is_dir() and not (out / GENERATOR).is_dir():
        raise UsageError(f"{out} holds other files: give a new folder for the checkpoint")
    if not resume:
        kind = "a finished" if has_checkpoint else "an unfinished"
        raise RecipeError(f"{out} holds {kind} run: add --resume to continue it, or give another folder")
    if not has_checkpoint:
        return None
    checkpoint = load_checkpoint(out)
    if (checkpoint.config.digest, checkpoint.data_digest) != (config.digest, data_digest):
        raise RecipeError(f"{out} holds a finished run with other settings or data: give another folder")
    log(f"{out} is already finished: nothing to do")
    return checkpoint


@dataclass
class _Run:
    """A method, what it learns from, and where its state is kept."""

    method: Method
    data: FewShot
    synthetic: tuple[tuple[Path, ...], ...]
    processes: Distributed
    options: RunOptions
    folder: Path

    def __post_init__(self) -> None:
        self.config, self.clip = self.method.config, self.method.clip
        _validate_batch(self.config, self.data, self.processes)
        average = WeightAverage(self.method, self.config) if self.config.average_std else None
        scaler = torch.amp.GradScaler(self.clip.device.type, enabled=self.config.precision == "fp16")
        self.state = RunState(module=self.method, optimizer=_optimizer(self.method), scaler=scaler, average=average)
        self.saved_at = time.monotonic()

    def learn(self) -> Losses:
        """All steps that are left; the records of all epochs."""
        self.data.preload([path for paths in self.synthetic for path in paths])
        position = self._restored() if self.options.resume and self.folder.is_dir() else None
        if position is None:
            self.method.begin(self.data)
            position = Position()
        self.method.train()
        steps = len(self.data.epoch(1, self.synthetic))
        done = (position.epoch - 1) * steps + position.step
        with progress(self.config.recipe, self.config.epochs * steps) as report, self._tensorboard(done) as writer:
            while position.epoch <= self.config.epochs:
                self._learn_epoch(position, report, writer)
        if self.state.average is not None:
            self.state.average.apply()
        self.method.eval()
        self.method.end(self.data)
        return position.losses

    def _learn_epoch(self, position: Position, report: Report, writer: Any) -> None:
        batches = self.data.epoch(position.epoch, self.synthetic)
        started, first = time.perf_counter(), position.step
        for batch in _batches(batches, position.step, self.options.workers):
            rate = learning_rate(self.config, position.epoch, position.step, len(batches))
            place = f"epoch {position.epoch} step {position.step + 1}"
            values = self._step(self.data.with_generated(batch, position.epoch, position.step), rate, place)
            position.step += 1
            position.sums = {name: position.sums.get(name, 0.0) + value for name, value in values.items()}
            done = (position.epoch - 1) * len(batches) + position.step
            if writer is not None:
                for name, value in {**values, "learning_rate": rate}.items():
                    writer.add_scalar(name, value, done)
            speed = (position.step - first) * self.config.batch_size / (time.perf_counter() - started)
            report(done, f"epoch {position.epoch} loss {values['total']:.3f} {speed:.0f} images/s")
            self._save_in_time(position)
        means = {name: value / len(batches) for name, value in position.sums.items()}
        rate = learning_rate(self.config, position.epoch, 0, len(batches))
        position.losses.append({"epoch": position.epoch, "learning_rate": rate, **means})
        if self.state.average is not None:
            self.state.average.add(position.epoch)
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}

    def _step(self, batch: Batch, rate: float, place: str) -> dict[str, float]:
        optimizer, scaler = self.state.optimizer, self.state.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with _memory(place, self.config):
            values = self._gradients(batch.part(self.processes.rank, self.processes.count), len(batch))
        if not all(map(math.isfinite, values.values())):
            raise CheckFailed(f"{place}: the loss is {values}: lower the learning rate, or look at {_names(batch)}")
        scaler.step(optimizer)
        scaler.update()
        return values

    def _gradients(self, batch: Batch, size: int) -> dict[str, float]:
        """Add up the gradients of all parts in all processes; the losses, as means over the ``size`` images."""
        totals: dict[str, Tensor] = {}
        for number in range(self.config.accumulate):
            part = batch.part(number, self.config.accumulate)
            share = len(part) / size
            if not share:
                continue
            with autocast(self.config.precision, self.clip.device):
                parts = self.method.loss(self._encoded(part.on(self.clip)))
            self.state.scaler.scale(parts["total"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in parts.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() * share
        if self.processes.count > 1:
            for parameter in self.method.parameters():
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.processes.sum(own)
        return {name: float(self.processes.sum(value)) for name, value in totals.items()}

    def _encoded(self, batch: Batch) -> Batch:
        """The batch of a method that leaves the image tower alone, with features for pixels."""
        are_pixels = batch.real.images.ndim == 4
        if not self.method.image_side_frozen or not are_pixels:
            return batch
        return replace(batch, real=replace(batch.real, images=frozen_features(self.clip, batch.real.images)))

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        return {
            "config": self.config.digest,
            "base_model": self.clip.digest,
            "data": self.data.sample.digest,
            "generator": "" if self.data.generation is None else self.data.generation.digest,
            "synthetic": [[path.name for path in paths] for paths in self.synthetic],
        }

    def _save_in_time(self, position: Position) -> None:
        if self.processes.is_main and time.monotonic() - self.saved_at >= self.options.save_every_s:
            self.state.save(self.folder, self._identity(), position)
            self.saved_at = time.monotonic()

    def _restored(self) -> Position:
        position = self.state.restore(self.folder, self._identity(), self.clip.device)
        log(f"continuing at epoch {position.epoch} of {self.config.epochs}, after step {position.step}")
        return position

    def _tensorboard(self, done: int) -> Any:
        """A context with TensorBoard's writer after ``done`` steps; without one where no folder is given."""
        if self.options.tensorboard is None or not self.processes.is_main:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.options.tensorboard), purge_step=done + 1)


def _validate_batch(config: TrainConfig, data: FewShot, processes: Distributed) -> None:
    size = min(config.batch_size, len(data.sample.train) or config.batch_size)
    if size < processes.count:
        raise UsageError(f"{processes.count} processes share batches of {size}: start at most {size}")


def _optimizer(method: Method) -> torch.optim.Optimizer:
    config = method.config
    parameters = list(method.parameters()) or [nn.Parameter(torch.zeros(0))]  # a cache learns nothing step by step
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        # one kernel a tensor instead of five passes over it: SHIP learns seven million weights with small batches
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, eps=config.adam_epsilon, fused=True)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=config.momentum)


def _batches(epoch: Any, first: int, workers: int) -> Iterator[Batch]:
    """The batches of ``epoch`` from step ``first`` on."""
    # The loader draws a seed for its workers; from a generator of its own, so that the global one is left alone.
    generator = torch.Generator()
    steps = range(first, len(epoch))
    yield from torch.utils.data.DataLoader(
        epoch, batch_size=None, sampler=steps, num_workers=workers, generator=generator
    )


@contextmanager
def _memory(place: str, config: TrainConfig) -> Iterator[None]:
    """Turn "out of memory" into what lowers the need for it.

    Raises:
        ClipshipError: the body ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise ClipshipError(
            f"{place}: out of memory ({str(error).splitlines()[0][:120]}): raise --accumulate (now "
            f"{config.accumulate}), lower --batch-size ({config.batch_size}) or --text-chunk ({config.text_chunk}), "
            "or take --precision bf16"
        ) from error


def _names(batch: Batch) -> str:
    return ", ".join(batch.files[:4]) + (" ..." if len(batch.files) > 4 else "")
