"""Any one image can be made again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.synthesis.class_prompts import ClassPrompts, with_images
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.image_generator import FLAGGED
from clipship.training.synthesis.remake import config_of, remake
from clipship.training.synthesis.run import file_of, synthesize
from clipship.training.synthetic_set import SyntheticSet

Variant = Callable[..., SynthesisConfig]


def test_an_image_comes_out_the_same_to_the_byte(
    strict_pipeline: Path, smaller: Variant, class_prompts: ClassPrompts, tmp_path: Path, xl_pipeline: Path
) -> None:
    moved = Path(shutil.copytree(strict_pipeline, tmp_path / "moved"))
    config = smaller(pipeline=str(moved), negative_prompt="blue")
    made = synthesize(config, class_prompts, out=tmp_path / "set", device="cpu")
    assert made is not None
    assert config_of(made) == config
    moved.rename(tmp_path / "moved again")
    chosen = [image for image in made.images if image.path.exists()]
    again = [image for image in chosen if image.seed % 16]
    assert again, "there is one that was made with its second seed"
    for image in (chosen[0], chosen[-1], again[0]):
        found = remake(made, image, pipeline=str(tmp_path / "moved again"), device="cpu")
        assert file_of(found, config) == image.path.read_bytes()
    flagged = next(image for image in made.images if image.reason == FLAGGED)
    with pytest.raises(DataError, match="there is no image to make again"):
        remake(made, flagged, pipeline=str(tmp_path / "moved again"), device="cpu")
    with pytest.raises(DataError, match=r"is not the one that made .* give the one that did"):
        remake(made, chosen[0], pipeline=str(xl_pipeline), device="cpu")


def test_image_to_image_too(smaller: Variant, class_prompts: ClassPrompts, data_folder: Path, tmp_path: Path) -> None:
    config = smaller(steps=4, strength=0.5, shots=2, filter="none", candidates=2)
    given = with_images(replace(class_prompts, class_names=("red", "green")), data_folder, config)
    made = synthesize(config, given, out=tmp_path, device="cpu")
    assert made is not None
    image = made.images[3]
    assert file_of(remake(made, image, device="cpu"), config) == image.path.read_bytes()


def test_sets_of_other_makers_are_refused(synthetic: SyntheticSet) -> None:
    with pytest.raises(DataError, match="was made by test: give a synthesized set"):
        remake(synthetic, synthetic.images[0])
