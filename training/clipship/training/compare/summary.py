"""Means and spreads over seeds and data sets, as in the papers.

An average over data sets is taken for each seed first. A harmonic mean is that of the averages; its spread is that of
the harmonic means of the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from clipship.training.compare.grid import OWN, Synthetic
from clipship.training.compare.results import RunResult
from clipship.training.evaluation.evaluate import harmonic_mean

AVERAGE = "average"
ACCURACIES = ("base", "new", "open_base", "open_new", "all", "seen", "unseen", "ece_before", "ece_after")
HARMONIC = {
    "harmonic_mean": ("base", "new"),
    "open_harmonic_mean": ("open_base", "open_new"),
    "generalised_harmonic_mean": ("unseen", "seen"),
}
"""Their two halves."""

Numbers = Mapping[str, float | None]
"""One seed's, by name."""


class Variant(NamedTuple):
    """What the runs of one row have in common besides the data set; they differ in their seeds."""

    recipe: str
    shots: int
    synthetic: Synthetic = OWN

    @property
    def label(self) -> str:
        """The recipe, and the synthetic images it had."""
        return self.recipe if self.synthetic.shots is None else f"{self.recipe}, {self.synthetic}"


def variant_of(result: RunResult) -> Variant:
    """The variant that a run is of."""
    return Variant(result.recipe, result.shots, result.synthetic)


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A mean over seeds."""

    mean: float
    spread: float | None
    """Sample standard deviation; None with one seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.spread is None else f"{self.mean:.2f} ± {self.spread:.2f}"


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """What a variant reaches on one data set, or on average."""

    dataset: str
    variant: Variant
    stats: Mapping[str, Stat | None]
    """By name, those of :data:`ACCURACIES` and :data:`HARMONIC`."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the unrounded numbers."""
        recipe, shots, (synthetic_shots, synthetic_filter) = self.variant
        return {
            "dataset": self.dataset,
            "recipe": recipe,
            "shots": shots,
            "synthetic_shots": synthetic_shots,
            "synthetic_filter": synthetic_filter,
            "stats": asdict(self)["stats"],
        }


def row_of(dataset: str, variant: Variant, seeds: Sequence[Numbers]) -> SummaryRow:
    """The means over ``seeds``; a number that one seed lacks has none."""
    stats = {name: _stat([one.get(name) for one in seeds]) for name in ACCURACIES}
    for name, (first, second) in HARMONIC.items():
        stats[name] = _harmonic_stat(stats[first], stats[second], seeds, name)
    return SummaryRow(dataset=dataset, variant=variant, stats=stats)


