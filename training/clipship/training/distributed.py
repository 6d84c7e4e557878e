"""One process or many, through ``accelerate``.

Started by ``accelerate launch`` or ``torchrun``, every process takes its part of each batch and the gradients are added
up; started by itself, a run is one process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from clipship.training.model.clip import default_device


class Distributed:
    """The processes of a run, seen from one of them."""

    def __init__(self, device: str | None = None) -> None:
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        alone = torch.device(device or default_device())
        self.device: torch.device = alone if self._accelerator is None else self._accelerator.device
        self.rank: int = 0 if self._accelerator is None else self._accelerator.process_index
        self.count: int = 1 if self._accelerator is None else self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """``value`` added up over all processes."""
        if self._accelerator is None:
            return value
        total: Tensor = self._accelerator.reduce(value, reduction="sum")
        return total

    def wait(self) -> None:
        """Wait for all processes."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
