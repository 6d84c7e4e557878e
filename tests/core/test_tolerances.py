"""The one table of tolerances, and who is out of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from clipship.core.tolerances import (
    TOLERANCES,
    classes_problem,
    encoder_problem,
    golden_problem,
    pixels_problem,
    tolerance_of,
)

IMAGES, DIM = 8, 512
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / norms).astype(np.float32)


def features() -> NDArray[np.float32]:
    """As CLIP's: unit length, and most of it shared."""
    draws = np.random.default_rng(0)
    return unit((2 * draws.normal(size=DIM) + draws.normal(size=(IMAGES, DIM))).astype(np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_five_per_cent_are_out_of_every_tolerance(precision: str) -> None:
    right = features()
    direction = unit(np.random.default_rng(1).normal(size=(1, DIM)).astype(np.float32))
    each = unit(np.random.default_rng(2).normal(size=(IMAGES, DIM)).astype(np.float32))
    assert golden_problem(right, right.copy(), precision) == ""
    assert "max_norm_error 0.05, limit" in golden_problem(right, right * np.float32(1.05), precision)
    assert "cosine" in golden_problem(right, unit(right + np.float32(0.05) * direction), precision)
    assert "cosine" in golden_problem(right, unit(right + np.float32(0.05) * each), precision)
    assert "NaN" in golden_problem(right, np.full_like(right, math.nan), precision)
    assert "instead of float32" in golden_problem(right, right.astype(np.float64), precision)


def turned(right: NDArray[np.float32], cosine: float) -> NDArray[np.float32]:
    """``right`` moved so that every centred cosine is ``cosine``."""
    away = right - right.mean(axis=0)
    across = np.random.default_rng(3).normal(size=right.shape).astype(np.float32)
    across -= (across * away).sum(axis=1, keepdims=True) / (away * away).sum(axis=1, keepdims=True) * away
    tangent = np.float32(math.tan(math.acos(cosine)))
    moved: NDArray[np.float32] = right + unit(across) * np.linalg.norm(away, axis=1, keepdims=True) * tangent
    return moved


def test_few_images_are_centred_as_all_are_and_held_to_no_mean() -> None:
    right = features()
    assert golden_problem(right, unit(turned(right, 0.997)), "int8") == "", "a mean of 8 images, where 0.998 is asked"
    assert "mean_centred_cosine 0.995, limit 0.997" in golden_problem(right, unit(turned(right, 0.995)), "int8")
    assert golden_problem(right, unit(turned(right, 0.995))[:2], "int8") == ""
    assert "min_centred_cosine 0.98, limit 0.99" in golden_problem(right, unit(turned(right, 0.98))[:2], "int8")


def test_a_batch_is_filled_with_repeated_images() -> None:
    right = features()
    pixels = np.arange(IMAGES, dtype=np.uint8).reshape(IMAGES, 1, 1, 1)
    seen: list[int] = []

    def encode(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(len(rows))
        answers = right[rows[:, 0, 0, 0]]
        return answers if len(rows) < 11 else answers[::-1]

    assert [encoder_problem(encode, pixels, right, "fp32", count) for count in (1, 8, 10)] == ["", "", ""]
    assert encoder_problem(encode, pixels, right, "fp32", 11).endswith("(a batch of 11)")
    assert seen == [1, 8, 10, 11]


def test_the_widest_of_several_plans_counts() -> None:
    assert tolerance_of("int8") is TOLERANCES["int8"]
    assert tolerance_of("bf16, fp16") is TOLERANCES["bf16"]
    assert tolerance_of("fp16, fp32") is TOLERANCES["fp16"]


def test_pixels_may_differ_by_rounding() -> None:
    right = np.random.default_rng(0).integers(0, 250, size=(2, 8, 8, 3), dtype=np.uint8)
    assert pixels_problem(right, right + np.uint8(2)) == ""
    assert pixels_problem(right, right + np.uint8(3)) == "golden pixels differ by 3 of 255, limit 2"
    assert "differ by" in pixels_problem(right, np.ascontiguousarray(right[..., ::-1]))
    assert "instead of" in pixels_problem(right, right[:, :4])


NAMES = ("a", "b", "ü")
TRUTH = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], np.float32)


@pytest.mark.parametrize(
    ("scores", "indices", "labels", "problem"),
    [
        ([[0.5, 0.3], [0.4, 0.4]], [[0, 1], [0, 1]], [["a", "b"], ["a", "b"]], ""),
        ([[0.5, 0.3], [0.4, 0.4]], [[0, 1], [1, 0]], [[b"a", b"b"], [b"b", b"a"]], ""),
        ([[0.5, 0.3], [0.4, 0.4]], [[0, 1], [0, 1]], [["a", "b"], ["b", "a"]], "labels are not the vocabulary's"),
        ([[0.5, 0.3], [0.4, 0.4]], [[1, 0], [0, 1]], [["b", "a"], ["a", "b"]], "scores differ from the golden ones by"),
        ([[0.5, 0.2], [0.4, 0.4]], [[0, 2], [0, 1]], [["a", "ü"], ["a", "b"]], "scores differ from the golden ones by"),
        ([[0.5, 0.3], [0.4, 0.4]], [[0, 1], [0, 3]], [["a", "b"], ["a", "b"]], "classes that the vocabulary does not"),
        ([[math.nan, 0.3], [0.4, 0.4]], [[0, 1], [0, 1]], [["a", "b"], ["a", "b"]], "scores differ"),
        ([[0.5, 0.3]], [[0, 1]], [["a", "b"]], "classes that the vocabulary does not have"),
    ],
)
def test_classes(
    scores: list[list[float]], indices: list[list[int]], labels: list[list[str | bytes]], problem: str
) -> None:
    given = (np.array(scores, np.float32), np.array(indices), np.array(labels, np.object_))
    said = classes_problem(TRUTH, NAMES, *given, limit=1e-4)
    assert said.startswith(problem) if problem[:6] in ("labels", "scores") else problem in said
    assert bool(said) == bool(problem)
