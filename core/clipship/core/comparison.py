"""Verification: samples run through a runner, compared with a reference, as objects that know their verdict.

Tolerances and cosines are those of ``clipship/core/tolerances.py``.

**Few images.** A share of 99.8 % cannot be reached with one of 8 images changed, nor with one of 499: below 500 images
the gate means "all".

**Near-ties.** If two classes are nearly equal, an error within tolerance picks either. A changed best class is
*excused* if the expected logits of the two classes differ by no more than an error within the tolerance typically moves
them: an error of length e in a random direction of D dimensions moves the margin between the classes i and j with a
standard deviation of ``logit_scale e |t_i - t_j| / sqrt(D)``. One such deviation is excused. (The largest move, of an
error that points from one class to the other, is sqrt(D) times that; excusing it would excuse everything that the
cosine gate lets through, and the top-1 gate could never fail.) float32's rounding of a logit is added: of two names
that are nearly one word, either may win. A classifier's cache is left out of that estimate, which makes it stricter.
The gate counts what is not excused; the raw agreement is shown beside it.

Shape legend: N inputs, C classes, D features, H = W pixels, k best classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import GOLDEN, Bundle, VocabularyFeatures
from clipship.core.errors import CheckFailed
from clipship.core.machine.runtimes import Run
from clipship.core.tolerances import (
    GATES,
    TOLERANCES,
    Tolerance,
    array_problem,
    broken_gates,
    closeness,
    finite_or_none,
)

BATCH_SIZES = (1, 2, 7, 64)
"""One, the smallest batch, one that divides nothing, and the default maximum of a server."""
WORST_KEPT = 3
"""Images that a comparison remembers."""

_FEW = 16  # rows at every batch size but the largest: those show that a batch size works, the largest that all rows do
_TOP = 5
_PLAIN_SCALE = 100.0  # the logit scale of every published CLIP, used if only references are given
_ROUNDED = 8 * float(np.finfo(np.float32).eps)  # a few steps of the last digit of a float32 cosine


@dataclass(frozen=True, kw_only=True)
class Worst:
    """One of the inputs that differ most."""

    position: int
    """Among the inputs."""
    cosine: float
    """Centred if that is measured."""
    expected: tuple[int, ...]
    """The reference's best classes, best first."""
    given: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Outcome(ABC):
    """What both kinds of comparison measure. True when within tolerance.

    A number that was not measured is NaN, and null in JSON.
    """

    what: str
    """The set of samples."""
    provider: str
    batch_size: int
    count: int
    """Different inputs."""
    tolerance: Tolerance
    top1_agreement: float = math.nan
    """The raw share of inputs whose best class is the same."""
    top1_excused: float = 0.0
    """The share of inputs whose best class changed between near-ties."""
    top5_agreement: float = math.nan
    """The mean share of the best classes that are the same: of five, or of those that a server returns."""
    problem: str = ""
    """Why there are no numbers, or empty."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Each gate that failed, with its number and its limit."""
        if self.problem:
            return (self.problem,)
        failed = self._broken()
        counted = self.top1_agreement + self.top1_excused
        if not counted >= self.tolerance.top1_agreement - 1e-9:  # a sum of two shares
            failed.append(f"top-1 {100 * counted:.2f} %, limit {100 * self.tolerance.top1_agreement:g} %")
        return tuple(failed)

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        head = f"{'ok    ' if self else 'FAILED'} {self.what:<22} {self.provider:<21} batch {self.batch_size:<3} "
        return head + (f"{self._subject()} {self.problem}" if self.problem else self._numbers())

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every number and the verdict."""
        numbers = {field.name: finite_or_none(getattr(self, field.name)) for field in fields(self)}
        tolerance = self.tolerance.to_json()
        return {**numbers, "tolerance": tolerance, "passed": bool(self), "failures": list(self.failures)}

    @abstractmethod
    def _subject(self) -> str:
        """What has no numbers."""

    @abstractmethod
    def _numbers(self) -> str:
        """The numbers for people."""

    @abstractmethod
    def _broken(self) -> list[str]:
        """The failed gates but top-1."""


@dataclass(frozen=True, kw_only=True)
class Comparison(_Outcome):
    """The features of one variant against its reference, on one set of inputs at one batch size."""

    max_abs: float = math.nan
    min_cosine: float = math.nan
    form: str = ""
    """The file."""
    reference: str = "PyTorch"
    """Where the expected features come from."""
    mean_cosine: float = math.nan
    min_centred_cosine: float = math.nan
    mean_centred_cosine: float = math.nan
    max_norm_error: float = math.nan
    max_logit_difference: float = math.nan
    worst: tuple[Worst, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every number and the verdict."""
        return {**super().to_json(), "worst": [asdict(one) for one in self.worst]}

    def _subject(self) -> str:
        return self.form

    def _numbers(self) -> str:
        return (
            f"n {self.count:<5} max diff {self.max_abs:.1e}  min cosine {self.min_cosine:.7f}  "
            f"top-1 {100 * self.top1_agreement:.2f} %"
        )

    def _broken(self) -> list[str]:
        return list(broken_gates({name: getattr(self, name) for name in GATES}, self.tolerance))


