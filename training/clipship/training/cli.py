"""The verbs of the training stage: ``world``, ``recipes``, ``train``, ``evaluate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli import emit, existing_folder, json_option
from clipship.core.errors import DataError, MissingExtraError, UsageError, near
from clipship.core.progress import log, progress

if TYPE_CHECKING:
    from clipship.training.config import TrainConfig
    from clipship.training.data import Dataset
    from clipship.training.evaluate import Scores
    from clipship.training.synthetic import SyntheticSet

SYNTHETIC = "synthetic"
"""Where ``clipship train`` looks for a synthetic set, below the data set's folder."""

_CANDIDATES, _KEPT = 24, 16


@contextmanager
def _needs_training() -> Iterator[None]:
    """Turn a missing PyTorch or open_clip into the line that says what to install."""
    try:
        import open_clip
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "training") from error
    del open_clip
    yield


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the data sets.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this data set (may be given several times).")
@click.option("--synthetic-seed", default=0, show_default=True, help="Seed of the synthetic images.")
@json_option
def world(out: Path, only: tuple[str, ...], synthetic_seed: int, as_json: bool) -> None:
    """Write the built-in data sets in the CoOp layout, each with a synthetic set beside its images.

    What is there already is kept. Example: clipship world --out world
    """
    with _needs_training():
        from clipship.training.world.datasets import SPLITS, WORLD_DATASETS, write_world
    names = [one.name for one in WORLD_DATASETS]
    for name in only:
        if name not in names:
            raise UsageError(f"unknown data set {name!r}: {near(name, names)}")
    chosen = [one for one in WORLD_DATASETS if not only or one.name in only]
    absent = [one for one in chosen if not (out / one.name).exists()]
    total = sum(one.classes * sum(map(one.per_class, SPLITS)) for one in absent)
    with progress("drawing", total) as report:
        folders = write_world(out, names=only or None, progress=lambda done, _, name: report(done, name))
    written = [_describe(folder, _write_synthetic(folder, synthetic_seed)) for folder in folders]
    lines = (f"{one['path']}: {one['classes']} classes, {one['images']} images" for one in written)
    emit({"datasets": written}, "\n".join(lines), as_json=as_json)


def _write_synthetic(folder: Path, seed: int) -> Dataset:
    """Write the synthetic set of the data set in ``folder`` unless one of that seed is there."""
    from clipship.training.clip import TINY, load_clip
    from clipship.training.data import load_dataset
    from clipship.training.world.synthesis import clip_scorer, write_world_synthetic_set

    dataset = load_dataset(folder)
    if _has_synthetic(folder / SYNTHETIC, seed):
        return dataset
    clip = load_clip(TINY)
    with progress(f"synthetic {dataset.record.name}", len(dataset.class_names)) as report:
        write_world_synthetic_set(
            folder / SYNTHETIC,
            dataset.class_names,
            template=dataset.record.template,
            candidates_per_class=_CANDIDATES,
            keep_per_class=_KEPT,
            scorer=clip_scorer(clip.model, clip.tokenizer, clip.preprocess),
            seed=seed,
            progress=lambda done, _, name: report(done, name),
        )
    return dataset


def _has_synthetic(folder: Path, seed: int) -> bool:
    from clipship.training.synthetic import SyntheticSet

    if not folder.exists():
        return False
    if SyntheticSet.load(folder).generator.get("seed") == seed:
        return True
    log(f"{folder} was made with another seed: it is written again")
    return False


