"""The grid of runs: one training for each recipe, data set, number of shots and seed, validated before the first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipship.core.errors import RecipeError, UsageError
from clipship.core.files import sha256_of, sha256_of_text

if TYPE_CHECKING:
    from clipship.training.config import TrainConfig
    from clipship.training.datasets.base import Dataset

PROTOCOLS = ("base-to-new", "few-shot", "cross-dataset")
FEW_SHOTS = (1, 2, 4, 8, 16)
"""The papers' numbers of images a class."""
FILTERS = {"on": (True,), "off": (False,), "both": (True, False)}
"""Values of --synthetic-filter: whether the images with the best CLIP scores are taken, or the first by seed."""
RUNS = "runs"
FEATURES = "features"


class Synthetic(NamedTuple):
    """Which synthetic images a run learns from."""

    shots: int | None = None
    """How many a class; None: as the recipe says."""
    filtered: bool = True
    """Whether they are those with the best CLIP scores."""

    def __str__(self) -> str:
        if self.shots is None:
            return ""
        return f"{self.shots} synthetic{'' if self.filtered else ', no filter'}"


OWN = Synthetic()
"""The recipe's own images."""


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """The arguments of ``clipship compare``.

    Raises:
        UsageError: a value is given twice, or the protocol does not accept it.
    """

    recipes: tuple[str, ...]
    data: tuple[Path, ...]
    seeds: tuple[int, ...]
    out: Path
    protocol: str = "base-to-new"
    shots: tuple[int, ...] = ()
    """Empty: the recipe's own, or 1 2 4 8 16 for few-shot."""
    synthetic: str = "synthetic"
    """Name of the folder of synthetic images in each data set."""
    synthetic_shots: tuple[int, ...] = ()
    """Synthetic images a class; empty: the recipe's own."""
    synthetic_filter: str = "on"
    """One of :data:`FILTERS`."""

    def __post_init__(self) -> None:
        given = {
            "RECIPE": self.recipes,
            "--seeds": self.seeds,
            "--shots": self.shots,
            "--synthetic-shots": self.synthetic_shots,
        }
        for name, values in given.items():
            repeated = [value for value, count in Counter(values).items() if count > 1]
            if repeated:
                raise UsageError(f"{name} {repeated[0]} is given twice: give each once")
        if self.protocol != "few-shot" and len(self.shots) > 1:
            raise UsageError(f"--shots has {len(self.shots)} values: give one, or take --protocol few-shot")
        if self.protocol == "cross-dataset" and len(self.data) < 2:
            raise UsageError("cross-dataset takes the source first and then its targets: give two data sets or more")
        if self.synthetic_shots and self.protocol != "base-to-new":
            raise UsageError(f"--synthetic-shots is for base-to-new, not for {self.protocol}: leave one of the two out")
        if self.synthetic_filter != "on" and not self.synthetic_shots:
            raise UsageError(
                f"--synthetic-filter {self.synthetic_filter} compares equal numbers of images: give them with "
                "--synthetic-shots, such as 0 1 2 4 8 16"
            )


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One training and its evaluations, with everything a process needs to do it."""

    config: TrainConfig
    dataset: str
    """The name of the data set it learns from."""
    data: Path
    targets: tuple[Path, ...]
    """The data sets whose test images it classifies."""
    synthetic: Path
    folder: Path
    identity: str
    """SHA-256 over settings, names of data sets and lists of images: equal identities mean equal runs."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All runs, in the order of the tables."""

    request: GridRequest
    datasets: tuple[str, ...]
    """Names in the order of --data."""
    runs: tuple[GridRun, ...]


