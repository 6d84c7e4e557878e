"""The verb ``world``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, json_option
from clipship.core.errors import UsageError, near
from clipship.core.progress import log, progress
from clipship.training.requirements import needs_training
from clipship.training.synthetic_set import SYNTHETIC

if TYPE_CHECKING:
    from clipship.training.datasets.load import Dataset

_CANDIDATES, _KEPT = 24, 16


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the data sets.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this data set (may be given several times).")
@click.option("--synthetic/--no-synthetic", default=True, show_default=True, help="Whether to draw synthetic images.")
@click.option("--synthetic-seed", default=0, show_default=True, help="Seed of the synthetic images.")
@json_option
def world(out: Path, only: tuple[str, ...], synthetic: bool, synthetic_seed: int, as_json: bool) -> None:
    """Write the built-in data sets in the CoOp layout, each with a synthetic set beside its images.

    What is there already is kept. Variants with test images only are written when --only names them. The synthetic
    images come from the renderer; with --no-synthetic they are left to clipship synthesize.

    Example: clipship world --out world
    """
    with needs_training():
        from clipship.world.datasets import SPLITS, WORLD_DATASETS, WORLD_VARIANTS, write_world
    known = (*WORLD_DATASETS, *WORLD_VARIANTS)
    names = [one.name for one in known]
    for name in only:
        if name not in names:
            raise UsageError(f"unknown data set {name!r}: {near(name, names)}")
    chosen = [one for one in known if one.name in only] if only else WORLD_DATASETS
    absent = [one for one in chosen if not (out / one.name).exists()]
    total = sum(one.classes * sum(map(one.per_class, SPLITS)) for one in absent)
    with progress("drawing", total) as report:
        folders = write_world(out, names=only or None, progress=lambda done, _, name: report(done, name))
    written = [_describe(folder, _written(folder, synthetic_seed if synthetic else None)) for folder in folders]
    lines = (f"{one['path']}: {one['classes']} classes, {one['images']} images" for one in written)
    emit({"datasets": written}, "\n".join(lines), as_json=as_json)


def _written(folder: Path, seed: int | None) -> Dataset:
    """The data set in ``folder``, its synthetic set written with ``seed``, if there is one.

    One of that seed that is there already is kept, and one that something else made; data sets with only tests have
    none.
    """
    from clipship.training.datasets.load import load_dataset
    from clipship.training.model.builtin import TINY
    from clipship.training.model.clip import load_clip
    from clipship.world.rendered_synthetic_set import clip_scorer, write_world_synthetic_set

    dataset = load_dataset(folder)
    if seed is None or not dataset.train or _has_synthetic(folder / SYNTHETIC, seed):
        return dataset
    clip = load_clip(TINY)
    with progress(f"synthetic {dataset.record.name}", len(dataset.class_names)) as report:
        write_world_synthetic_set(
            folder / SYNTHETIC,
            dataset.class_names,
            template=dataset.record.template,
            candidates_per_class=_CANDIDATES,
            keep_per_class=_KEPT,
            scorer=clip_scorer(clip),
            seed=seed,
            progress=lambda done, _, name: report(done, name),
        )
    return dataset


def _has_synthetic(folder: Path, seed: int) -> bool:
    """Whether there is a set that is to be kept.

    Raises:
        DataError: something else is there, or a set that is not whole.
    """
    from clipship.training.synthetic_set import SyntheticSet
    from clipship.world.datasets import WORLD_FORMAT

    if not folder.exists():
        return False
    generator = SyntheticSet.load(folder).generator
    if generator.get("kind") != WORLD_FORMAT:
        log(f"{folder} was not drawn by the renderer: it is kept")
        return True
    if generator.get("seed") == seed:
        return True
    log(f"{folder} was made with another seed: it is written again")
    return False


def _describe(folder: Path, dataset: Dataset) -> dict[str, Any]:
    images = sum(len(dataset.items(split)) for split in ("train", "val", "test"))
    return {
        "name": dataset.record.name,
        "path": str(folder),
        "synthetic": str(folder / SYNTHETIC) if (folder / SYNTHETIC).is_dir() else None,
        "classes": len(dataset.class_names),
        "images": images,
    }
