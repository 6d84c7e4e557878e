"""The verb ``world``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, json_option
from clipship.core.errors import UsageError, near
from clipship.core.progress import log
from clipship.training.requirements import needs_training
from clipship.training.synthetic_set import SYNTHETIC

if TYPE_CHECKING:
    from clipship.training.datasets.base import Dataset

_CANDIDATES, _KEPT = 24, 16


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the data sets.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this data set; repeatable.")
@click.option("--synthetic/--no-synthetic", default=True, show_default=True, help="Whether to draw synthetic images.")
@click.option("--synthetic-seed", default=0, show_default=True, help="Seed of the synthetic images.")
@json_option
def world(out: Path, only: tuple[str, ...], synthetic: bool, synthetic_seed: int, as_json: bool) -> None:
    """Write the built-in data sets in the CoOp layout, each with a synthetic set.

    Existing ones are kept. Variants, which have test images only, are written if --only names them. The renderer draws
    the synthetic images; use --no-synthetic to make them with clipship synthesize.

    Example: clipship world --out world
    """
    with needs_training():
        from clipship.world.datasets import WORLD_DATASETS, WORLD_VARIANTS, write_world
    names = [one.name for one in (*WORLD_DATASETS, *WORLD_VARIANTS)]
    for name in only:
        if name not in names:
            raise UsageError(f"unknown data set {name!r}: {near(name, names)}")
    folders = write_world(out, names=only or None)
    written = [_describe(folder, _written(folder, synthetic_seed if synthetic else None)) for folder in folders]
    lines = (f"{one['path']}: {one['classes']} classes, {one['images']} images" for one in written)
    emit({"datasets": written}, "\n".join(lines), as_json=as_json)


def _written(folder: Path, seed: int | None) -> Dataset:
    """The data set in ``folder``; its synthetic set is written with ``seed``, if it has training images.

    An existing set of that seed is kept, and one that something else made.
    """
    from clipship.training.datasets.load import load_dataset
    from clipship.training.model.builtin import TINY
    from clipship.training.model.clip import load_clip
    from clipship.world.rendered_synthetic_set import clip_scorer, write_world_synthetic_set

    dataset = load_dataset(folder)
    if seed is None or not dataset.train or _has_synthetic(folder / SYNTHETIC, seed):
        return dataset
    write_world_synthetic_set(
        folder / SYNTHETIC,
        dataset.class_names,
        template=dataset.record.template,
        candidates_per_class=_CANDIDATES,
        keep_per_class=_KEPT,
        scorer=clip_scorer(load_clip(TINY)),
        seed=seed,
    )
    return dataset


def _has_synthetic(folder: Path, seed: int) -> bool:
    """Whether there is a set to keep.

    Raises:
        DataError: the folder holds something else, or an unfinished set.
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
