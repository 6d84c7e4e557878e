"""Layers initialised from an explicit generator, never the global one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    """Weights or biases of a linear layer, drawn as PyTorch draws them: U(-1, 1) / sqrt(inputs)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with bias, drawn as PyTorch draws it."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(uniform((outputs, inputs), inputs, generator))
        layer.bias.copy_(uniform((outputs,), inputs, generator))
    return layer


def normal_linear(inputs: int, outputs: int, std: float, generator: torch.Generator) -> nn.Linear:
    """A linear layer with weights from N(0, std) and biases 0."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
