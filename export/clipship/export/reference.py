"""PyTorch's side of every comparison: the features of images and class names that an exported form must give too.

Shape legend: N images, H = W pixels, C class names, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clipship.core import bundle as layout
from clipship.core.bundle import Bundle, VocabularyFeatures
from clipship.core.errors import CheckpointError, DataError
from clipship.core.images import ImageDecodeError, ImageSpec, pixels_from_bytes
from clipship.core.vocabulary import Vocabulary
from clipship.export.encoders import ImageEncoder
from clipship.export.verify import TOLERANCES, Verification, run_in_batches, verify_encoder

if TYPE_CHECKING:
    from clipship.training.methods.base import Method

GOLDEN_COUNT = 8
"""Images that stay in the bundle."""

VERIFY_COUNT = 128
"""Images PyTorch and ONNX Runtime are compared on before the bundle is written."""

_TORCH_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that a bundle is verified with."""

    name: str
    """The file's name, for messages and for its suffix."""
    data: bytes
    """The file as it came."""


def pixels_of(pictures: Sequence[Picture], spec: ImageSpec) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of ``pictures``.

    Raises:
        DataError: one cannot be decoded.
    """
    return np.stack([_pixels(picture, spec) for picture in pictures])


def _pixels(picture: Picture, spec: ImageSpec) -> NDArray[np.uint8]:
    try:
        return pixels_from_bytes(picture.data, spec)
    except ImageDecodeError as error:
        raise DataError(f"{picture.name}: {error}: verify with images that can be read") from error


def image_features(method: Method, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit features [N, D] of uint8 ``pixels`` [N, H, W, 3] by PyTorch, through the very module that is exported."""
    encoder = ImageEncoder(method).eval()
    with torch.inference_mode():
        return run_in_batches(lambda rows: encoder(torch.from_numpy(rows)).numpy(), pixels, _TORCH_BATCH)


def probabilities(embedding: NDArray[np.float32], vocabulary: VocabularyFeatures) -> NDArray[np.float32]:
    """Softmax [N, C] of ``embedding`` [N, D] over the vocabulary."""
    logits = vocabulary.logit_scale * embedding @ vocabulary.features.T
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return scores


def compare_with_torch(
    method: Method,
    vocabulary: Vocabulary,
    features: VocabularyFeatures,
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    folder: Path,
) -> Verification:
    """The ONNX files of ``folder`` on ``pixels`` [N, H, W, 3] and on the vocabulary's prompts, against PyTorch.

    Args:
        expected: PyTorch's unit features [N, D] of ``pixels``.
        features: what decides the best class.
    """
    tokens = method.clip.tokenize(vocabulary.prompts(method.templates[0])).numpy()
    with torch.inference_mode():
        text = run_in_batches(lambda rows: method.text_features(torch.from_numpy(rows)).numpy(), tokens, _TORCH_BATCH)
    count = min(GOLDEN_COUNT, len(pixels))
    image_encoder = partial(
        verify_encoder, folder / layout.IMAGE_ENCODER, references=features.features, tolerance=TOLERANCES["fp32"]
    )
    golden = image_encoder("golden samples", pixels[:count], expected[:count])
    images = image_encoder("images", pixels, expected)
    prompts = verify_encoder(
        folder / layout.TEXT_ENCODER, "prompts", tokens, text, references=text, tolerance=TOLERANCES["text-fp32"]
    )
    return Verification((*golden, *images, *prompts))


def verify_against_method(bundle: Bundle, method: Method, pictures: Sequence[Picture]) -> Verification:
    """The bundle's ONNX files against PyTorch running ``method`` on ``pictures``.

    Raises:
        CheckpointError: the method runs on another base model than the bundle was packed from.
        DataError: a picture cannot be decoded.
    """
    if method.clip.digest != bundle.manifest.base_model_digest:
        raise CheckpointError(
            f"the checkpoint is for {method.clip.name} ({method.clip.digest[:12]}), the bundle was packed from "
            f"{bundle.manifest.base_model} ({bundle.manifest.base_model_digest[:12]}): give the bundle's own checkpoint"
        )
    pixels = pixels_of(pictures, bundle.image_spec)
    expected = image_features(method, pixels)
    features = bundle.vocabulary_features()
    return compare_with_torch(method, bundle.vocabulary, features, pixels, expected, bundle.path)
