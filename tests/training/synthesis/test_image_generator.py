"""What the generator makes is what diffusers makes, image by image, whatever else is in the batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clipship.core.errors import DataError, RecipeError
from clipship.core.vocabulary import Vocabulary
from clipship.training.synthesis import image_generator as module
from clipship.training.synthesis.candidates import Candidate
from clipship.training.synthesis.class_prompts import ClassPrompts, class_prompts_of
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.image_generator import BLANK, FLAGGED, ImageGenerator, Placement, precision_for
from clipship.training.synthesis.pipelines import pipeline_folder
from clipship.training.synthesis.recipes import synthesis_config

from .conftest import SIZE_PX, pixels

Variant = Callable[..., SynthesisConfig]
CPU = torch.device("cpu")


def generator_of(config: SynthesisConfig) -> ImageGenerator:
    return ImageGenerator(pipeline_folder(config), config, CPU)


def asked(seed: int, prompt: str = "a photo of a red.", source: Path | None = None) -> Candidate:
    given = None if source is None else str(source)
    return Candidate(class_name="red", place=seed, attempt=0, seed=seed, prompt=prompt, source=given)


def made(generator: ImageGenerator, *batch: Candidate) -> list[Any]:
    images = [one.image for one in generator.make(batch)]
    assert all(image is not None for image in images)
    return [pixels(image) for image in images if image is not None]


def test_images_are_those_of_the_plain_pipeline(pipeline: Path, smaller: Variant) -> None:
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(pipeline)
    plain.set_progress_bar_config(disable=True)
    config = smaller(steps=3, guidance=4.0, negative_prompt="blue")
    found = made(generator_of(config), asked(5), asked(6, "a cat"))
    for place, (seed, prompt) in enumerate([(5, "a photo of a red."), (6, "a cat")]):
        generator = torch.Generator().manual_seed(seed)
        expected = plain(
            prompt, negative_prompt="blue", num_inference_steps=3, guidance_scale=4.0, generator=generator
        ).images[0]
        assert np.abs(found[place] - pixels(expected)).max() <= 1  # sums in another order


def test_an_image_does_not_depend_on_those_beside_it(smaller: Variant) -> None:
    one = generator_of(smaller())
    alone, (first, second, third) = made(one, asked(5))[0], made(one, asked(4), asked(5), asked(6, "a cat"))
    assert np.abs(alone - second).max() <= 1
    assert np.abs(first - second).mean() > 3
    assert np.abs(second - third).mean() > 3


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"guidance": 1.0}, {"negative_prompt": "red red"}, {"scheduler": "DDPMScheduler"}]
)
def test_every_setting_reaches_the_pipeline(smaller: Variant, changes: dict[str, Any]) -> None:
    plain, changed = made(generator_of(smaller()), asked(5))[0], made(generator_of(smaller(**changes)), asked(5))[0]
    assert np.abs(plain - changed).max() > 1


def test_sizes_precision_and_scheduler(smaller: Variant) -> None:
    small = generator_of(smaller(size_px=16, precision="bf16", scheduler="DDPMScheduler"))
    assert small.scheduler == "DDPMScheduler"
    assert made(small, asked(5))[0].shape == (16, 16, 3)
    assert generator_of(smaller()).size_px == SIZE_PX
    assert precision_for("auto", CPU) == "fp32"
    assert precision_for("fp16", CPU) == "fp16"
    with pytest.raises(RecipeError, match="no scheduler 'DDIMSheduler': did you mean DDIMScheduler"):
        generator_of(smaller(scheduler="DDIMSheduler"))


@pytest.mark.parametrize("name", ["xl_pipeline", "sd3_pipeline", "flux_pipeline"])
def test_other_pipeline_classes_need_no_other_code(
    name: str, smaller: Variant, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    real = tmp_path / "real.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(real)
    one = generator_of(
        smaller(pipeline=str(folder), negative_prompt="blue", guidance=3.0, strength=0.5, size_px=SIZE_PX)
    )
    for source in (None, real):
        first, second = made(one, asked(5, source=source), asked(6, source=source))
        assert first.shape == (SIZE_PX, SIZE_PX, 3)
        assert np.abs(first - second).mean() > 1


def test_the_built_in_recipe_makes_images_of_the_world() -> None:
    config = replace(synthesis_config("tiny"), precision="fp32")
    one = generator_of(config)
    plain = class_prompts_of(config, Vocabulary(names=("red star", "blue house")))
    one.validate_prompts(plain)
    batch = [asked(seed, plain.prompts[name][0]) for name in plain.class_names for seed in range(3)]
    found = np.stack(made(one, *batch))
    assert found.shape == (6, 64, 64, 3)
    more_red_than_blue = (found[..., 0] - found[..., 2]).mean(axis=(1, 2))
    assert more_red_than_blue[:3].mean() > more_red_than_blue[3:].mean() + 5


def test_image_to_image_starts_from_the_real_image(pipeline: Path, smaller: Variant, tmp_path: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    path = tmp_path / "real.png"
    gradient = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    Image.fromarray(np.stack([gradient, gradient[::-1], gradient], axis=-1)).save(path)
    plain = StableDiffusionImg2ImgPipeline.from_pretrained(pipeline)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        "a photo of a red.",
        image=ImageOps.fit(Image.open(path), (SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC),
        strength=0.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    one = generator_of(smaller(steps=4, strength=0.5))
    found, other = made(one, asked(5, source=path), asked(6, source=path))
    assert np.abs(found - pixels(expected)).max() <= 1
    assert np.abs(found - other).mean() > 1
    assert np.abs(found - made(one, asked(5))[0]).mean() > 3, "not the image that text alone gives"


def test_flagged_and_blank_images_are_no_images(strict_pipeline: Path, smaller: Variant) -> None:
    strict = generator_of(smaller(pipeline=str(strict_pipeline)))
    found = strict.make([asked(seed) for seed in range(16)])
    reasons = [one.reason for one in found]
    assert 4 <= reasons.count(FLAGGED) <= 12
    assert all((one.image is None) == (one.reason is not None) for one in found)
    plain = generator_of(smaller())
    with torch.no_grad():
        plain._text.vae.decoder.conv_out.weight.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        blank = plain.make([asked(5)])
    assert blank[0].reason == BLANK


def test_a_prompt_that_would_be_cut_is_refused(smaller: Variant, class_prompts: ClassPrompts) -> None:
    one = generator_of(smaller())
    one.validate_prompts(class_prompts)
    long = replace(class_prompts, prompts={**class_prompts.prompts, "red": ("a photo of a " + "very " * 8 + "red.",)})
    with pytest.raises(DataError, match=r"class 'red': prompt 'a photo .* has 47 tokens, .* takes 40: shorten it"):
        one.validate_prompts(long)


def test_slices_give_the_same_images(
    smaller: Variant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made(generator_of(smaller()), asked(5), asked(6))
    monkeypatch.setattr(module, "placement_of", lambda **given: Placement(slicing=True))
    sliced = generator_of(smaller())
    assert "attention and decoder work in slices\n" in capsys.readouterr().err
    assert sliced._text.vae.use_slicing
    assert (
        max(np.abs(one - other).max() for one, other in zip(whole, made(sliced, asked(5), asked(6)), strict=True)) <= 1
    )


def test_the_longest_text_encoder_decides(sd3_pipeline: Path, smaller: Variant, class_prompts: ClassPrompts) -> None:
    one = generator_of(smaller(pipeline=str(sd3_pipeline)))
    caption = "a photo of a " + "very " * 8 + "red."  # too long for CLIP, not for T5
    one.validate_prompts(replace(class_prompts, prompts={**class_prompts.prompts, "red": (caption,)}))
    with pytest.raises(DataError, match="takes 60: shorten it"):
        one.validate_prompts(replace(class_prompts, prompts={**class_prompts.prompts, "red": (caption * 2,)}))
    short = generator_of(smaller(pipeline=str(sd3_pipeline), max_tokens=45))
    with pytest.raises(DataError, match="takes 45: shorten it"):
        short.validate_prompts(replace(class_prompts, prompts={**class_prompts.prompts, "red": (caption,)}))


def test_a_negative_prompt_that_nobody_reads_is_refused(smaller: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def call(self: Any, prompt: Any = None) -> None:
        """A pipeline that takes a prompt and nothing else."""

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", call)
    with pytest.raises(RecipeError, match="takes no negative prompt"):
        generator_of(smaller(negative_prompt="blue"))


def test_a_pipeline_that_cannot_be_loaded_is_one_line(pipeline: Path, smaller: Variant, tmp_path: Path) -> None:
    import json
    import shutil

    copy = Path(shutil.copytree(pipeline, tmp_path / "copy"))
    settings = copy / "unet" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"cross_attention_dim": 24}))
    with pytest.raises(RecipeError, match="StableDiffusionPipeline cannot be loaded") as caught:
        generator_of(smaller(pipeline=str(copy)))
    assert "\n" not in str(caught.value)