def _describe(folder: Path, dataset: Dataset) -> dict[str, Any]:
    images = sum(len(dataset.items(split)) for split in ("train", "val", "test"))
    return {
        "name": dataset.record.name,
        "path": str(folder),
        "synthetic": str(folder / SYNTHETIC),
        "classes": len(dataset.class_names),
        "images": images,
    }


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the training recipes.

    Example: clipship recipes
    """
    with _needs_training():
        from clipship.training.recipes import RECIPES
    listed = {name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in RECIPES.items()}
    width = max(map(len, listed))
    emit({"recipes": listed}, "\n".join(f"{name:<{width}}  {line}" for name, line in listed.items()), as_json=as_json)


@click.command()
@click.argument("recipe")
@click.option("--data", required=True, help="Folder of one data set in the CoOp layout.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the checkpoint.")
@click.option("--synthetic", help="Folder of a synthetic set; default: DATA/synthetic.")
@click.option("--seed", default=1, show_default=True, help="Of the few-shot sample, prompts, order and crops.")
@click.option("--shots", type=click.IntRange(min=1), help="Real images a class; default: the recipe's.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the recipe's.")
@click.option("--base-model", metavar="NAME", help="clipship-tiny, ARCHITECTURE/PRETRAINED of open_clip, or a folder.")
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that prepare images."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run; a finished one is kept as it is.")
@json_option
def train(
    recipe: str,
    data: str,
    out: Path,
    synthetic: str | None,
    device: str | None,
    workers: int,
    resume: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Learn RECIPE's prompts on the base classes of a data set; list the recipes with clipship recipes.

    Example: clipship train sync-clip-tiny --data world/prints --out runs/prints
    """
    with _needs_training():
        from clipship.training.data import load_dataset
        from clipship.training.loop import train as run
        from clipship.training.recipes import config_from_recipe
    dataset = load_dataset(existing_folder(data, "the folder of a data set"))
    config = config_from_recipe(recipe, dataset.record.name)
    changes["base_model"] = _absolute(changes["base_model"])
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    images = _synthetic_set(config, Path(synthetic) if synthetic else Path(data) / SYNTHETIC)
    checkpoint = run(config, dataset, out=out, synthetic=images, resume=resume, device=_device(device), workers=workers)
    learned = sum(value.numel() for value in checkpoint.learned.values())
    result = {"checkpoint": str(out), "learned_parameters": learned, "losses": [dict(one) for one in checkpoint.losses]}
    emit(result, f"{out}: {config.method} on {config.base_model}, {learned:,} learned parameters", as_json=as_json)


def _synthetic_set(config: TrainConfig, folder: Path) -> SyntheticSet | None:
    from clipship.training.methods import method_named
    from clipship.training.synthetic import SyntheticSet

    if not method_named(config.method).needs_synthetic:
        return None
    if not folder.is_dir():
        raise DataError(
            f"recipe {config.recipe} learns from synthetic images and {folder} is not there: "
            "give a synthetic set with --synthetic DIR"
        )
    return SyntheticSet.load(folder)


def _absolute(base_model: str | None) -> str | None:
    """A folder is noted with its whole path, so that the checkpoint can be used from anywhere."""
    return str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model


def _device(name: str | None) -> str | None:
    """``name`` checked, so that a typing error is one line."""
    if name is None:
        return None
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}: give cpu, cuda or cuda:N") from error
    return name


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True, help="Folder of the data set the checkpoint was trained on.")
@click.option("--base-model", metavar="NAME", help="Where the base model is now, if its folder was moved.")
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@json_option
def evaluate(checkpoint: str, data: str, base_model: str | None, device: str | None, as_json: bool) -> None:
    """Classify a data set's test images and store the scores in CHECKPOINT.

    Base-to-new: each half among its own class names. Open vocabulary: each half among all class names.

    Example: clipship evaluate runs/prints --data world/prints
    """
    with _needs_training():
        import torch

        from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint, save_scores
        from clipship.training.clip import load_clip
        from clipship.training.data import load_dataset
        from clipship.training.evaluate import evaluate as scores_of
    folder = existing_folder(checkpoint, "the folder of a checkpoint")
    loaded = load_checkpoint(folder)
    dataset = load_dataset(existing_folder(data, "the folder of a data set"))
    clip = load_clip(base_model or loaded.config.base_model).to(
        _device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    scores = scores_of(method_from_checkpoint(loaded, clip), dataset)
    save_scores(folder, scores.to_json())
    emit(scores.to_json(), _table(scores), as_json=as_json)


def _table(scores: Scores) -> str:
    """A small table of percentages."""
    from rich.console import Console
    from rich.table import Table

    table = Table("top-1 %", "base", "new", "harmonic mean", title=f"{scores.dataset}, {scores.split} images")
    rows = {
        "base-to-new": (scores.base, scores.new, scores.harmonic_mean),
        "open vocabulary": (scores.open_base, scores.open_new, scores.open_harmonic_mean),
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    console = Console(width=78)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
