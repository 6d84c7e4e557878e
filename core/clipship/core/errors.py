"""The exceptions a user can meet, and their exit codes.

::

    ClipshipError                 exit 1
    |-- UsageError (ValueError)   exit 2   what was given cannot be used
    |   |-- DataError                      a data set, image folder or split file
    |   |-- RecipeError                    a recipe, or a model it cannot run on
    |   |-- CheckpointError                a checkpoint that does not fit or is damaged
    |   |-- BundleError                    a bundle that does not fit or is damaged
    |   |-- PlanError                      a TensorRT plan that is damaged, or for another GPU, runtime or bundle
    |   `-- MissingExtraError              an optional package is not installed
    `-- CheckFailed               exit 1   the input was usable, a check failed

The stages derive their own errors from these (``clipship.serving.errors``). Every message says what was given, what is
accepted and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipshipError(Exception):
    """Root of all errors that are reported as one line."""

    exit_code = 1


class UsageError(ClipshipError, ValueError):
    """What was given cannot be used."""

    exit_code = 2


class DataError(UsageError):
    """A data set, an image folder or a split file cannot be used."""


class RecipeError(UsageError):
    """A recipe is unknown, contradicts itself or cannot run on the model."""


class CheckpointError(UsageError):
    """A checkpoint is damaged or belongs to another model."""


class BundleError(UsageError):
    """A bundle is damaged or of another format version."""


class PlanError(UsageError):
    """A TensorRT plan is damaged, or for another GPU, runtime or bundle."""


class MissingExtraError(UsageError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run pip install 'clipship[{extra}]'")


class CheckFailed(ClipshipError):
    """A check ran and failed."""


def near(given: str, accepted: Iterable[str]) -> str:
    """The end of an "unknown name" message: the near names, or all of them when none is near."""
    names = sorted(accepted)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"accepted: {', '.join(names)}"
