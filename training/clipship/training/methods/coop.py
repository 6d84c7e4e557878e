"""CoOp: learned context words, one set for all classes, class name at the end (arXiv 2109.01134)."""

from __future__ import annotations

from clipship.training.methods.prompted import ContextSettings, LearnedContext


class CoOp(LearnedContext):
    """Context [J, M, text width] in the place of "a photo of a"; published with J = 1.

    Deeper it is the "deep language prompting" of arXiv 2210.03117.
    """

    name = "coop"
    settings_type = ContextSettings
