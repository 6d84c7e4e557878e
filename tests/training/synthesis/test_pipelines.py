"""Pipelines that are unknown, half there, or of another kind are refused before anything is loaded."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipship.core.errors import MissingExtraError, RecipeError
from clipship.training.model.builtin import TINY_DIFFUSION
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.pipelines import pipeline_folder, validate_text_pipeline

Variant = Callable[..., SynthesisConfig]

NEEDED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "copy"))


def test_a_whole_folder_says_what_it_is(pipeline: Path, copy: Path, smaller: Variant) -> None:
    found = pipeline_folder(smaller())
    assert (found.class_name, found.variant, found.path) == ("StableDiffusionPipeline", None, pipeline)
    assert len(found.revision) == 64
    assert pipeline_folder(smaller(pipeline=str(copy))).revision == found.revision, "the place does not count"
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert pipeline_folder(smaller(pipeline=str(copy))).revision != found.revision


@pytest.mark.parametrize("name", NEEDED)
def test_the_missing_file_is_named(copy: Path, smaller: Variant, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(RecipeError, match="is missing") as caught:
        pipeline_folder(smaller(pipeline=str(copy)))
    assert str(copy / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_not_downloaded_to_its_end_is_named(copy: Path, smaller: Variant) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        weights.write_bytes(whole[:length])
        with pytest.raises(
            RecipeError, match=rf"unet/diffusion_pytorch_model.safetensors is truncated or damaged .*\({length} bytes"
        ):
            pipeline_folder(smaller(pipeline=str(copy)))


def test_shards_and_variants_are_looked_for(copy: Path, smaller: Variant) -> None:
    unet = copy / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    shard = weights.rename(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    listing = {"weight_map": {"a": shard.name, "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))
    with pytest.raises(RecipeError, match=r"00002-of-00002.safetensors is missing"):
        pipeline_folder(smaller(pipeline=str(copy)))
    shard.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    assert pipeline_folder(smaller(pipeline=str(copy), variant="fp16")).variant == "fp16"
    with pytest.raises(RecipeError, match=r"00001-of-00002.safetensors is missing"):
        pipeline_folder(smaller(pipeline=str(copy)))


def test_weights_that_can_run_code_are_not_read(copy: Path, smaller: Variant) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(RecipeError, match="can run code: save the pipeline again"):
        pipeline_folder(smaller(pipeline=str(copy)))


@pytest.mark.parametrize(
    ("class_name", "complaint"),
    [
        ("DDPMPipeline", "DDPMPipeline takes no text: give a text-to-image pipeline"),
        ("StableVideoDiffusionPipeline", "StableVideoDiffusionPipeline takes no text"),
        ("TomorrowsPipeline", "has no TomorrowsPipeline: update diffusers"),
    ],
)
def test_pipelines_without_text_are_refused_by_name(
    copy: Path, smaller: Variant, class_name: str, complaint: str
) -> None:
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": class_name}))
    with pytest.raises(RecipeError, match=complaint):
        pipeline_folder(smaller(pipeline=str(copy)))


@pytest.mark.parametrize(
    "class_name",
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"],
)
def test_the_pipelines_of_the_recipes_take_text(class_name: str) -> None:
    validate_text_pipeline(class_name, "x")


def test_an_index_that_is_no_pipeline_is_refused(copy: Path, smaller: Variant) -> None:
    for content, complaint in (("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "names no pipeline class")):
        (copy / "model_index.json").write_text(content)
        with pytest.raises(RecipeError, match=complaint):
            pipeline_folder(smaller(pipeline=str(copy)))


def test_what_is_neither_folder_nor_hub_id_is_refused(smaller: Variant) -> None:
    for name in ("absent", "/no/such/folder", "a/b/c"):
        with pytest.raises(RecipeError, match="no such folder, and no hub id"):
            pipeline_folder(smaller(pipeline=name))


def test_a_hub_id_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, smaller: Variant) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RecipeError, match=r"owner/model: cannot be downloaded .*check the network, or give a folder"
    ) as e:
        pipeline_folder(smaller(pipeline="owner/model"))
    assert "\n" not in str(e.value)


def test_the_built_in_pipeline_lies_with_the_package(
    smaller: Variant, monkeypatch: pytest.MonkeyPatch, copy: Path
) -> None:
    monkeypatch.setattr("clipship.training.model.builtin.MODELS", copy.parent)
    copy.rename(copy.with_name(TINY_DIFFUSION))
    assert pipeline_folder(smaller(pipeline=TINY_DIFFUSION)).path == copy.with_name(TINY_DIFFUSION)


def test_a_missing_diffusers_says_what_to_install(smaller: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"diffusers is not installed: run pip install 'clipship\[synthesis\]'"):
        pipeline_folder(smaller())
