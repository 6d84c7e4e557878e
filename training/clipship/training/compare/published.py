"""Published numbers that stand beside ours: ViT-B/16 with OpenAI's weights, 16 shots, the mean over three seeds.

Accuracies in percent. Only numbers that were read in a repository or a paper are here, each with where; data sets have
the names of :data:`clipship.training.datasets.load.PUBLISHED_DATASETS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from clipship.training.evaluation.evaluate import harmonic_mean

Pair = tuple[float, float]

SHOTS = 16
"""Real images a class in every published run."""

FAMILY_OF_RECIPE = {
    "zero-shot": "CLIP",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
    "kgcoop": "KgCoOp",
    "vpt-deep": "deep vision prompting",
    "ivlp": "IVLP, 4 + 4 tokens",
    "ivlp-maple": "IVLP, 2 + 2 tokens",
    "maple": "MaPLe",
    "promptsrc": "PromptSRC",
    "clip-adapter": "CLIP-Adapter",
    "ship-coop": "CoOp + SHIP",
}
"""Recipes with the published settings on the published model, and the name of their row in the papers."""
FAMILY_OF_CROSS_RECIPE = {
    "coop-cross": "CoOp",
    "cocoop-cross": "CoCoOp",
    "maple-cross": "MaPLe",
    "promptsrc-cross": "PromptSRC",
}
"""The same for transfer from ImageNet."""

EXP_RESULTS = "PromptKD's repository (zhengli97/PromptKD, images/exp_results.png), which quotes each method's paper"
CROSS_RESULTS = "PromptKD's repository (zhengli97/PromptKD, images/exp_results2.png), which quotes each method's paper"
PROMPTSRC = "README of muzairkhattak/PromptSRC"
MAPLE = "README of muzairkhattak/multimodal-prompt-learning"
KGCOOP = "README of htyao89/KgCoOp"
DEPT = "results figure of Koorye/DePT, its own reruns"
AWESOME = "README of zhengli97's Awesome-Prompt-Adapter-Learning list, 2025"
ZERODIFF = "Table 1 of the ZeroDiff paper, which quotes SHIP's"

AVERAGES: dict[str, tuple[float, float, float, str]] = {
    "CLIP": (69.34, 74.22, 71.70, PROMPTSRC),
    "CoOp": (82.69, 63.22, 71.66, PROMPTSRC),
    "CoCoOp": (80.47, 71.69, 75.83, PROMPTSRC),
    "KgCoOp": (80.73, 73.60, 77.00, KGCOOP),
    "CLIP-Adapter": (76.92, 73.52, 75.18, DEPT),
    "deep vision prompting": (80.24, 73.43, 76.68, MAPLE),
    "IVLP, 2 + 2 tokens": (82.15, 74.07, 77.90, MAPLE),
    "IVLP, 4 + 4 tokens": (84.21, 71.79, 77.51, PROMPTSRC),
    "MaPLe": (82.28, 75.14, 78.55, MAPLE),
    "PromptSRC": (84.26, 76.10, 79.97, PROMPTSRC),
}
"""Base, new, H over the 11 data sets, and where it was read. H is the harmonic mean of the two averages."""

ELEVEN = (
    *("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "FGVCAircraft", "SUN397"),
    *("DescribableTextures", "EuroSAT", "UCF101"),
)
"""The 11 data sets in the order of the rows below."""

_BASE_TO_NEW: dict[str, tuple[Pair, ...]] = {
    "CLIP": (
        *((72.43, 68.14), (96.84, 94.00), (91.17, 97.26), (63.37, 74.89), (72.08, 77.80), (90.10, 91.22)),
        *((27.19, 36.29), (69.36, 75.35), (53.24, 59.90), (56.48, 64.05), (70.53, 77.50)),
    ),
    "CoOp": (
        *((76.47, 67.88), (98.00, 89.81), (93.67, 95.29), (78.12, 60.40), (97.60, 59.67), (88.33, 82.26)),
        *((40.44, 22.30), (80.60, 65.89), (79.44, 41.18), (92.19, 54.74), (84.69, 56.05)),
    ),
    "CoCoOp": (
        *((75.98, 70.43), (97.96, 93.81), (95.20, 97.69), (70.49, 73.59), (94.87, 71.75), (90.70, 91.29)),
        *((33.41, 23.71), (79.74, 76.86), (77.01, 56.00), (87.49, 60.04), (82.33, 73.45)),
    ),
    "MaPLe": (
        *((76.66, 70.54), (97.74, 94.36), (95.43, 97.76), (72.94, 74.00), (95.92, 72.46), (90.71, 92.05)),
        *((37.44, 35.61), (80.82, 78.70), (80.36, 59.18), (94.07, 73.23), (83.00, 78.66)),
    ),
    "PromptSRC": (
        *((77.60, 70.73), (98.10, 94.03), (95.33, 97.30), (78.27, 74.97), (98.07, 76.50), (90.67, 91.53)),
        *((42.73, 37.87), (82.67, 78.47), (83.37, 62.97), (92.90, 73.90), (87.10, 78.80)),
    ),
}
BASE_TO_NEW: dict[str, dict[str, Pair]] = {
    family: dict(zip(ELEVEN, rows, strict=True)) for family, rows in _BASE_TO_NEW.items()
}
"""Base and new accuracy by method and data set."""

_CROSS: dict[str, tuple[float, ...]] = {
    "CoOp": (93.70, 89.14, 64.51, 68.71, 85.30, 18.47, 64.15, 41.92, 46.39, 66.55),
    "CoCoOp": (94.43, 90.14, 65.32, 71.88, 86.06, 22.94, 67.36, 45.73, 45.37, 68.21),
    "MaPLe": (93.53, 90.49, 65.57, 72.23, 86.20, 24.74, 67.01, 46.49, 48.06, 68.69),
    "PromptSRC": (93.60, 90.25, 65.70, 70.25, 86.15, 23.90, 67.10, 46.87, 45.50, 68.75),
}
CROSS_AVERAGES = {"CoOp": 63.88, "CoCoOp": 65.74, "MaPLe": 66.30, "PromptSRC": 65.81}
"""Over the ten targets."""

_VARIANTS = ("ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR")
_DOMAIN: dict[str, tuple[float, ...]] = {
    "CoOp": (71.51, 64.20, 47.99, 49.71, 75.21),
    "CoCoOp": (71.02, 64.07, 48.75, 50.63, 76.18),
    "MaPLe": (70.87, 63.87, 49.00, 49.03, 77.03),
}
_DOMAIN_SOURCE = {"CoOp": AWESOME, "CoCoOp": AWESOME, "MaPLe": DEPT}

CROSS_SOURCE = "ImageNet"
"""What the published transfer was trained on: all 1000 classes, 16 shots."""
TRANSFER: dict[str, dict[str, float]] = {
    family: {**dict(zip(ELEVEN[1:], row, strict=True)), **dict(zip(_VARIANTS, _DOMAIN.get(family, ()), strict=False))}
    for family, row in _CROSS.items()
}
"""Top-1 over all classes, learned on ImageNet: the source itself, ten other data sets, four variants of ImageNet."""

GENERALISED: dict[str, dict[str, tuple[float, float, float]]] = {
    "CLIP": {"CUB": (55.2, 54.8, 55.0)},
    "CoOp": {"CUB": (49.2, 63.8, 55.6)},
    "CoOp + SHIP": {"CUB": (55.3, 58.9, 57.1)},
}
"""Generalised zero-shot learning: unseen, seen, H."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper says where we measured something."""

    values: tuple[float, ...]
    source: str


