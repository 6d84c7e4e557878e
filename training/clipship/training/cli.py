"""The verbs of the training stage: ``world``, ``recipes``, ``train``, ``evaluate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.caches import cache_folder
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
def needs_training() -> Iterator[None]:
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
        from clipship.training.world.datasets import SPLITS, WORLD_DATASETS, WORLD_VARIANTS, write_world
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
    from clipship.training.clip import TINY, load_clip
    from clipship.training.data import load_dataset
    from clipship.training.world.synthesis import clip_scorer, write_world_synthetic_set

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
    from clipship.training.synthetic import SyntheticSet
    from clipship.training.world.datasets import WORLD_FORMAT

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


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the recipes of synthesis and of training.

    Example: clipship recipes
    """
    with needs_training():
        from clipship.training.recipes import RECIPES
        from clipship.training.synthesis.recipes import SYNTHESIS_RECIPES
    listed = {name: _first_line(recipe) for name, recipe in RECIPES.items()}
    synthesis = {name: _first_line(recipe) for name, recipe in SYNTHESIS_RECIPES.items()}
    width = max(map(len, (*listed, *synthesis)))
    lines = ["clipship train:", *(f"  {name:<{width}}  {line}" for name, line in listed.items())]
    lines += ["clipship synthesize:", *(f"  {name:<{width}}  {line}" for name, line in synthesis.items())]
    emit({"recipes": listed, "synthesis": synthesis}, "\n".join(lines), as_json=as_json)


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


