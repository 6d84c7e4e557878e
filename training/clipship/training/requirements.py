"""Checks before a command starts: PyTorch, open_clip and the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipship.core.errors import MissingExtraError, UsageError


@contextmanager
def needs_training() -> Iterator[None]:
    """Turn a missing PyTorch or open_clip into an error that says what to install."""
    try:
        import open_clip
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "training") from error
    del open_clip
    yield


def validated_device(name: str | None) -> str | None:
    """``name``, if PyTorch has that device."""
    if name is None:
        return None
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}: give cpu, cuda or cuda:N") from error
    return name
