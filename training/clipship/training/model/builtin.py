"""The built-in models: their names, and where their weights lie.

The weights are a distribution of their own, ``clipship-models``, so that a client does not carry them.
"""

from __future__ import annotations

from pathlib import Path

from clipship.core.errors import MissingExtraError

TINY = "clipship-tiny"
"""The built-in CLIP."""

TINY_DIFFUSION = "clipship-tiny-diffusion"
"""The built-in text-to-image pipeline, in diffusers' folder format."""

MODELS: Path = Path(__file__).resolve().parents[2] / "models"


def builtin_folder(name: str) -> Path:
    """The folder of the built-in model ``name``.

    Raises:
        MissingExtraError: clipship-models is not installed.
    """
    if not (MODELS / name).is_dir():
        raise MissingExtraError("clipship-models", "demo")
    return MODELS / name
