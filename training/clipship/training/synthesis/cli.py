"""``clipship synthesize``: a synthetic set from a text-to-image pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, json_option, option_group
from clipship.core.errors import UsageError

if TYPE_CHECKING:
    from clipship.training.synthesis.class_prompts import ClassPrompts
    from clipship.training.synthesis.config import SynthesisConfig
    from clipship.training.synthetic_set import SyntheticSet

_FILE = click.Path(path_type=Path)

_prompt_options = option_group(
    click.option("--template", multiple=True, metavar="TEXT", help="A prompt with {} for the class; repeatable."),
    click.option("--context-file", type=_FILE, help="Words added to the prompts, one context a line."),
    click.option("--prompt-file", type=_FILE, help='JSON, {"class": ["prompt", ...]}, instead of templates.'),
    click.option("--negative-prompt", metavar="TEXT", help="What images should not show."),
)
_pipeline_options = option_group(
    click.option(
        "--pipeline", metavar="NAME", help="A folder in diffusers' format, a hub id, clipship-tiny-diffusion."
    ),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id."),
    click.option("--scheduler", metavar="CLASS", help="A scheduler of diffusers; default: the pipeline's own."),
    click.option("--steps", type=click.IntRange(min=1), help="Denoising steps."),
    click.option("--guidance", type=click.FloatRange(min=0), help="Classifier-free guidance scale."),
    click.option("--size", "size_px", type=click.IntRange(min=8), metavar="PIXELS", help="Side of the images."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="Of the pipeline."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Images a batch."),
)
_image_options = option_group(
    click.option("--images", type=_FILE, help="A data set; image-to-image starts from its few-shot sample."),
    click.option("--image-classes", type=click.Choice(["base", "all"]), default="base", show_default=True,
                 help="Which classes have real images."),
    click.option("--shots", type=click.IntRange(min=0), help="Real images a class; 0: all."),
    click.option("--strength", type=click.FloatRange(min=0, max=1), help="Noise added to real images."),
)  # fmt: skip
_choice_options = option_group(
    click.option("--candidates", type=click.IntRange(min=1), help="Images to make of each class."),
    click.option("--keep", type=click.IntRange(min=1), help="Images to keep of each class."),
    click.option("--scorer", metavar="NAME", help="The CLIP that scores, as train --base-model takes it."),
    click.option("--filter", type=click.Choice(["similarity", "class", "none"]), help="How images are chosen."),
    click.option("--duplicates", type=click.FloatRange(min=0, max=1, min_open=True), metavar="COSINE",
                 help="Cosine from which two images are duplicates; 1: keep all."),
    click.option("--format", "image_format", type=click.Choice(["webp", "jpeg"]), help="Of the image files."),
    click.option("--seed", type=click.IntRange(min=0), help="Images depend on it."),
)  # fmt: skip


@click.command()
@click.argument("recipe")
@click.option("--classes", required=True, type=_FILE, help="Names, one a line; a JSON vocabulary; or a data set.")
@click.option("--out", required=True, type=_FILE, help="Folder for the set.")
@_prompt_options
@_pipeline_options
@_image_options
@_choice_options
@click.option("--device", help="A torch device; default: the GPU if there is one.")
@json_option
def synthesize(recipe: str, classes: Path, out: Path, device: str | None, as_json: bool, **given: Any) -> None:
    """Make images of classes with RECIPE (see clipship recipes); options override its settings.

    Killed and started again, it resumes. Under accelerate launch or torchrun each process makes its share.

    Example: clipship synthesize tiny --classes world/prints --out world/prints/synthetic
    """
    from clipship.training.requirements import needs_training, validated_device

    with needs_training():
        from clipship.training.synthesis.run import synthesize as run
    config, class_prompts = _asked_for(recipe, classes, given)
    made = run(config, class_prompts, out=out, device=validated_device(device))
    if made is not None:
        result = summary(made)
        kept, total = result["kept"], result["candidates"]
        text = f"{out}: {kept} of {total} images kept, {result['classes']} classes; look at {out / 'sheets'}"
        emit(result, text, as_json=as_json)


def _asked_for(recipe: str, classes: Path, given: dict[str, Any]) -> tuple[SynthesisConfig, ClassPrompts]:
    """The settings of the recipe, overridden by the options, and the prompts."""
    from clipship.training.synthesis.class_prompts import (
        captions_of,
        class_prompts_of,
        contexts_of,
        vocabulary_of,
        with_images,
    )
    from clipship.training.synthesis.recipes import synthesis_config

    config = synthesis_config(recipe)
    contexts, captions, images = given.pop("context_file"), given.pop("prompt_file"), given.pop("images")
    image_classes, given["templates"] = given.pop("image_classes"), given.pop("template") or None
    if contexts is not None:
        given["contexts"] = contexts_of(contexts)
    if given["pipeline"] and Path(given["pipeline"]).is_dir():
        given["pipeline"] = str(Path(given["pipeline"]).resolve())  # the set records it
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    vocabulary = vocabulary_of(classes)
    class_prompts = class_prompts_of(config, vocabulary, captions_of(captions, vocabulary.names) if captions else None)
    if images is not None:
        return config, with_images(class_prompts, images, config, classes=image_classes)
    if config.strength and given["strength"] is None:
        raise UsageError(f"recipe {recipe} starts from real images: give --images DIR, or --strength 0 for text alone")
    return config, class_prompts


def summary(made: SyntheticSet) -> dict[str, Any]:
    """Counts of a set: classes, candidates, kept images, and the classes with fewer than wanted."""
    kept = {name: len(made.kept(name)) for name in made.class_names}
    return {
        "path": str(made.folder),
        "classes": len(made.class_names),
        "candidates": len(made.images),
        "kept": sum(kept.values()),
        "fewer": {name: count for name, count in kept.items() if count < made.images_per_class},
    }