def grid_of(request: GridRequest) -> Grid:
    """Read the data sets and validate every run.

    Raises:
        UsageError: two data sets have one name, or ``out`` holds something else.
        DataError: a data set cannot be read, or has too few real or synthetic images.
        RecipeError: a recipe is unknown, or has no settings for a data set or the protocol.
    """
    from clipship.training.datasets.load import load_dataset

    _validate_out(request.out)
    loaded = {path: load_dataset(path) for path in request.data}
    names = [dataset.record.name for dataset in loaded.values()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or len(loaded) < len(request.data):
        name = repeated[0] if repeated else names[0]
        raise UsageError(f"two data sets are called {name}: give each data set once, and no two of one name")
    learned_from = list(loaded)[:1] if request.protocol == "cross-dataset" else list(loaded)
    runs = tuple(
        _run(request, loaded, path, config)
        for path in learned_from
        for recipe in request.recipes
        for config in _configs(request, recipe, loaded[path], path / request.synthetic)
    )
    if request.synthetic_shots and all(run.config.synthetic_shots is None for run in runs):
        raise UsageError(
            f"none of the recipes learns from synthetic images ({', '.join(request.recipes)}): leave --synthetic-shots "
            "out, or add one that does, such as sync-clip-tiny"
        )
    return Grid(request=request, datasets=tuple(names), runs=runs)


def _validate_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder for the comparison")
    if out.is_dir() and any(out.iterdir()) and not (out / RUNS).is_dir():
        raise UsageError(f"{out} holds other files and no comparison: give a new folder with --out")


def _configs(request: GridRequest, recipe: str, dataset: Dataset, synthetic: Path) -> list[TrainConfig]:
    """The settings of ``recipe`` with every seed, number of shots and choice of synthetic images."""
    from clipship.training.loop.few_shot import sample_of
    from clipship.training.recipes import config_from_recipe

    config = config_from_recipe(recipe, dataset.record.name)
    choices = _synthetic_choices(request, config)
    _validate_classes(config, request.protocol)
    every_class = {} if request.protocol == "base-to-new" else {"classes": "all"}
    shots = request.shots or (FEW_SHOTS if request.protocol == "few-shot" else (config.shots,))
    configs = [
        replace(_varied(config, seed=seed, shots=count, **every_class), **choice)
        for count in shots
        for choice in choices
        for seed in request.seeds
    ]
    sample_of(dataset, max(configs, key=lambda one: one.shots))  # raises if there are too few images
    for choice in choices:
        _validate_synthetic(replace(configs[0], **choice), dataset, synthetic)
    return configs


def _synthetic_choices(request: GridRequest, config: TrainConfig) -> list[dict[str, Any]]:
    """The settings that choose synthetic images; of 0 images there is one choice, with or without the filter."""
    from clipship.training.methods import method_named

    if not method_named(config.method).needs_synthetic or not request.synthetic_shots:
        return [{}]
    choices = [
        {"synthetic_shots": count, "synthetic_filter": filtered or count == 0}
        for filtered in FILTERS[request.synthetic_filter]
        for count in request.synthetic_shots
    ]
    return [choice for number, choice in enumerate(choices) if choice not in choices[:number]]


def _validate_synthetic(config: TrainConfig, dataset: Dataset, folder: Path) -> None:
    """Validate that there are enough synthetic images."""
    from clipship.training.inputs.synthetic import synthetic_paths, synthetic_set_for

    images = synthetic_set_for(config, folder)
    if images is not None:
        synthetic_paths(images, dataset.class_names, config)


def _validate_classes(config: TrainConfig, protocol: str) -> None:
    """Validate that ``config`` learns from the classes of the protocol."""
    if config.classes == "none":
        raise RecipeError(
            f"recipe {config.recipe} takes a generator that was learned on other data: "
            "run it by itself, clipship train with --generator"
        )
    if protocol == "base-to-new" and config.classes == "all":
        raise RecipeError(
            f"recipe {config.recipe} learns from all classes, base-to-new from half of them: "
            "take --protocol cross-dataset or few-shot, or a recipe without -cross or -few-shot"
        )
    if protocol != "base-to-new" and config.generator is not None:
        raise RecipeError(
            f"recipe {config.recipe} generates features for classes without images, in {protocol} all have some: "
            "take --protocol base-to-new, or a recipe without ship"
        )


def _varied(config: TrainConfig, **changes: Any) -> TrainConfig:
    """``config`` with ``changes``, also in the generator that it trains first."""
    generator = None if config.generator is None else _varied(config.generator, **changes)
    return replace(config, generator=generator, **changes)


def _run(request: GridRequest, loaded: dict[Path, Dataset], data: Path, config: TrainConfig) -> GridRun:
    targets = tuple(loaded) if request.protocol == "cross-dataset" else (data,)
    synthetic = data / request.synthetic
    name = loaded[data].record.name
    return GridRun(
        config=config,
        dataset=name,
        data=data,
        targets=targets,
        synthetic=synthetic,
        folder=request.out / RUNS / name / _folder_of(config),
        identity=_identity(config, [loaded[path] for path in targets], synthetic),
    )


def _folder_of(config: TrainConfig) -> str:
    chosen = "" if config.synthetic_shots is None else f"-{config.synthetic_shots}synthetic"
    chosen += "" if config.synthetic_filter else "-unfiltered"
    return f"{config.recipe}-{config.shots}shots{chosen}-seed{config.seed}"


def _identity(config: TrainConfig, datasets: Sequence[Dataset], synthetic: Path) -> str:
    from clipship.training.datasets.base import SPLITS
    from clipship.training.datasets.load import digest_of_items
    from clipship.training.inputs.synthetic import synthetic_set_for
    from clipship.training.synthetic_set import TABLE_FILE

    lists = [[one.record.name, *(digest_of_items(one.items(split)) for split in SPLITS)] for one in datasets]
    images = synthetic_set_for(config, synthetic)
    images_digest = "" if images is None else sha256_of(images.folder / TABLE_FILE)
    return sha256_of_text(json.dumps([config.digest, lists, images_digest]))
