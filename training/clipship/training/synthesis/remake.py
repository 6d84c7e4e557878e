"""Makes one image of a synthetic set again, to the pixel."""

from __future__ import annotations

from dataclasses import fields, replace

from PIL import Image

from clipship.core.errors import DataError
from clipship.training.distributed import Distributed
from clipship.training.synthesis.candidates import Candidate
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.image_generator import ImageGenerator
from clipship.training.synthesis.pipelines import pipeline_folder
from clipship.training.synthesis.workspace import KIND
from clipship.training.synthetic_set import SyntheticImage, SyntheticSet


def remake(
    synthetic: SyntheticSet, image: SyntheticImage, *, pipeline: str | None = None, device: str | None = None
) -> Image.Image:
    """Make ``image`` of ``synthetic`` again, with the whole batch that it was made in.

    On some devices the last bit of an image depends on the size of its batch. The same device and versions (they are in
    the manifest) give the same pixels and, encoded with the set's format and quality, the same file.

    Args:
        pipeline: where the pipeline is now, if its folder was moved.
        device: of torch; None: the GPU if there is one.

    Raises:
        DataError: something else made the set, the pipeline is another one, or the image was not usable.
        RecipeError: the pipeline cannot be used.
    """
    config = config_of(synthetic)
    folder = pipeline_folder(replace(config, pipeline=pipeline or config.pipeline))
    if folder.revision != image.revision:
        raise DataError(
            f"pipeline {folder.name} is not the one that made {image.path} (revision {folder.revision[:12]}, "
            f"was {str(image.revision)[:12]}): give the one that did"
        )
    batch = [one for one in synthetic.images if one.batch == image.batch]
    generator = ImageGenerator(folder, config, Distributed(device).device)
    made = generator.make([_candidate(one) for one in batch])[batch.index(image)]
    if made.image is None:
        raise DataError(f"{image.path}: {made.reason}: there is no image to make again")
    return made.image


def config_of(synthetic: SyntheticSet) -> SynthesisConfig:
    """The settings that ``synthetic`` was made with.

    Raises:
        DataError: it was not made by ``clipship synthesize``.
    """
    if synthetic.generator.get("kind") != KIND:
        raise DataError(f"{synthetic.folder}: was made by {synthetic.generator.get('kind')}: give a synthesized set")
    settings = synthetic.generator["settings"]
    return SynthesisConfig.from_json({field.name: settings[field.name] for field in fields(SynthesisConfig)})


def _candidate(image: SyntheticImage) -> Candidate:
    return Candidate(
        class_name=image.class_name, place=0, attempt=0, seed=image.seed, prompt=image.prompt, source=image.source
    )
