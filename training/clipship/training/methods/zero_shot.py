"""Zero-shot CLIP: the data set's templates, nothing learned (arXiv 2103.00020)."""

from __future__ import annotations

from clipship.training.methods.base import Method


class ZeroShot(Method):
    """Plain CLIP; several templates are averaged."""

    name = "zero-shot"