@dataclass(frozen=True, kw_only=True)
class Answers(_Outcome):
    """A server's classes and scores against the expected ones; the best two count as a near-tie within max_score."""

    model: str
    """The served model."""
    max_score_difference: float = math.nan
    """Between a returned probability and the expected one of the class that the returned *label* names."""
    mislabelled: int = 0
    """Returned labels that are not the name of the returned index."""

    def _subject(self) -> str:
        return self.model

    def _numbers(self) -> str:
        return (
            f"n {self.count:<5} {self.model}: max score diff {self.max_score_difference:.1e}  "
            f"top-1 {100 * self.top1_agreement:.2f} %  wrong labels {self.mislabelled}"
        )

    def _broken(self) -> list[str]:
        failed = [f"{self.mislabelled} labels are not their indices' names"] if self.mislabelled else []
        if not self.max_score_difference <= self.tolerance.max_score:
            failed.append(f"score difference {self.max_score_difference:.3g}, limit {self.tolerance.max_score:g}")
        return failed


@dataclass(frozen=True)
class Verification:
    """All comparisons of a bundle. True if there is at least one and all are true."""

    comparisons: tuple[Comparison, ...]
    answers: tuple[Answers, ...] = ()
    """Of a live server."""
    skipped: tuple[str, ...] = ()
    """What could not be compared on this machine, and why."""

    @property
    def rows(self) -> tuple[Comparison | Answers, ...]:
        """Comparisons and answers."""
        return (*self.comparisons, *self.answers)

    def __bool__(self) -> bool:
        return bool(self.rows) and all(self.rows)

    def __add__(self, other: Verification) -> Verification:
        return Verification(
            (*self.comparisons, *other.comparisons),
            (*self.answers, *other.answers),
            tuple(dict.fromkeys((*self.skipped, *other.skipped))),
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), *(f"not compared: {reason}" for reason in self.skipped)])

    def to_json(self) -> dict[str, Any]:
        """The content of ``verification.json``."""
        return {
            "passed": bool(self),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "answers": [answer.to_json() for answer in self.answers],
            "skipped": list(self.skipped),
        }


def compare_features(
    what: str,
    provider: str,
    batch_size: int,
    expected: NDArray[np.float32],
    given: NDArray[np.float32],
    *,
    references: NDArray[np.float32] | VocabularyFeatures,
    tolerance: Tolerance,
    form: str = "",
    reference: str = "PyTorch",
    count: int | None = None,
) -> Comparison:
    """Compare unit features [N, D]; a wrong shape or type, NaN or infinity make the comparison false.

    Args:
        references: a bundle's classifier, or unit features [C, D] (logit scale 100), which give the best classes.
        count: how many of the inputs are different, if they were repeated to fill a batch; None: all.
    """
    about: dict[str, Any] = {
        "what": what,
        "provider": provider,
        "batch_size": batch_size,
        "count": count or len(expected),
        "tolerance": tolerance,
        "form": form,
        "reference": reference,
    }
    problem = array_problem(expected, given)
    if problem:
        return Comparison(**about, problem=problem)
    close = closeness(expected, given)
    tops, numbers = _class_numbers(expected, given, _classifier(references), tolerance)
    worst = _worst(close.to_rank_by(), tops, count or len(expected))
    return Comparison(**about | close.numbers() | numbers, worst=worst)