def base_and_new(recipe: str, dataset: str) -> Published | None:
    """Base, new, H of the recipe's method on a data set."""
    family = FAMILY_OF_RECIPE.get(recipe, "")
    pair = BASE_TO_NEW.get(family, {}).get(dataset)
    return None if pair is None else Published(values=(*pair, harmonic_mean(*pair)), source=EXP_RESULTS)


def average_base_and_new(recipe: str, datasets: Collection[str]) -> Published | None:
    """Base, new, H of the averages over ``datasets``; None unless every one is published.

    For methods whose rows were not found there is only the average over all eleven.
    """
    family = FAMILY_OF_RECIPE.get(recipe, "")
    if set(datasets) == set(ELEVEN) and family in AVERAGES:
        base, new, mean, source = AVERAGES[family]
        return Published(values=(base, new, mean), source=source)
    rows = BASE_TO_NEW.get(family, {})
    if not datasets or not set(datasets) <= set(rows):
        return None
    base, new = (sum(rows[name][half] for name in datasets) / len(datasets) for half in (0, 1))
    return Published(values=(base, new, harmonic_mean(base, new)), source=EXP_RESULTS)


def generalised(recipe: str, dataset: str) -> Published | None:
    """Unseen, seen, H of generalised zero-shot learning."""
    found = GENERALISED.get(FAMILY_OF_RECIPE.get(recipe, ""), {}).get(dataset)
    return None if found is None else Published(values=found, source=ZERODIFF)


def transfer(recipe: str, source: str) -> Mapping[str, float]:
    """Accuracy by target of the recipe's method learned on ``source``; empty where nothing is published."""
    return TRANSFER.get(FAMILY_OF_CROSS_RECIPE.get(recipe, ""), {}) if source == CROSS_SOURCE else {}


def transfer_source(recipe: str, targets: Collection[str]) -> str:
    """Where the numbers of :func:`transfer` were read."""
    family = FAMILY_OF_CROSS_RECIPE[recipe]
    places = [CROSS_RESULTS] if set(targets) & set(ELEVEN[1:]) else []
    if set(targets) & set(_VARIANTS) and family in _DOMAIN_SOURCE:
        places.append(f"ImageNet and its variants: {_DOMAIN_SOURCE[family]}")
    return "; ".join(places)
