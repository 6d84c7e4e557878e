"""How much an encoder, a decoder or a classifier may differ from its reference, and whether one does.

**Cosine.** All CLIP features of one model share a large part, and in a model with random weights little else, so that
two quite different images have a cosine of 0.99 and an error hides in it. The *centred* cosine is taken after the mean
of the expected features is subtracted from both sides (from both the same, so that a constant error is seen too). It
needs two different images; where there are none it is not measured, and the plain gates stand alone.

**Golden samples.** ``pack`` and ``verify`` compare many images; a process, a model inside Triton or a server compares
the few golden ones before its first answer, see ``docs/guides/verify.md``. Problems are texts here, because this file
needs only NumPy and ``precisions.py``: copies of both lie beside the models that run inside Triton.

Shape legend: N inputs, C classes, D features, k best classes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.precisions import PRECISIONS
from clipship.core.precisions import Tolerance as Tolerance

_FLAT = 0.01  # a centred feature shorter than this is mostly rounding error: the images are as good as the same


TOLERANCES: dict[str, Tolerance] = {
    **{name: spec.tolerance for name, spec in PRECISIONS.items()},
    "text-fp32": Tolerance(max_abs=1e-5, top1_agreement=1.0),
}
"""By precision. Text features are averaged and kept, so they are held to a tenth of the image features' tolerance."""

RULE_ATOL = 1e-4
"""Of a score against the classification rule on the same embedding: float32 against float32."""

PIXEL_LIMIT = 2
"""Of 255, between two decoders of the same file: what rounding makes. A wrong crop, order or filter makes far more."""

_NEEDS_TWO = ("min_centred_cosine", "mean_centred_cosine")

GATES: Mapping[str, Callable[[float, float], bool]] = {
    **dict.fromkeys(("max_abs", "max_norm_error"), operator.le),
    **dict.fromkeys(("min_cosine", "mean_cosine", *_NEEDS_TWO), operator.ge),
}
"""The numbers of :class:`Closeness` that a :class:`Tolerance` limits, and when they hold."""


def tolerance_of(precision: str) -> Tolerance:
    """Of "fp16", say; of the precisions of several plans ("bf16, fp16") the widest."""
    known = [TOLERANCES[name] for name in precision.split(", ") if name in TOLERANCES]
    return max(known, key=lambda tolerance: tolerance.max_score, default=TOLERANCES["fp32"])


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close unit features [N, D] are to the expected ones."""

    max_abs: float
    max_norm_error: float
    cosines: NDArray[np.float64]
    """[N]"""
    centred_cosines: NDArray[np.float64]
    """[N], NaN where the image is as good as the mean."""

    def numbers(self) -> dict[str, float]:
        """By the names of :data:`GATES`; NaN is not measured."""
        measured = self.centred_cosines[~np.isnan(self.centred_cosines)]
        return {
            "max_abs": self.max_abs,
            "max_norm_error": self.max_norm_error,
            "min_cosine": float(self.cosines.min()),
            "mean_cosine": float(self.cosines.mean()),
            "min_centred_cosine": float(measured.min()) if len(measured) else math.nan,
            "mean_centred_cosine": float(measured.mean()) if len(measured) else math.nan,
        }

    def to_rank_by(self) -> NDArray[np.float64]:
        """A cosine an image [N], centred where that is measured."""
        return np.where(np.isnan(self.centred_cosines), self.cosines, self.centred_cosines)


def closeness(
    expected: NDArray[np.float32], given: NDArray[np.float32], centre: NDArray[np.float32] | None = None
) -> Closeness:
    """Of features [N, D]. In float64: near 1, float32 knows only steps of 6e-8.

    Args:
        centre: the mean [D] of more features than these; None: that of ``expected``.
    """
    first, second = expected.astype(np.float64), given.astype(np.float64)
    mean = first.mean(axis=0) if centre is None else centre.astype(np.float64)
    centred = _row_cosines(first - mean, second - mean)
    centred[np.linalg.norm(first - mean, axis=1) < _FLAT] = math.nan
    return Closeness(
        max_abs=float(np.abs(first - second).max()),
        max_norm_error=float(np.abs(np.linalg.norm(second, axis=1) - 1).max()),
        cosines=_row_cosines(first, second),
        centred_cosines=centred,
    )


def _row_cosines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products: NDArray[np.float64] = (first * second).sum(axis=1) / np.maximum(lengths, 1e-30)
    return products


def broken_gates(numbers: Mapping[str, float], tolerance: Tolerance) -> Iterator[str]:
    """Each number of a :class:`Closeness` that is out of ``tolerance``, with its limit."""
    for name, holds in GATES.items():
        given, limit = numbers[name], getattr(tolerance, name)
        unmeasured = name in _NEEDS_TWO and math.isnan(given)
        if not unmeasured and not holds(given, limit):
            yield f"{name} {_text(given)}, limit {_text(limit)}"


def _text(value: float) -> str:
    """Three digits, of the distance to 1 where a cosine is nearly that."""
    return f"1-{1 - value:.2g}" if 0.999 < value < 1 else f"{value:.3g}"


def finite_or_none(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def array_problem(expected: NDArray[Any], given: NDArray[Any]) -> str:
    """What is wrong with the shape, the type or the numbers [N, ...] themselves; empty when nothing is."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return f"gives {given.dtype} {list(given.shape)} instead of {expected.dtype} {list(expected.shape)}"
    broken = int((~np.isfinite(given).all(axis=1)).sum())
    return f"gives NaN or infinite values for {broken} of {len(given)} inputs" if broken else ""