def _classifier(references: NDArray[np.float32] | VocabularyFeatures) -> VocabularyFeatures:
    if isinstance(references, VocabularyFeatures):
        return references
    return VocabularyFeatures(features=references, logit_scale=_PLAIN_SCALE)


@dataclass(frozen=True)
class _Tops:
    expected: NDArray[np.int64]
    """[N, k]"""
    given: NDArray[np.int64]


def _class_numbers(
    expected: NDArray[np.float32], given: NDArray[np.float32], classifier: VocabularyFeatures, tolerance: Tolerance
) -> tuple[_Tops, dict[str, Any]]:
    logits, others = classifier.logits(expected), classifier.logits(given)
    tops = _Tops(_top(logits), _top(others))
    changed = tops.expected[:, 0] != tops.given[:, 0]
    excused = changed & _near_ties(expected, logits, tops, classifier, tolerance)
    return tops, {
        "top1_agreement": float(1 - changed.mean()),
        "top1_excused": float(excused.mean()),
        "top5_agreement": _overlap(tops),
        "max_logit_difference": float(np.abs(logits - others).max()),
    }


def _top(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best classes [N, k], best first; ties go to the first class."""
    best: NDArray[np.int64] = np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]
    return best


def _overlap(tops: _Tops) -> float:
    same = (tops.expected[:, :, None] == tops.given[:, None, :]).any(axis=2)
    return float(same.mean())


def _near_ties(
    expected: NDArray[np.float32],
    logits: NDArray[np.float32],
    tops: _Tops,
    classifier: VocabularyFeatures,
    tolerance: Tolerance,
) -> NDArray[np.bool_]:
    """Whether the expected logits of the two best classes [N] differ by less than an error within tolerance."""
    dim = expected.shape[1]
    first, second = tops.expected[:, :1], tops.given[:, :1]
    margin = np.take_along_axis(logits, first, 1) - np.take_along_axis(logits, second, 1)
    apart = np.linalg.norm(classifier.features[first[:, 0]] - classifier.features[second[:, 0]], axis=1)
    lengths = np.linalg.norm(expected.astype(np.float64) - expected.mean(axis=0), axis=1)
    moved = classifier.logit_scale * (tolerance.error_lengths(lengths, dim) * apart / math.sqrt(dim) + _ROUNDED)
    near: NDArray[np.bool_] = margin[:, 0] <= moved
    return near


def _worst(ranks: NDArray[np.float64], tops: _Tops, count: int) -> tuple[Worst, ...]:
    lowest: dict[int, int] = {}
    for row in np.argsort(ranks, kind="stable").tolist():
        lowest.setdefault(row % count, row)  # repeated inputs are one
        if len(lowest) == WORST_KEPT:
            break
    return tuple(
        Worst(
            position=position,
            cosine=float(ranks[row]),
            expected=tuple(tops.expected[row].tolist()),
            given=tuple(tops.given[row].tolist()),
        )
        for position, row in lowest.items()
    )


def compare_answers(
    answers: Answers,
    expected_scores: NDArray[np.float32],
    names: Sequence[str],
    scores: NDArray[np.float32],
    indices: NDArray[np.int64],
    labels: Sequence[Sequence[str]],
) -> Answers:
    """``answers`` with its numbers: a server's best k classes [N, k] against the probabilities [N, C] of all ``names``.

    Labels are looked up by name: a wrong one is compared with the probability of the class it names.
    """
    places = {name: place for place, name in enumerate(names)}
    problem = _answer_problem(expected_scores, scores, labels, places)
    if problem:
        return replace(answers, problem=problem)
    by_label = np.array([[places[label] for label in row] for row in labels])
    by_place = np.take_along_axis(expected_scores, by_label, axis=1)
    best = np.argsort(-expected_scores, axis=1, kind="stable")[:, : scores.shape[1]]
    changed = best[:, 0] != by_label[:, 0]
    gap = expected_scores.max(axis=1) - by_place[:, 0]
    return replace(
        answers,
        max_score_difference=float(np.abs(by_place - scores).max()),
        top1_agreement=float(1 - changed.mean()),
        top1_excused=float((changed & (gap <= answers.tolerance.max_score)).mean()),
        top5_agreement=_overlap(_Tops(best, by_label)),
        mislabelled=int((by_label != indices).sum()),
    )


def _answer_problem(
    expected_scores: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: Sequence[Sequence[str]],
    places: Mapping[str, int],
) -> str:
    if len(scores) != len(expected_scores):
        return f"gives {len(scores)} answers for {len(expected_scores)} images"
    if not np.isfinite(scores).all():
        return "gives NaN or infinite scores"
    unknown = sorted({label for row in labels for label in row} - set(places))
    return f"gives the label {unknown[0]!r}, which is not in the vocabulary" if unknown else ""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What turns inputs into features: a variant loaded by a runtime, or a server."""

    name: str
    """The provider, runtime or server, for tables."""
    run: Run


def run_in_batches(run: Run, rows: NDArray[Any], batch_size: int) -> NDArray[np.float32]:
    """``run`` over ``rows`` in batches of ``batch_size``; the last one may be smaller."""
    parts = [run(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class VerificationSamples:
    """Images and the features that every variant must give for them."""

    what: str
    """ "golden samples" or "images"."""
    names: tuple[str, ...]
    files: tuple[bytes, ...]
    """Encoded images."""
    pixels: NDArray[np.uint8]
    """[N, H, W, 3]."""
    expected: NDArray[np.float32]
    """Unit features [N, D]."""
    reference: str
    """Where ``expected`` comes from."""


def golden_samples(bundle: Bundle) -> VerificationSamples:
    """The bundle's golden samples, with PyTorch's features."""
    golden = bundle.golden()
    return VerificationSamples(
        what="golden samples",
        names=golden.files,
        files=tuple((bundle.path / GOLDEN / name).read_bytes() for name in golden.files),
        pixels=golden.pixels,
        expected=golden.embedding,
        reference="PyTorch",
    )


def batch_sizes_up_to(largest: int) -> tuple[int, ...]:
    """1, 2, 7 and ``largest``, none above it."""
    return tuple(sorted({size for size in BATCH_SIZES[:3] if size < largest} | {largest}))


def verify_runner(
    runner: Runner,
    what: str,
    rows: NDArray[Any],
    expected: NDArray[np.float32],
    *,
    references: NDArray[np.float32] | VocabularyFeatures,
    tolerance: Tolerance,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    form: str = "",
    reference: str = "PyTorch",
) -> tuple[Comparison, ...]:
    """``runner`` against ``expected`` [N, D]: a comparison per batch size, false if the run fails.

    All of ``rows`` [N, ...] are run at the largest batch size, the first 16 at the others. A set smaller than a batch
    is repeated until it fills one.
    """
    largest = max(batch_sizes)

    def compared(batch_size: int) -> Comparison:
        used = len(rows) if batch_size == largest else min(len(rows), _FEW)
        about: dict[str, Any] = {"tolerance": tolerance, "form": form, "reference": reference, "count": used}
        count = max(used, batch_size)  # repeated until they fill one batch
        try:
            given = run_in_batches(runner.run, _repeated(rows, count), batch_size)
        except CheckFailed as error:
            return Comparison(what=what, provider=runner.name, batch_size=batch_size, problem=str(error), **about)
        wanted = _repeated(expected, count)
        return compare_features(what, runner.name, batch_size, wanted, given, references=references, **about)

    return tuple(compared(batch_size) for batch_size in batch_sizes)


def _repeated(rows: NDArray[Any], count: int) -> NDArray[Any]:
    return rows[:count] if count <= len(rows) else rows[np.arange(count) % len(rows)]


def verify_samples(
    runner: Runner,
    form: str,
    samples: Sequence[VerificationSamples],
    classifier: VocabularyFeatures,
    precision: str,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Verification:
    """``runner`` on every set of ``samples`` at every batch size, within the tolerance of ``precision``."""
    return Verification(
        tuple(
            comparison
            for one in samples
            for comparison in verify_runner(
                runner,
                one.what,
                one.pixels,
                one.expected,
                references=classifier,
                tolerance=TOLERANCES[precision],
                batch_sizes=batch_sizes,
                form=form,
                reference=one.reference,
            )
        )
    )
