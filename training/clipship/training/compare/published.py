"""Published accuracies to compare with ours, from ``published.json``, each with its source.

Data sets have the names of :data:`clipship.training.datasets.load.PUBLISHED_DATASETS`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.training.evaluation.evaluate import harmonic_mean


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper says where we measured something."""

    values: tuple[float, ...]
    source: str


_CONTENT: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

METHOD_OF_RECIPE: Mapping[str, str] = _CONTENT["method_of_recipe"]
"""Recipes with the published settings on the published model, and what the papers call their method."""
METHOD_OF_CROSS_RECIPE: Mapping[str, str] = _CONTENT["method_of_cross_recipe"]
"""The same for transfer from ImageNet."""
SHOTS = 16
"""Real images a class in every published run."""
CROSS_SOURCE = "ImageNet"
"""What the published transfer learned from: all 1000 classes, 16 shots."""
AVERAGE = "average"

Numbers = Mapping[str, Published]
"""By data set; ``average`` is over those of the paper."""


def _numbers(protocol: str) -> dict[str, Numbers]:
    """The numbers of a protocol by method."""
    found: dict[str, dict[str, Published]] = {}
    for table in _CONTENT["tables"]:
        if table["protocol"] == protocol:
            source = _CONTENT["sources"][table["source"]]
            rows = {name: Published(values=tuple(row), source=source) for name, row in table["values"].items()}
            found.setdefault(table["method"], {}).update(rows)
    return dict(found)


BASE_TO_NEW = _numbers("base-to-new")
"""Base and new; averages have H, the harmonic mean of the two, as well."""
TRANSFER = _numbers("cross-dataset")
"""Top-1 over all classes, learned from ImageNet: on itself, ten other data sets and four variants of ImageNet."""
GENERALISED = _numbers("generalised")
"""Generalised zero-shot learning: unseen, seen, H."""
ELEVEN = tuple(name for name in BASE_TO_NEW["CLIP"] if name != AVERAGE)
"""The data sets of the published averages from base to new."""


def base_and_new(recipe: str, dataset: str) -> Published | None:
    """Base, new, H of the recipe's method on a data set."""
    return average_base_and_new(recipe, [dataset])


def average_base_and_new(recipe: str, datasets: Collection[str]) -> Published | None:
    """Base, new, H of the averages over ``datasets``; None unless every one is published.

    Of some methods only the average over all eleven is known.
    """
    rows = BASE_TO_NEW.get(METHOD_OF_RECIPE.get(recipe, ""), {})
    if set(datasets) == set(ELEVEN):
        return rows.get(AVERAGE)
    if not datasets or not set(datasets) <= set(rows):
        return None
    base, new = (sum(rows[name].values[half] for name in datasets) / len(datasets) for half in (0, 1))
    source = next(rows[name].source for name in datasets)
    return Published(values=(base, new, harmonic_mean(base, new)), source=source)


def generalised(recipe: str, dataset: str) -> Published | None:
    """Unseen, seen, H of generalised zero-shot learning."""
    return GENERALISED.get(METHOD_OF_RECIPE.get(recipe, ""), {}).get(dataset)


def transfer(recipe: str, source: str) -> Numbers:
    """Accuracy by target of the recipe's method learned from ``source``; empty where nothing is published."""
    return TRANSFER.get(METHOD_OF_CROSS_RECIPE.get(recipe, ""), {}) if source == CROSS_SOURCE else {}
