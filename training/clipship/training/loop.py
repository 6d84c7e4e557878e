"""The one training loop: SGD on a method's own tensors, saved after every epoch, resumed to the bit."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipship.core.errors import CheckFailed, CheckpointError, RecipeError, UsageError
from clipship.core.files import replace_folder, write_json_atomic
from clipship.core.progress import Report, log, progress
from clipship.training.batches import Epoch, ImageCache, synthetic_paths
from clipship.training.checkpoint import RECORD, Checkpoint, load_checkpoint, load_learned, save_checkpoint
from clipship.training.clip import Clip, load_clip
from clipship.training.config import TrainConfig
from clipship.training.data import Dataset, Item, digest_of_items, few_shot
from clipship.training.methods import Batch, Method, build_method

if TYPE_CHECKING:
    from clipship.training.synthetic import SyntheticSet

STATE = "state"
_STATE_TENSORS = "state.safetensors"
_STATE_RECORD = "state.json"
_MOMENTUM = "momentum."

Losses = list[dict[str, float]]


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The rate of ``epoch`` (from 1): the warm-up's in the first, then a cosine that starts after it.

    As in Dassl: epoch e of E has ``(1 + cos(pi (e - 2) / E)) / 2`` of the full rate, so the last one is not at 0.
    """
    if epoch == 1:
        return config.warmup_learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (epoch - 2) / config.epochs)) / 2


def train(
    config: TrainConfig,
    dataset: Dataset,
    *,
    out: Path,
    synthetic: SyntheticSet | None = None,
    resume: bool = False,
    clip: Clip | None = None,
    device: str | None = None,
    workers: int = 0,
) -> Checkpoint:
    """Learn ``config.method`` on the base classes of ``dataset`` and write the checkpoint to the folder ``out``.

    The state is saved in ``out/state`` after every epoch; with ``resume`` an interrupted run goes on from there and
    ends with the very tensors of an uninterrupted one, and a finished run is returned as it is. ``clip`` is the
    loaded base model if there is one already, ``device`` a torch device (default: the GPU if there is one),
    ``workers`` the number of processes that prepare images.

    Raises:
        RecipeError: settings the model cannot take, or ``out`` holds a run with other settings.
        UsageError: ``out`` holds something that is not to be overwritten.
        DataError: images that are missing or broken, or no synthetic ones where the method needs them.
        CheckFailed: a loss that is not finite.
    """
    train_items, _ = few_shot(dataset, config.shots, config.seed)
    base_items = tuple(item for item in train_items if item.label < dataset.num_base)
    data_digest = digest_of_items(base_items)
    finished = _finished_run(out, config, data_digest, resume=resume)
    if finished is not None:
        return finished
    clip = (clip or load_clip(config.base_model)).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    method = build_method(clip, config, dataset.task)
    paths = synthetic_paths(_needed(synthetic, config), dataset.class_names) if method.needs_synthetic else ()
    losses: Losses = []
    if method.learned():
        run = _Run(method, base_items, paths, data_digest, out / STATE)
        losses = run.learn(resume=resume, workers=workers)
    checkpoint = Checkpoint(
        config=config,
        task=dataset.task,
        dataset=dataset.record.name,
        data_digest=data_digest,
        base_model_digest=clip.digest,
        learned=method.learned(),
        losses=losses,
    )
    save_checkpoint(out, checkpoint)
    return checkpoint


def _needed(synthetic: SyntheticSet | None, config: TrainConfig) -> SyntheticSet:
    if synthetic is None:
        raise RecipeError(
            f"recipe {config.recipe} learns from synthetic images: give a synthetic set (--synthetic DIR)"
        )
    return synthetic