@click.command()
@click.argument("recipe")
@click.option("--data", required=True, help="A data set: a folder, or a CSV or Parquet list of images.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the checkpoint.")
@click.option("--synthetic", help="Folder of a synthetic set; default: DATA/synthetic.")
@click.option("--synthetic-shots", type=click.IntRange(min=0), help="Synthetic images a class; default: all kept ones.")
@click.option(
    "--synthetic-filter/--no-synthetic-filter",
    default=None,
    help="Synthetic images by CLIP's score, or by seed; default: by score.",
)
@click.option("--generator", help="Checkpoint of a feature generator, instead of the one the recipe learns first.")
@click.option("--seed", default=1, show_default=True, help="Of the few-shot sample, prompts, order and crops.")
@click.option("--shots", type=click.IntRange(min=0), help="Real images a class, 0: all; default: the recipe's.")
@click.option("--classes", type=click.Choice(["base", "all"]), help="Which classes have real images.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Real images a step; default: the recipe's.")
@click.option("--accumulate", type=click.IntRange(min=1), help="Parts a batch is computed in, one after the other.")
@click.option("--text-chunk", type=click.IntRange(min=1), help="Prompts that pass the text tower at once.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of matrix products.")
@click.option("--base-model", metavar="NAME", help="clipship-tiny, ARCHITECTURE/PRETRAINED of open_clip, or a folder.")
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that prepare images."
)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's event files.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run; a finished one is kept as it is.")
@json_option
def train(
    recipe: str,
    data: str,
    out: Path,
    synthetic: str | None,
    generator: str | None,
    device: str | None,
    workers: int,
    tensorboard: Path | None,
    resume: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Learn RECIPE from a few images a class; list the recipes with clipship recipes.

    Example: clipship train sync-clip-tiny --data world/prints --out runs/prints
    """
    with needs_training():
        from clipship.training.data import load_dataset
        from clipship.training.loop import RunOptions
        from clipship.training.loop import train as run
        from clipship.training.recipes import config_from_recipe
    dataset = load_dataset(Path(data))
    config = config_from_recipe(recipe, dataset.record.name)
    changes["base_model"] = _absolute(changes["base_model"])
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    checkpoint = run(
        config,
        dataset,
        out=out,
        synthetic=synthetic_set_for(config, Path(synthetic) if synthetic else synthetic_beside(Path(data))),
        generator=None if generator is None else existing_folder(generator, "the folder of a generator's checkpoint"),
        options=RunOptions(
            resume=resume,
            device=checked_device(device),
            workers=workers,
            cache=feature_cache(),
            tensorboard=tensorboard,
        ),
    )
    learned = sum(value.numel() for value in checkpoint.learned.values())
    result = {"checkpoint": str(out), "learned_parameters": learned, "losses": [dict(one) for one in checkpoint.losses]}
    emit(result, f"{out}: {config.method} on {config.base_model}, {learned:,} learned parameters", as_json=as_json)


def synthetic_beside(data: Path) -> Path:
    """Where the synthetic set of a data set lies if nobody says: in its folder, or beside its list of images."""
    return (data if data.is_dir() else data.parent) / SYNTHETIC


def feature_cache() -> Path | None:
    """Where features of frozen image towers are kept between runs; None: nowhere."""
    folder = cache_folder()
    return folder and folder / "features"


def synthetic_set_for(config: TrainConfig, folder: Path) -> SyntheticSet | None:
    """The synthetic set in ``folder``, if a run with these settings learns from one.

    Raises:
        DataError: it does, and there is none.
    """
    from clipship.training.methods import method_named
    from clipship.training.synthetic import SyntheticSet

    if not method_named(config.method).needs_synthetic or config.synthetic_shots == 0:
        return None
    if not folder.is_dir():
        raise DataError(
            f"recipe {config.recipe} learns from synthetic images and {folder} is not there: "
            "give a synthetic set with --synthetic DIR, or make one with clipship synthesize"
        )
    return SyntheticSet.load(folder)


def _absolute(base_model: str | None) -> str | None:
    """A folder is noted with its whole path, so that the checkpoint can be used from anywhere."""
    return str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model


def checked_device(name: str | None) -> str | None:
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
@click.option("--data", required=True, multiple=True, help="A data set; several times: the learned one and others.")
@click.option("--base-model", metavar="NAME", help="Where the base model is now, if its folder was moved.")
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@json_option
def evaluate(checkpoint: str, data: tuple[str, ...], base_model: str | None, device: str | None, as_json: bool) -> None:
    """Classify test images and store the scores in CHECKPOINT.

    On the data set it was trained on: each half among its own class names, and among all (open vocabulary). On others:
    their images among their class names, nothing learned from them.

    Example: clipship evaluate runs/prints --data world/prints --data world/neon
    """
    with needs_training():
        from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint, save_scores
        from clipship.training.clip import default_device, load_clip
        from clipship.training.data import load_dataset
        from clipship.training.evaluate import evaluate as scores_of
    folder = existing_folder(checkpoint, "the folder of a checkpoint")
    loaded = load_checkpoint(folder)
    datasets = [load_dataset(Path(one)) for one in data]
    clip = load_clip(base_model or loaded.config.base_model).to(checked_device(device) or default_device())
    method = method_from_checkpoint(loaded, clip)
    found = {}
    for dataset in datasets:
        scores = scores_of(
            method,
            dataset,
            selection=loaded.selection,
            trained_on=loaded.dataset,
            temperature=loaded.temperature,
            cache=feature_cache(),
        )
        save_scores(folder, dataset.record.name, scores.to_json())
        found[dataset.record.name] = scores
    text = "\n".join(map(_table, found.values()))
    emit({name: scores.to_json() for name, scores in found.items()}, text, as_json=as_json)


def _table(scores: Scores) -> str:
    """A small table of percentages."""
    from rich.console import Console
    from rich.table import Table

    table = Table("top-1 %", "base", "new", "harmonic mean", "all", title=f"{scores.dataset}, {scores.split} images")
    rows: dict[str, tuple[float | None, ...]] = {
        "base-to-new": (scores.base, scores.new, scores.harmonic_mean, None),
        "open vocabulary": (scores.open_base, scores.open_new, scores.open_harmonic_mean, scores.all),
        "open, mean over classes": (scores.seen, scores.unseen, scores.generalised_harmonic_mean, None),
    }
    for name, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in values))
    console = Console(width=88)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
