"""The frozen CLIP under every method: open_clip's own model, its tokenizer and how images enter it.

Shapes: N images, C prompts, L tokens a prompt, H = W pixels, D joint dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from clipship.core.errors import DataError, RecipeError, near
from clipship.core.images.decoding import ImageSpec, pixels_from_image
from clipship.training.model.builtin import TINY, builtin_folder

_CONFIG = "open_clip_config.json"
_RANDOM = "random"
_FORMS = (
    f'"{TINY}", "ARCHITECTURE/PRETRAINED" as open_clip names them, "ARCHITECTURE/random", or a folder with {_CONFIG}'
)


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen open_clip model: evaluation mode, no gradients, both towers open_clip's own transformers."""

    name: str
    """What :func:`load_clip` was given."""
    model: Any
    """open_clip's ``CLIP`` or ``CustomTextCLIP``, both ``nn.Module``."""
    image_spec: ImageSpec
    """How images become its input."""
    tokenizer: Any
    """open_clip's ``SimpleTokenizer`` with the model's context length."""

    @property
    def visual(self) -> Any:
        """The image tower, open_clip's ``VisionTransformer``."""
        return self.model.visual

    @property
    def text(self) -> Any:
        """The module that holds the text tower: the model itself, or its ``text`` (a ``TextTransformer``)."""
        return getattr(self.model, "text", self.model)

    @property
    def embed_dim(self) -> int:
        """D, the joint dimension."""
        return int(self.visual.proj.shape[1])

    @property
    def context_length(self) -> int:
        """L, the tokens of a prompt, padding included."""
        return int(self.text.context_length)

    @property
    def image_width(self) -> int:
        """The width of the image tower's tokens."""
        return int(self.visual.transformer.width)

    @property
    def text_width(self) -> int:
        """The width of the text tower's tokens."""
        return int(self.text.transformer.width)

    @property
    def image_layers(self) -> int:
        """The number of blocks in the image tower."""
        return len(self.visual.transformer.resblocks)

    @property
    def text_layers(self) -> int:
        """The number of blocks in the text tower."""
        return len(self.text.transformer.resblocks)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def logit_scale(self) -> float:
        """The factor before the softmax, exponentiated (100 for OpenAI's CLIP)."""
        return float(self.model.logit_scale.detach().cpu().double().exp())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of all tensors, in the order of their names."""
        return digest_of_tensors(self.model.state_dict())

    def to(self, device: torch.device | str) -> Clip:
        """Move the model to ``device`` and return self."""
        self.model.to(device)
        return self

    def token_ids(self, text: str) -> list[int]:
        """The tokens of ``text`` without start, end and padding."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 [C, L] on the CPU.

        Raises:
            DataError: a prompt is longer than L (open_clip would silently truncate it), or holds a start or end token.
        """
        for prompt in prompts:
            ids = self.token_ids(prompt)
            if not {self.tokenizer.sot_token_id, self.tokenizer.eot_token_id}.isdisjoint(ids):
                raise DataError(f"prompt {prompt!r} holds CLIP's start or end token: rename the class")
            count = len(ids) + 2  # start and end
            if count > self.context_length:
                raise DataError(
                    f"prompt {prompt!r} has {count} tokens, {self.name} takes {self.context_length}: shorten the name"
                )
        tokens: Tensor = self.tokenizer(list(prompts), context_length=self.context_length)
        return tokens

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 [3, H, W]: open_clip's evaluation transform."""
        return self.normalize(torch.from_numpy(pixels_from_image(image, self.image_spec).copy())[None])[0]

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as torchvision's ``ToTensor`` and ``Normalize`` compute it."""
        mean = torch.tensor(self.image_spec.mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.image_spec.std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
        # The cast comes first: TensorRT takes uint8 as a network's input, and nothing but a cast may read it.
        return (pixels.float().permute(0, 3, 1, 2) / 255 - mean) / std


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def digest_of_tensors(tensors: dict[str, Any]) -> str:
    """SHA-256 over the names and bytes of ``tensors`` in the order of their names: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_clip(name: str) -> Clip:
    """Load a frozen CLIP on the CPU in float32.

    ``name`` is "clipship-tiny", "ARCHITECTURE/PRETRAINED" as open_clip names them ("ViT-B-16/openai", downloaded and
    cached by open_clip), "ARCHITECTURE/random" (weights drawn with seed 0, for tests), or a folder in open_clip's
    local-dir format.

    Raises:
        RecipeError: an unknown name, weights that are missing or do not fit, or an architecture that prompts cannot
        enter.
    """
    folder = builtin_folder(TINY) if name == TINY else Path(name)
    from_folder = name == TINY or (folder / _CONFIG).is_file()
    model, tokenizer = _from_folder(name, folder) if from_folder else _from_open_clip(name)
    towers = (model.visual, getattr(model, "text", model))
    if not all(tower.transformer.batch_first for tower in towers):
        raise RecipeError(f"model {name}: its blocks are not batch-first: install open_clip_torch 3.0 or later")
    model.eval().requires_grad_(False)
    return Clip(name=name, model=model, image_spec=_image_spec_of(name, model), tokenizer=tokenizer)


def has_random_weights(name: str) -> bool:
    """Whether :func:`load_clip` would draw the weights of ``name`` instead of reading them."""
    return name.rpartition("/")[2] == _RANDOM and not (Path(name) / _CONFIG).is_file()


def _from_folder(name: str, folder: Path) -> tuple[Any, Any]:
    import open_clip

    path = f"local-dir:{folder}"
    try:
        _validate_towers(name, open_clip.get_model_config(path))
        return open_clip.create_model(path, require_pretrained=True), open_clip.get_tokenizer(path)
    except RecipeError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise RecipeError(f"model {name}: {error}: give a folder with {_CONFIG} and its weights") from error


def _from_open_clip(name: str) -> tuple[Any, Any]:
    import open_clip

    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise RecipeError(f"unknown model {name!r}: {near(architecture, [*known, TINY])}; give {_FORMS}")
    tags = [*open_clip.list_pretrained_tags_by_model(architecture), _RANDOM]
    if tag not in tags:
        raise RecipeError(f"model {architecture} has no weights {tag!r}: {near(tag, tags)}; give {_FORMS}")
    _validate_towers(name, open_clip.get_model_config(architecture))
    if tag == _RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return open_clip.create_model(architecture), open_clip.get_tokenizer(architecture)
    # open_clip only warns when weights trained with QuickGELU are put into a model without it, and accuracy suffers.
    quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    try:
        model = open_clip.create_model(architecture, tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    except (RuntimeError, OSError) as error:
        raise RecipeError(f"model {name}: {error}: check the network, or give {_FORMS}") from error
    return model, open_clip.get_tokenizer(architecture)


def _validate_towers(name: str, config: dict[str, Any]) -> None:
    """Refuse towers that prompts cannot enter, before their weights are downloaded."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    has_class_token = text.get("embed_cls", False) or "multimodal_cfg" in config
    pools_otherwise = vision.get("attentional_pool", False) or vision.get("pool_type", "tok") == "none"
    problems = {
        "its image tower is not a VisionTransformer": "timm_model_name" in vision
        or not isinstance(vision["layers"], int),
        "its text tower is not a TextTransformer": "hf_model_name" in text,
        "its tokenizer is not CLIP's own": "hf_tokenizer_name" in text,
        "its image tower pools by attention or not at all": pools_otherwise,
        "its text tower has a class token": has_class_token,
    }
    for problem, found in problems.items():
        if found:
            raise RecipeError(f"model {name}: {problem}: give a plain open_clip ViT such as ViT-B-16/openai, or {TINY}")


def _image_spec_of(name: str, model: Any) -> ImageSpec:
    from open_clip.model import get_model_preprocess_cfg

    given = get_model_preprocess_cfg(model)
    size = given["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise RecipeError(f"model {name} takes images of {width} x {height}: only square ones are supported")
    try:
        return ImageSpec(
            size_px=height,
            mean=tuple(given["mean"]),
            std=tuple(given["std"]),
            interpolation=given.get("interpolation", "bicubic"),
            resize_mode=given.get("resize_mode", "shortest"),
        )
    except ValueError as error:
        raise RecipeError(f"model {name}: {error}: give a model with CLIP's own preprocessing") from error
