"""Real text-to-image pipelines of a few thousand random weights, in folders as diffusers saves them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipship.training.synthesis.class_prompts import ClassPrompts, class_prompts_of, vocabulary_of
from clipship.training.synthesis.config import SynthesisConfig

TOKENS = 40
SIZE_PX = 32


def quiet() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def tokenizer_in(folder: Path) -> Any:
    """A CLIPTokenizer whose tokens are single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def text_encoder(tokenizer: Any, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=16,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(*, width: int) -> tuple[Any, Any]:
    """A T5 encoder, and its tokenizer of single characters, which takes 60 tokens."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(chr(code), -1.0) for code in (*range(33, 127), 0x2581)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=60)
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def autoencoder(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE_PX,
        **more,
    )


def denoiser(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": SIZE_PX // 2,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **more,
        }
    )


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stable_diffusion(folder: Path, *, checker: Any = None, processor: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tokenizer_in(folder.with_name(f"{folder.name}-words"))
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=denoiser(),
            scheduler=scheduler(),
            safety_checker=checker,
            feature_extractor=processor,
            requires_safety_checker=checker is not None,
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def safety_checker() -> tuple[Any, Any]:
    """A safety checker with random weights, and what prepares images for it."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 4}
    config = CLIPConfig(text_config={**small, "vocab_size": 8}, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(2)  # no cosine is that large: nothing is flagged
        checker.special_care_embeds_weights.fill_(2)
    return checker, processor


def flag_half(checker: Any, processor: Any, images: list[Image.Image]) -> None:
    """Set the threshold of one concept so that it flags half of ``images``."""
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        cosines = torch.nn.functional.cosine_similarity(embeds, checker.concept_embeds[:1])
        checker.concept_embeds_weights[0] = cosines.median()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, 32 px."""
    folder = tmp_path_factory.mktemp("pipelines") / "small"
    stable_diffusion(folder)
    return folder


@pytest.fixture(scope="session")
def strict_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a safety checker that flags about half of the images."""
    folder = tmp_path_factory.mktemp("pipelines") / "strict"
    torch.manual_seed(3)
    checker, processor = safety_checker()
    pipeline = stable_diffusion(folder.with_name("lenient"), checker=checker, processor=processor)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(16)]
    images = pipeline(["a photo of a red."] * 16, num_inference_steps=2, generator=seeds).images
    flag_half(checker, processor, images)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL: two text encoders, other arguments."""
    from diffusers import StableDiffusionXLPipeline

    quiet()
    folder = tmp_path_factory.mktemp("pipelines") / "xl"
    tokenizer = tokenizer_in(folder.with_name("words"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder(tokenizer),
            text_encoder_2=text_encoder(tokenizer, projection=True),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=denoiser(
                cross_attention_dim=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=16 + 6 * 4,
            ),
            scheduler=scheduler(),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX: flow matching, a transformer, CLIP and T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    quiet()
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    tokenizer = tokenizer_in(folder.with_name("words"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, words = t5(width=16)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        pipeline = FluxPipeline(
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.0),
            text_encoder=text_encoder(tokenizer),
            text_encoder_2=encoder,
            tokenizer=tokenizer,
            tokenizer_2=words,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3: three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    quiet()
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    tokenizer = tokenizer_in(folder.with_name("words"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, words = t5(width=32)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE_PX // 2,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
        )
        pipeline = StableDiffusion3Pipeline(
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.0),
            text_encoder=text_encoder(tokenizer, projection=True),
            text_encoder_2=text_encoder(tokenizer, projection=True),
            text_encoder_3=encoder,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=words,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("red\ngreen\nblue sky\n")
    return path


@pytest.fixture
def config(pipeline: Path, model_folder: Path) -> SynthesisConfig:
    return SynthesisConfig(
        recipe="test",
        pipeline=str(pipeline),
        steps=2,
        candidates=5,
        keep=2,
        batch_size=4,
        scorer=str(model_folder),
        duplicates=1.0,
        precision="fp32",
    )


@pytest.fixture
def class_prompts(config: SynthesisConfig, classes: Path) -> ClassPrompts:
    return class_prompts_of(config, vocabulary_of(classes))


@pytest.fixture
def smaller(config: SynthesisConfig) -> Callable[..., SynthesisConfig]:
    """Variants of ``config``."""
    return lambda **changes: replace(config, **changes)


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), np.int16)
