"""Means and spreads over seeds and data sets, as the papers have them.

A row is what the seeds of one recipe give on one data set; rows of averages take the average over the data sets for
each seed first. Harmonic means are those of the averages; their spread is that of the seeds' own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipship.training.compare.results import Result
from clipship.training.evaluate import harmonic_mean

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
class Row:
    """What one recipe reaches on one data set, or on average."""

    dataset: str
    recipe: str
    shots: int
    stats: Mapping[str, Stat | None]
    """By name, those of :data:`ACCURACIES` and :data:`HARMONIC`."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the unrounded numbers."""
        return asdict(self)


def row_of(dataset: str, recipe: str, shots: int, seeds: Sequence[Numbers]) -> Row:
    """The means over ``seeds``; a number that one seed lacks has none."""
    stats = {name: _stat([one.get(name) for one in seeds]) for name in ACCURACIES}
    for name, (first, second) in HARMONIC.items():
        stats[name] = _harmonic_stat(stats[first], stats[second], seeds, name)
    return Row(dataset=dataset, recipe=recipe, shots=shots, stats=stats)


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


def scores_of(results: Iterable[Result], recipe: str, shots: int, target: str, source: str) -> dict[int, Numbers]:
    """By seed: the scores on ``target`` of the runs that learned from ``source``."""
    return {
        one.seed: one.scores[target]
        for one in results
        if (one.recipe, one.shots, one.dataset) == (recipe, shots, source) and target in one.scores
    }


def averaged(datasets: Sequence[Mapping[int, Numbers]]) -> list[Numbers]:
    """For every seed that all data sets have, the mean over them of what all of them have."""
    shared = set.intersection(*(set(seeds) for seeds in datasets)) if datasets else set()
    return [_mean_over([seeds[seed] for seeds in datasets]) for seed in sorted(shared)]


def _mean_over(datasets: Sequence[Numbers]) -> Numbers:
    values = {name: [one.get(name) for one in datasets] for name in ACCURACIES}
    return {name: None if None in each else statistics.mean(map(_known, each)) for name, each in values.items()}


def _known(value: float | None) -> float:
    assert value is not None
    return value


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows of a comparison, and what they were computed from."""

    protocol: str
    recipes: tuple[str, ...]
    datasets: tuple[str, ...]
    """Names in the order they were given; for cross-dataset the source is first."""
    results: tuple[Result, ...]

    @property
    def source(self) -> str | None:
        """The one data set that was learned from, if the others are for testing only."""
        return self.datasets[0] if self.protocol == "cross-dataset" else None

    @property
    def targets(self) -> tuple[str, ...]:
        """The data sets that an average is over."""
        return self.datasets[1:] if self.source else self.datasets

    def shots(self, recipe: str) -> list[int]:
        """The numbers of images a class that ``recipe`` was run with."""
        return sorted({one.shots for one in self.results if one.recipe == recipe})

    def row(self, dataset: str, recipe: str, shots: int) -> Row:
        """The means over the seeds on one data set."""
        return row_of(dataset, recipe, shots, [*self._scores(dataset, recipe, shots).values()])

    def average(self, recipe: str, shots: int, datasets: Sequence[str] | None = None) -> Row:
        """The means over the seeds of the averages over ``datasets`` (default: all targets)."""
        names = self.targets if datasets is None else datasets
        return row_of(AVERAGE, recipe, shots, averaged([self._scores(name, recipe, shots) for name in names]))

    def rows(self) -> list[Row]:
        """Every row, averages last."""
        runs = [(recipe, shots) for recipe in self.recipes for shots in self.shots(recipe)]
        each = [self.row(name, recipe, shots) for name in self.datasets for recipe, shots in runs]
        return [*each, *(self.average(recipe, shots) for recipe, shots in runs if len(self.targets) > 1)]

    def has(self, name: str, dataset: str) -> bool:
        """Whether any run measured ``name`` on ``dataset``."""
        return any(one.scores.get(dataset, {}).get(name) is not None for one in self.results)

    def _scores(self, dataset: str, recipe: str, shots: int) -> dict[int, Numbers]:
        return scores_of(self.results, recipe, shots, dataset, self.source or dataset)