def _finished_run(out: Path, config: TrainConfig, data_digest: str, *, resume: bool) -> Checkpoint | None:
    """The finished run in ``out`` if it is to be reused, None if there is something to learn.

    Raises:
        RecipeError: a run is there that is not this one, or that is not to be resumed.
        UsageError: ``out`` is a file, or a folder with other things in it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder for the checkpoint")
    if not out.exists() or not any(out.iterdir()):
        return None
    has_checkpoint, has_state = (out / RECORD).is_file(), (out / STATE).is_dir()
    if not has_checkpoint and not has_state:
        raise UsageError(f"{out} holds other files: give a new folder for the checkpoint")
    if not resume:
        kind = "a finished" if has_checkpoint else "an unfinished"
        raise RecipeError(f"{out} holds {kind} run: add --resume to go on with it, or give another folder")
    if not has_checkpoint:
        return None
    checkpoint = load_checkpoint(out)
    if (checkpoint.config.digest, checkpoint.data_digest) != (config.digest, data_digest):
        raise RecipeError(f"{out} holds a finished run with other settings or data: give another folder")
    log(f"{out} is finished already: nothing to do")
    return checkpoint


@dataclass
class _Run:
    """A method, what it learns from, and where its state is kept."""

    method: Method
    items: tuple[Item, ...]
    synthetic: tuple[tuple[Path, ...], ...]
    data_digest: str
    state_folder: Path

    def __post_init__(self) -> None:
        self.config = self.method.config
        self.clip = self.method.clip
        self.cache = ImageCache()
        self.optimizer = torch.optim.SGD(
            self.method.parameters(),
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    def learn(self, *, resume: bool, workers: int) -> Losses:
        """All epochs that are left; the records of all epochs."""
        self.cache.preload([*(item.path for item in self.items), *(path for paths in self.synthetic for path in paths)])
        losses = self._restored() if resume and self.state_folder.is_dir() else []
        self.method.train()
        with progress(self.config.recipe, self.config.epochs * len(self._epoch(1))) as report:
            for epoch in range(len(losses) + 1, self.config.epochs + 1):
                losses.append(self._learn_epoch(epoch, workers, report))
                self._save_state(losses)
        self.method.eval()
        return losses

    def _epoch(self, epoch: int) -> Epoch:
        return Epoch(
            self.items,
            self.synthetic,
            num_base=self.method.task.num_base,
            config=self.config,
            size_px=self.clip.image_spec.size_px,
            cache=self.cache,
            epoch=epoch,
        )

    def _learn_epoch(self, epoch: int, workers: int, report: Report) -> dict[str, float]:
        rate = learning_rate(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._epoch(epoch)
        sums: defaultdict[str, float] = defaultdict(float)
        started = time.perf_counter()
        for step, batch in enumerate(_batches(batches, workers), start=1):
            for name, value in self._step(batch, f"epoch {epoch} step {step}").items():
                sums[name] += value
            speed = step * self.config.batch_size / (time.perf_counter() - started)
            done = (epoch - 1) * len(batches) + step
            report(done, f"epoch {epoch} loss {sums['total'] / step:.3f} {speed:.0f} images/s")
        return {"epoch": epoch, "learning_rate": rate, **{name: value / len(batches) for name, value in sums.items()}}

    def _step(self, batch: Batch, place: str) -> dict[str, float]:
        self.optimizer.zero_grad()
        with _autocast(self.config, self.clip.device):
            parts = self.method.loss(batch.on(self.clip))
        values = {name: float(value.detach()) for name, value in parts.items()}
        if not math.isfinite(values["total"]):
            raise CheckFailed(f"{place}: the loss is {values}: lower the learning rate, or look at {_names(batch)}")
        parts["total"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return values

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "config": self.config.digest,
            "base_model": self.clip.digest,
            "data": self.data_digest,
            "synthetic": [[path.name for path in paths] for paths in self.synthetic],
        }

    def _save_state(self, losses: Losses) -> None:
        from safetensors.torch import save

        tensors = self.method.learned()
        for name, parameter in self.method.named_parameters():
            tensors[_MOMENTUM + name] = self.optimizer.state[parameter]["momentum_buffer"].detach().cpu()
        self.state_folder.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(self.state_folder) as folder:
            (folder / _STATE_TENSORS).write_bytes(save(tensors))
            write_json_atomic(folder / _STATE_RECORD, {"run": self._identity(), "losses": losses})

    def _restored(self) -> Losses:
        """Load tensors and momentum of the last finished epoch; the records of all finished ones.

        Raises:
            CheckpointError: the state is damaged.
            RecipeError: it belongs to a run with other settings or data.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((self.state_folder / _STATE_RECORD).read_text(encoding="utf-8"))
            tensors = load_file(self.state_folder / _STATE_TENSORS, device=str(self.clip.device))
            identity, losses = record["run"], record["losses"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{self.state_folder} is damaged ({error}): delete it and start again") from error
        if identity != self._identity():
            raise RecipeError(f"{self.state_folder} is of a run with other settings or data: give another folder")
        load_learned(self.method, {name: value for name, value in tensors.items() if not name.startswith(_MOMENTUM)})
        self._restore_momentum(tensors)
        return list(losses)

    def _restore_momentum(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.method.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = tensors[_MOMENTUM + name].clone()


def _batches(epoch: Epoch, workers: int) -> Iterator[Batch]:
    # The loader draws a seed for its workers; from a generator of its own, so that the global one is left alone.
    generator = torch.Generator()
    yield from torch.utils.data.DataLoader(epoch, batch_size=None, num_workers=workers, generator=generator)


@contextmanager
def _autocast(config: TrainConfig, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        yield


def _names(batch: Batch) -> str:
    return ", ".join(batch.files[:4]) + (" ..." if len(batch.files) > 4 else "")
