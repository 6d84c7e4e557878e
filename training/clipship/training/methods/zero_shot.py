"""Zero-shot CLIP: the data set's templates, nothing learned (arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from clipship.training.config import MethodSettings
from clipship.training.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(MethodSettings):
    """None beyond those of the run."""

    method = "zero-shot"


class ZeroShot(Method):
    """CLIP as it is; several templates are averaged."""

    Settings = ZeroShotSettings
