"""The synthetic images that a run learns from: the set, and which of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipship.core.errors import DataError, RecipeError
from clipship.core.progress import log
from clipship.training.config import TrainConfig
from clipship.training.methods import method_named
from clipship.training.synthetic_set import SYNTHETIC, SyntheticSet


def synthetic_beside(data: Path) -> Path:
    """The default folder of a data set's synthetic images: in its folder, or beside its list of images."""
    return (data if data.is_dir() else data.parent) / SYNTHETIC


def learns_from_synthetic(config: TrainConfig) -> bool:
    """Whether a run with these settings learns from synthetic images."""
    return method_named(config.method).needs_synthetic and config.synthetic_shots != 0


def synthetic_set_for(config: TrainConfig, folder: Path) -> SyntheticSet | None:
    """The synthetic set in ``folder``, if a run with these settings learns from one.

    Raises:
        DataError: it does, and there is none.
    """
    if not learns_from_synthetic(config):
        return None
    if not folder.is_dir():
        raise DataError(
            f"recipe {config.recipe} learns from synthetic images and {folder} does not exist: "
            "give a synthetic set with --synthetic DIR, or make one with clipship synthesize"
        )
    return SyntheticSet.load(folder)


def synthetic_images(
    config: TrainConfig, class_names: Sequence[str], synthetic: SyntheticSet | None
) -> tuple[tuple[Path, ...], ...]:
    """The synthetic images of every class; () if the run has none.

    Raises:
        RecipeError: the method needs a set and there is none, or it needs none and images are requested.
        DataError: as :func:`synthetic_paths`.
    """
    needed = method_named(config.method).needs_synthetic
    if not needed and (config.synthetic_shots is not None or not config.synthetic_filter):
        raise RecipeError(
            f"recipe {config.recipe} does not learn from synthetic images: leave out --synthetic-shots and "
            "--no-synthetic-filter, or take a recipe that does, such as sync-clip"
        )
    if not learns_from_synthetic(config):
        return ()
    if synthetic is None:
        raise RecipeError(
            f"recipe {config.recipe} learns from synthetic images: give a synthetic set (--synthetic DIR)"
        )
    return synthetic_paths(synthetic, class_names, config)


def synthetic_paths(
    synthetic: SyntheticSet, class_names: Sequence[str], config: TrainConfig
) -> tuple[tuple[Path, ...], ...]:
    """The synthetic images that each class learns from, in the order of ``class_names``; a class may have none.

    ``config`` chooses them: the kept ones with the best scores, or the first by seed.

    Raises:
        DataError: no class has any, or none has enough.
    """
    if config.synthetic_filter:
        found = {name: tuple(image.path for image in synthetic.kept(name)) for name in synthetic.class_names}
    else:
        found = _made_images(synthetic)
    most = max((len(found.get(name, ())) for name in class_names), default=0)
    if not most:
        raise DataError(
            f"{synthetic.folder} has no image of any of the {len(class_names)} classes, the first is "
            f"{class_names[0]!r}: write it for the class names of the data set, or take --synthetic-shots 0"
        )
    if config.synthetic_shots is not None and config.synthetic_shots > most:
        raise DataError(
            f"{config.synthetic_shots} synthetic images a class requested, no class of {synthetic.folder} has "
            f"more than {most}: request fewer, or synthesize more"
        )
    return tuple(found.get(name, ())[: config.synthetic_shots] for name in class_names)


def _made_images(synthetic: SyntheticSet) -> dict[str, tuple[Path, ...]]:
    """Of every class the images in the order of their seeds, whatever their score.

    Images that were rejected before scoring (by the safety checker, for example) or deleted are left out.
    """
    found: dict[str, list[Path]] = {}
    for image in sorted(synthetic.images, key=lambda image: image.seed):
        usable = image.kept or image.score is not None
        if usable and image.path.is_file():
            found.setdefault(image.class_name, []).append(image.path)
    return {name: tuple(paths) for name, paths in found.items()}


def log_missing(config: TrainConfig, synthetic: Sequence[Sequence[Path]], class_names: Sequence[str]) -> None:
    """Log how many classes have no synthetic image, or fewer than requested."""
    missing = [name for name, paths in zip(class_names, synthetic, strict=False) if not paths]
    fewer = sum(0 < len(paths) < (config.synthetic_shots or 0) for paths in synthetic)
    if missing:
        log(f"no synthetic image of {len(missing)} of {len(class_names)} classes, the first is {missing[0]!r}")
    if fewer:
        log(f"fewer than {config.synthetic_shots} synthetic images of {fewer} of {len(class_names)} classes")