def features_problem(
    expected: NDArray[np.float32],
    given: NDArray[np.float32],
    tolerance: Tolerance,
    centre: NDArray[np.float32] | None = None,
) -> str:
    """What is out of ``tolerance`` of unit features [N, D], centred as in :func:`closeness`; empty when nothing is."""
    problem = array_problem(expected, given)
    return problem or ", ".join(broken_gates(closeness(expected, given, centre).numbers(), tolerance))


def encoder_problem(
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    precision: str,
    count: int,
) -> str:
    """What is wrong with the output of ``encode`` for a batch of ``count`` golden images; empty when nothing is.

    Args:
        pixels: [N, H, W, 3], repeated where they are fewer than ``count``.
        expected: by PyTorch [N, D].
    """
    problem = golden_problem(expected, encode(pixels[np.arange(count) % len(pixels)]), precision)
    return problem and f"{problem} (a batch of {count})"


def golden_problem(expected: NDArray[np.float32], given: NDArray[np.float32], precision: str) -> str:
    """What is wrong with the features ``given`` [n, D] of the first n golden images; empty when nothing is.

    Args:
        expected: of all of them [N, D], by PyTorch; where n is above N they were repeated.
    """
    tolerance, total = tolerance_of(precision), len(expected)
    limits = tolerance.of_few(0 if len(given) < total else total)
    problem = features_problem(expected[np.arange(len(given)) % total], given, limits, expected.mean(axis=0))
    return problem and f"golden features are not PyTorch's: {problem}"


def pixels_problem(expected: NDArray[np.uint8], given: NDArray[np.uint8]) -> str:
    """What is wrong with decoded golden images uint8 [N, H, W, 3]; empty when nothing is."""
    problem = array_problem(expected, given)
    if problem:
        return problem
    largest = int(np.abs(expected.astype(np.int16) - given).max())
    return "" if largest <= PIXEL_LIMIT else f"golden pixels differ by {largest} of 255, limit {PIXEL_LIMIT}"


def classes_problem(
    truth: NDArray[np.float32],
    names: Sequence[str],
    scores: NDArray[np.float32],
    indices: NDArray[np.int64],
    labels: NDArray[Any],
    limit: float,
) -> str:
    """What is wrong with the best k classes [n, k] of golden images; empty when nothing is.

    Of equally good classes either may come first.

    Args:
        truth: the probabilities [n, C] of all ``names``.
        labels: as text, or as UTF-8.
        limit: of the difference of two scores.
    """
    if indices.shape[:1] != truth.shape[:1] or indices.min() < 0 or indices.max() >= len(names):
        return "answers with classes that the vocabulary does not have"
    told = [label.encode() if isinstance(label, str) else label for label in labels.flat]
    if told != [names[index].encode() for index in indices.ravel().tolist()]:
        return "labels are not the vocabulary's names at the indices"
    best = -np.sort(-truth, axis=1)[:, : scores.shape[1]]
    own = np.take_along_axis(truth, indices, axis=1)
    largest = float(max(np.abs(best - scores).max(), np.abs(own - scores).max()))
    return "" if largest <= limit else f"scores differ from the golden ones by {largest:.2g}, above {limit:g}"


def advice(precision: str) -> str:
    """What to do about an encoder that is out of tolerance."""
    other = "" if precision == "fp32" else "choose --precision fp32, "
    return f"pack the bundle again on this machine, {other}or take another version of the runtime"


def checked(path: str, problem_of: Callable[[Mapping[str, NDArray[Any]]], str], warn: Callable[[str], object]) -> str:
    """What ``problem_of`` finds with the arrays of the ``golden.npz`` at ``path``; where there is none, a warning."""
    samples = golden_arrays(path)
    if samples is None:
        warn(f"{path} is missing, so nothing was checked")
        return ""
    return problem_of(samples)


def golden_files(samples: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """The files in a ``golden.npz``, which has them as ``files``, one behind the other, and ``lengths``."""
    return [part.tobytes() for part in np.split(samples["files"], np.cumsum(samples["lengths"])[:-1])]


def golden_arrays(path: str) -> dict[str, NDArray[Any]] | None:
    """The arrays of the ``golden.npz`` at ``path``; None where there is none: repositories before 0.6 had none."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return None
