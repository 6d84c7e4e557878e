"""A resumable training run of the world: settings, learning rate, checkpoint, log, loop and command line."""

import argparse
import dataclasses
import io
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from clipship.core.errors import DataError
from clipship.core.files import write_bytes_atomic
from clipship.world.drawing.attributes import WORLD_VERSION

BatchT = TypeVar("BatchT")
SettingsT = TypeVar("SettingsT", bound="RunSettings")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that decides the weights, apart from the versions of the libraries and the CPU.

    The learning rate rises over `warmup_steps`, stays, and falls to zero over the last `decay_fraction` of the steps:
    a constant middle lets a run be stopped and resumed with another number of steps.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int
    decay_fraction: float = 0.4
    seed: int = 1
    log_every: int
    evaluate_every: int
    checkpoint_every_s: float = 120.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.evaluate_every) < 1:
            raise ValueError("steps, batch_size, log_every and evaluate_every must be at least 1")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; it must be above 0 and at most 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / (self.steps * self.decay_fraction)
        return self.learning_rate * min(1.0, rise, fall)


class ResumableRun(ABC, Generic[SettingsT, BatchT]):
    """One training run: what is learned, the folder it is written to, and the current step.

    A subclass names its files, takes a step (`take_step`) and may measure (`measure`).
    """

    log_file: str
    checkpoint_file: str

    def __init__(self, out: Path, settings: SettingsT, stream: Mapping[str, Any] | None = None, **parts: Any) -> None:
        # A resumed run must have the seed and the batch size of the first, and its `stream`. The parts are objects with
        # `state_dict` and `load_state_dict`.
        self.out, self.settings, self.parts = out, settings, parts
        self.stream = {
            "world": WORLD_VERSION,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            **(stream or {}),
        }
        self.log_path, self.checkpoint_path = out / self.log_file, out / self.checkpoint_file
        self.step, self.train_s = 0, 0.0

    @abstractmethod
    def take_step(self, batch: BatchT) -> float:
        """Learn from a batch and return its loss."""

    def measure(self) -> dict[str, float]:
        """Return what else to log every `evaluate_every` steps."""
        return {}

    def begin(self, *, resume: bool) -> None:
        """Restore the checkpoint, or start a new log; then log the settings.

        Raises:
            DataError: there is a checkpoint and `resume` is not set, or the other way round.
        """
        if resume:
            self.restore()
        elif self.checkpoint_path.exists():
            raise DataError(f"{self.out} holds an unfinished run; add --resume to continue it, or choose another --out")
        else:
            write_bytes_atomic(self.log_path, b"")
        event = "resumed" if resume else "started"
        self.log(event=event, step=self.step, **dataclasses.asdict(self.settings))

    def is_finished(self, *, resume: bool) -> bool:
        """Return whether the folder holds this run with all its steps; if so, restore it.

        Raises:
            DataError: as `restore`.
        """
        lines = self._log_lines() if resume and self.checkpoint_path.is_file() else []
        last = json.loads(lines[-1]) if lines else {}
        if last.get("event") != "finished" or last["step"] != self.settings.steps:
            return False
        self.restore()
        return True

    def restore(self) -> None:
        """Restore the checkpoint, and drop the log lines after it.

        Raises:
            DataError: there is no checkpoint, or its run had another seed or batch size.
        """
        path = self.checkpoint_path
        if not path.is_file():
            raise DataError(f"{path} does not exist; run without --resume to start from the beginning")
        state = torch.load(path, weights_only=True)
        if state["stream"] != self.stream:
            raise DataError(f"{path} was made with {state['stream']}, this run has {self.stream}; use the same")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.train_s = state["step"], state["train_s"]
        lines = [line for line in self._log_lines() if json.loads(line).get("step", 0) <= self.step]
        write_bytes_atomic(self.log_path, "".join(lines).encode())

    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs, whole or not at all."""
        buffer = io.BytesIO()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"step": self.step, "train_s": self.train_s, "stream": self.stream}, buffer)
        write_bytes_atomic(self.checkpoint_path, buffer.getvalue())

    def log(self, **fields: Any) -> None:
        """Append a JSON line to the log and to stderr."""
        line = json.dumps(fields)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        sys.stderr.write(f"{line}\n")

    def train(self, stream: Iterable[BatchT]) -> None:
        """Take the remaining steps."""
        started, saved, losses = time.monotonic(), time.monotonic(), []
        first, before_s = self.step, self.train_s
        for batch in stream:
            losses.append(self.take_step(batch))
            self.step += 1
            self.train_s = before_s + time.monotonic() - started
            if self.step % self.settings.log_every == 0:
                speed = (self.step - first) * self.settings.batch_size / (time.monotonic() - started)
                self._log_progress(float(np.mean(losses)), speed)
                losses.clear()
            if time.monotonic() - saved > self.settings.checkpoint_every_s:
                self.save_checkpoint()
                saved = time.monotonic()
        self.save_checkpoint()

    def _log_progress(self, loss: float, images_per_s: float) -> None:
        fields: dict[str, Any] = {"step": self.step, "images": self.step * self.settings.batch_size}
        fields |= {"loss": round(loss, 4), "images_per_s": round(images_per_s, 1), "train_s": round(self.train_s)}
        if self.step % self.settings.evaluate_every == 0:
            fields |= self.measure()
        self.log(**fields)

    def _log_lines(self) -> list[str]:
        return self.log_path.read_text(encoding="utf-8").splitlines(keepends=True) if self.log_path.is_file() else []


def decayed_optimizer(model: nn.Module, settings: RunSettings, *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW without weight decay for biases, norms and scalars."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float) -> float:
    """Take one optimiser step down the loss, with gradients clipped to norm 1, and return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def round_to_half(model: nn.Module) -> None:
    """Round every weight to float16 in place: what is measured is what the file holds."""
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.half())


def parsed_settings(
    program: str, description: str | None, stages: Mapping[str, SettingsT]
) -> tuple[dict[str, Any], list[SettingsT]]:
    """Parse the command line of a training: `--out`, `--resume`, `--workers` and an option for every setting.

    `stages` are the default settings by the prefix of their options, such as "denoiser-". Returns the options, and the
    settings of each stage.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of everything that is written")
    parser.add_argument("--resume", action="store_true", help="continue what --out holds")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures (default: 1)")
    for prefix, defaults in stages.items():
        for name, value in dataclasses.asdict(defaults).items():
            parser.add_argument(
                f"--{prefix}{name.replace('_', '-')}",
                dest=prefix + name,
                type=type(value),
                default=value,
                metavar=type(value).__name__.upper(),
                help="default: %(default)s",
            )
    options = vars(parser.parse_args())
    return options, [
        dataclasses.replace(defaults, **{name: options[prefix + name] for name in dataclasses.asdict(defaults)})
        for prefix, defaults in stages.items()
    ]
