"""The synthetic set that a run learns from."""

from __future__ import annotations

from pathlib import Path

from clipship.core.errors import DataError
from clipship.training.config import TrainConfig
from clipship.training.methods import method_named
from clipship.training.synthetic_set import SYNTHETIC, SyntheticSet


def synthetic_beside(data: Path) -> Path:
    """The default folder of a data set's synthetic images: in its folder, or beside its list of images."""
    return (data if data.is_dir() else data.parent) / SYNTHETIC


def synthetic_set_for(config: TrainConfig, folder: Path) -> SyntheticSet | None:
    """The synthetic set in ``folder``, if a run with these settings learns from one.

    Raises:
        DataError: it does, and there is none.
    """
    if not method_named(config.method).needs_synthetic or config.synthetic_shots == 0:
        return None
    if not folder.is_dir():
        raise DataError(
            f"recipe {config.recipe} learns from synthetic images and {folder} does not exist: "
            "give a synthetic set with --synthetic DIR, or make one with clipship synthesize"
        )
    return SyntheticSet.load(folder)