def _stat(values: Sequence[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Stat(mean=statistics.mean(known), spread=spread, seeds=len(known))


def _harmonic_stat(first: Stat | None, second: Stat | None, seeds: Sequence[Numbers], name: str) -> Stat | None:
    """The harmonic mean of two averages."""
    if first is None or second is None:
        return None
    halves = [[one[half] for half in HARMONIC[name]] for one in seeds]
    each = _stat([harmonic_mean(a, b) for a, b in halves if a is not None and b is not None])
    return Stat(
        mean=harmonic_mean(first.mean, second.mean), spread=None if each is None else each.spread, seeds=first.seeds
    )


def averaged(datasets: Sequence[Mapping[int, Numbers]]) -> list[Numbers]:
    """For every seed that all data sets have, the mean over them of what all of them have."""
    shared = set.intersection(*(set(seeds) for seeds in datasets)) if datasets else set()
    return [_mean_over([seeds[seed] for seeds in datasets]) for seed in sorted(shared)]


def _mean_over(datasets: Sequence[Numbers]) -> Numbers:
    values = {name: [one.get(name) for one in datasets] for name in ACCURACIES}
    known = {name: [value for value in each if value is not None] for name, each in values.items()}
    return {name: statistics.mean(each) if len(each) == len(datasets) else None for name, each in known.items()}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy of a recipe against the number of images: a line of a figure, a row of a table."""

    recipe: str
    label: str
    points: Mapping[int, Variant]
    """By number of images a class, real or synthetic ones."""
    filtered: bool = True
    level: bool = False
    """Whether the recipe learns from none of the images: its one point holds for all numbers."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows of a comparison, and what they were computed from."""

    protocol: str
    recipes: tuple[str, ...]
    datasets: tuple[str, ...]
    """Names in the order they were given; for cross-dataset the source is first."""
    results: tuple[RunResult, ...]

    @property
    def source(self) -> str | None:
        """The only data set that was learned from, if the others are for testing."""
        return self.datasets[0] if self.protocol == "cross-dataset" else None

    @property
    def targets(self) -> tuple[str, ...]:
        """The data sets that an average is over."""
        return self.datasets[1:] if self.source else self.datasets

    def shots(self, recipe: str) -> list[int]:
        """The numbers of images a class that ``recipe`` was run with."""
        return sorted({one.shots for one in self.results if one.recipe == recipe})

    def variants(self) -> list[Variant]:
        """All variants that were run, recipe by recipe."""
        found = {variant_of(one) for one in self.results if one.recipe in self.recipes}
        return sorted(found, key=lambda one: (self.recipes.index(one.recipe), one.shots, _place(one.synthetic)))

    def row(self, dataset: str, variant: Variant) -> SummaryRow:
        """The means over the seeds on one data set; on :data:`AVERAGE`: over all targets."""
        if dataset == AVERAGE:
            return self.average(variant, self.targets)
        return row_of(dataset, variant, [*self._scores(dataset, variant).values()])

    def average(self, variant: Variant, datasets: Sequence[str]) -> SummaryRow:
        """The means over the seeds of the averages over ``datasets``."""
        return row_of(AVERAGE, variant, averaged([self._scores(name, variant) for name in datasets]))

    def rows_of(self, datasets: Sequence[str], averaged_over: Sequence[str]) -> list[SummaryRow]:
        """The rows of every variant on each of ``datasets``, then the averages if they are over several."""
        rows = [self.row(name, variant) for name in datasets for variant in self.variants()]
        if len(averaged_over) > 1:
            rows += [self.average(variant, averaged_over) for variant in self.variants()]
        return rows

    def rows(self) -> list[SummaryRow]:
        """Every row, averages last."""
        return self.rows_of(self.datasets, self.targets)

    @property
    def datasets_and_average(self) -> tuple[str, ...]:
        """The data sets, and the average if there are several."""
        return (*self.datasets, AVERAGE) if len(self.datasets) > 1 else self.datasets

    @property
    def is_over_synthetic(self) -> bool:
        """Whether the runs differ in their synthetic images."""
        return any(one.synthetic_shots is not None for one in self.results)

    def curves(self) -> list[Curve]:
        """Accuracy against the number of synthetic images a class if the runs differ in it, else of real ones."""
        if not self.is_over_synthetic:
            each = {recipe: [one for one in self.variants() if one.recipe == recipe] for recipe in self.recipes}
            return [
                Curve(recipe=recipe, label=recipe, points={one.shots: one for one in variants})
                for recipe, variants in each.items()
            ]
        return [curve for recipe in self.recipes for curve in self._synthetic_curves(recipe)]

    def _synthetic_curves(self, recipe: str) -> list[Curve]:
        """With the filter and without it; both begin at the run without synthetic images."""
        variants = [one for one in self.variants() if one.recipe == recipe]
        if variants and all(one.synthetic.shots is None for one in variants):
            return [Curve(recipe=recipe, label=recipe, points=dict.fromkeys([0], variants[0]), level=True)]
        curves = []
        filters = {one.synthetic.filtered for one in variants if one.synthetic.shots} or {True}
        for filtered in sorted(filters, reverse=True):
            points = {
                one.synthetic.shots: one
                for one in variants
                if one.synthetic.shots is not None and (one.synthetic.filtered == filtered or not one.synthetic.shots)
            }
            label = recipe if filtered else f"{recipe}, no filter"
            curves.append(Curve(recipe=recipe, label=label, points=points, filtered=filtered))
        return curves

    def has(self, name: str, dataset: str) -> bool:
        """Whether any run measured ``name`` on ``dataset``."""
        return any(one.scores.get(dataset, {}).get(name) is not None for one in self.results)

    def _scores(self, dataset: str, variant: Variant) -> dict[int, Numbers]:
        """By seed."""
        learned_from = self.source or dataset
        return {
            one.seed: one.scores[dataset]
            for one in self.results
            if (variant_of(one), one.dataset) == (variant, learned_from) and dataset in one.scores
        }


def _place(synthetic: Synthetic) -> tuple[int, bool]:
    """Fewer images first; with the filter before without."""
    return -1 if synthetic.shots is None else synthetic.shots, not synthetic.filtered
