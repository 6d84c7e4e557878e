"""Reduced precision around a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products of the body in ``precision`` ("fp32": untouched); learned tensors stay float32."""
    with torch.autocast(device.type, dtype=_TYPES.get(precision, torch.bfloat16), enabled=precision in _TYPES):
        yield
