"""The verbs of the training stage: ``world``, ``recipes``, ``train``, ``evaluate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, existing_folder, json_option
from clipship.core.machine.caches import cache_folder
from clipship.training.requirements import needs_training, validated_device

if TYPE_CHECKING:
    from clipship.training.evaluation.evaluate import Scores


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the recipes of training and synthesis.

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
@click.option("--resume", is_flag=True, help="Continue an interrupted run; a finished one is left unchanged.")
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
        from clipship.training.datasets.load import load_dataset
        from clipship.training.inputs.synthetic import synthetic_beside, synthetic_set_for
        from clipship.training.loop.loop import RunOptions
        from clipship.training.loop.loop import train as run
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
            device=validated_device(device),
            workers=workers,
            cache=feature_cache(),
            tensorboard=tensorboard,
        ),
    )
    learned = sum(value.numel() for value in checkpoint.learned.values())
    result = {"checkpoint": str(out), "learned_parameters": learned, "losses": [dict(one) for one in checkpoint.losses]}
    emit(result, f"{out}: {config.method} on {config.base_model}, {learned:,} learned parameters", as_json=as_json)


def feature_cache() -> Path | None:
    """The folder that caches features of frozen image towers between runs; None: no cache."""
    folder = cache_folder()
    return folder and folder / "features"


def _absolute(base_model: str | None) -> str | None:
    """A folder as an absolute path, so that the checkpoint works from any working directory."""
    return str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True, multiple=True, help="A data set; several times: the learned one and others.")
@click.option("--base-model", metavar="NAME", help="The base model's folder, if it was moved.")
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@json_option
def evaluate(checkpoint: str, data: tuple[str, ...], base_model: str | None, device: str | None, as_json: bool) -> None:
    """Classify test images and store the scores in CHECKPOINT.

    On the data set it was trained on, each half is scored among its own class names and among all (open vocabulary).
    Other data sets are scored among their own class names.

    Example: clipship evaluate runs/prints --data world/prints --data world/neon
    """
    with needs_training():
        from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint, save_scores
        from clipship.training.datasets.load import load_dataset
        from clipship.training.evaluation.evaluate import evaluate as scores_of
        from clipship.training.model.clip import default_device, load_clip
    folder = existing_folder(checkpoint, "the folder of a checkpoint")
    loaded = load_checkpoint(folder)
    datasets = [load_dataset(Path(one)) for one in data]
    clip = load_clip(base_model or loaded.config.base_model).to(validated_device(device) or default_device())
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
