"""The state of an unfinished run on disk: everything that the next step depends on, written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipship.core.errors import CheckpointError, RecipeError
from clipship.core.files import replace_folder, write_json_atomic
from clipship.training.config import TrainConfig

_TENSORS = "state.safetensors"
_RECORD = "state.json"
_LEARNED, _OPTIMIZER, _AVERAGE = "learned.", "optimizer.", "average."

Losses = list[dict[str, float]]


@dataclass
class Position:
    """The progress of a run."""

    epoch: int = 1
    """The epoch that is being learned."""
    step: int = 0
    """Steps of it that are done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Losses of those steps, added up."""
    losses: Losses = field(default_factory=list)
    """One record an epoch that is done."""


class WeightAverage:
    """The Gaussian-weighted average of a module's parameters over epochs (PromptSRC, arXiv 2307.06948)."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        epochs = range(1, config.epochs + 1)
        bell = [math.exp(-0.5 * ((epoch - config.average_mean) / config.average_std) ** 2) for epoch in epochs]
        self._weights = [one / sum(bell) for one in bell]
        self._module = module
        self.tensors = {name: torch.zeros_like(value) for name, value in module.named_parameters()}

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Add the parameters at the end of ``epoch`` (from 1)."""
        for name, value in self._module.named_parameters():
            self.tensors[name].add_(value, alpha=self._weights[epoch - 1])

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the parameters by the average."""
        for name, value in self._module.named_parameters():
            value.copy_(self.tensors[name])


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What changes from step to step."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None

    def save(self, folder: Path, identity: Mapping[str, Any], position: Position) -> None:
        """Write everything to ``folder``, in the place of an older state."""
        from safetensors.torch import save

        record = {"run": dict(identity), "position": asdict(position), "scaler": self.scaler.state_dict()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(folder) as new:
            (new / _TENSORS).write_bytes(save(self._tensors()))
            write_json_atomic(new / _RECORD, record)

    def restore(self, folder: Path, identity: Mapping[str, Any], device: torch.device) -> Position:
        """Restore everything; returns the position of the run.

        Raises:
            CheckpointError: the state is damaged.
            RecipeError: it belongs to a run with other settings or data.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS, device=str(device))
            same_run, position = record["run"] == dict(identity), Position(**record["position"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}): delete it and start again") from error
        if not same_run:
            raise RecipeError(f"{folder} is of a run with other settings or data: give another folder")
        self._load(tensors, record["scaler"])
        return position

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {_LEARNED + name: value for name, value in self.module.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                if value is not None:  # SGD without momentum keeps an empty slot
                    tensors[f"{_OPTIMIZER}{number}.{name}"] = value
        if self.average is not None:
            tensors |= {_AVERAGE + name: value for name, value in self.average.tensors.items()}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def _load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        self.module.load_state_dict(_below(_LEARNED, tensors))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(_OPTIMIZER, tensors).items():
            number, _, slot = name.partition(".")
            slots.setdefault(int(number), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.average is not None:
            self.average.tensors = {name: value.clone() for name, value in _below(_AVERAGE, tensors).items()}
        if scaler:
            self.scaler.load_state_dict(dict(scaler))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
