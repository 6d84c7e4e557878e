"""PyTorch's side of every comparison: the features that an exported variant must give, too.

Shape legend: N images, H = W pixels, C class names, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipship.core import bundle as layout
from clipship.core.bundle import Bundle, VocabularyFeatures
from clipship.core.comparison import (
    BATCH_SIZES,
    Comparison,
    Verification,
    VerificationSamples,
    compare_features,
    run_in_batches,
    verify_runner,
)
from clipship.core.errors import CheckFailed, CheckpointError, DataError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec, pixels_from_bytes
from clipship.core.tolerances import TOLERANCES
from clipship.core.vocabulary import Vocabulary
from clipship.export.encoders import ImageEncoder
from clipship.export.image_input import Picture as Picture
from clipship.export.verification.runners import onnx_runner, onnx_session, session_function
from clipship.training.model.prompts import without_padding

if TYPE_CHECKING:
    from clipship.training.methods.base import Method

GOLDEN_COUNT = 8
"""Images that stay in the bundle."""

_TORCH_BATCH = 32


def pixels_of(pictures: Sequence[Picture], spec: ImageSpec) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of ``pictures``.

    Raises:
        DataError: one cannot be decoded.
    """
    rows = []
    for picture in pictures:
        try:
            rows.append(pixels_from_bytes(picture.data, spec))
        except ImageDecodeError as error:
            raise DataError(f"{picture.name}: {error}: verify with images that can be read") from error
    return np.stack(rows)


def image_features(method: Method, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit features [N, D] of uint8 ``pixels`` [N, H, W, 3] by PyTorch."""
    encoder = ImageEncoder(method).eval()
    with torch.inference_mode():
        return run_in_batches(lambda rows: encoder(torch.from_numpy(rows)).numpy(), pixels, _TORCH_BATCH)


_CHECKED_NAMES = 64
_CHECKED_EMBEDDINGS = 64
_MAX_PROBABILITY_DIFFERENCE = 1e-5


def validate_classifier(method: Method, names: Sequence[str], given: VocabularyFeatures) -> None:
    """Validate that the ``given`` classifier of ``names`` gives the probabilities of ``method`` in PyTorch.

    They are compared on embeddings at its classes, at the keys of its cache and at random, so no image is needed. Of a
    classifier without other parts than class features 64 names are compared, as PyTorch encodes them a second time.

    Raises:
        CheckFailed: a probability differs by more than 1e-5.
    """
    step = 1 if given.parts else max(1, len(names) // _CHECKED_NAMES)
    rows = range(0, len(names), step)
    given = given.merged([[row] for row in rows])
    embedding = _embeddings_near(given)
    with torch.inference_mode():
        logits = method.classifier([names[row] for row in rows])(torch.from_numpy(embedding).to(method.clip.device))
        expected = torch.softmax(logits.float(), dim=1).cpu().numpy()
    difference = float(np.abs(given.probabilities(embedding) - expected).max())
    if not difference <= _MAX_PROBABILITY_DIFFERENCE:
        raise CheckFailed(
            f"the exported classifier of {method.name} differs from PyTorch by {difference:.1e} in a probability "
            f"(at most {_MAX_PROBABILITY_DIFFERENCE:.0e}), nothing was written"
        )


def _embeddings_near(features: VocabularyFeatures) -> NDArray[np.float32]:
    """Unit [N, D]: at up to 64 classes, at up to 64 keys, and 64 at random."""
    parts = [features.features, *([features.cache.keys] if features.cache else [])]
    rows: list[NDArray[Any]] = [part[:: max(1, len(part) // _CHECKED_EMBEDDINGS)] for part in parts]
    random = np.random.default_rng(0).standard_normal((_CHECKED_EMBEDDINGS, features.features.shape[1]))
    embedding = np.concatenate([*rows, random.astype(np.float32)])
    unit: NDArray[np.float32] = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    return unit


def compare_with_torch(
    method: Method,
    vocabulary: Vocabulary,
    features: VocabularyFeatures,
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    folder: Path,
) -> Verification:
    """Compare the ONNX files in ``folder`` with PyTorch, on ``pixels`` [N, H, W, 3] and on the vocabulary's prompts.

    Args:
        expected: PyTorch's unit features [N, D] of ``pixels``.
        features: the classifier that picks the best class.
    """
    count = min(GOLDEN_COUNT, len(pixels))
    path = folder / layout.IMAGE_ENCODER
    runner = onnx_runner(path, pixels[:1])
    image_encoder = partial(verify_runner, runner, form=path.name, references=features, tolerance=TOLERANCES["fp32"])
    golden = image_encoder("golden samples", pixels[:count], expected[:count], batch_sizes=BATCH_SIZES[:-1])
    images = image_encoder("images", pixels, expected, batch_sizes=BATCH_SIZES[-1:])
    return Verification((*golden, *images, *compare_prompts(method, vocabulary, folder)))


def compare_prompts(method: Method, vocabulary: Vocabulary, folder: Path) -> tuple[Comparison, ...]:
    """Compare the text encoder in ``folder`` with PyTorch on the vocabulary's prompts, some of them padded."""
    path = folder / layout.TEXT_ENCODER
    takes_short_prompts = isinstance(onnx_session(path).get_inputs()[0].shape[1], str)  # not those of clipship 0.2
    padded = method.clip.tokenize(vocabulary.prompts(method.templates[0]))
    tokens = (without_padding(method.clip, padded) if takes_short_prompts else padded).numpy()
    with torch.inference_mode():
        text = run_in_batches(lambda rows: method.text_features(torch.from_numpy(rows)).numpy(), tokens, _TORCH_BATCH)
    runner = onnx_runner(path, tokens[:1])
    compared = partial(verify_runner, runner, form=path.name, references=text, tolerance=TOLERANCES["text-fp32"])
    some = slice(0, GOLDEN_COUNT)
    whole = () if padded.shape == tokens.shape else compared("padded prompts", padded.numpy()[some], text[some])
    return (*compared("prompts", tokens, text), *whole)


def compare_vocabulary(method: Method, bundle: Bundle) -> tuple[Comparison, ...]:
    """Compare the bundle's class features with PyTorch's, which a swapped or foreign vocabulary fails.

    A linear probe has weights instead; only its golden scores are compared.
    """
    given = bundle.vocabulary_features()
    if given.bias is not None:
        return ()
    words = bundle.vocabulary
    with torch.inference_mode():
        expected = method.exported_classifier(words.words).merged(words.word_rows).features
    comparison = compare_features(
        "vocabulary",
        "the bundle",
        len(words),
        expected,
        given.features,
        references=expected,
        tolerance=TOLERANCES["text-fp32"],
        form=layout.VOCABULARY_TENSORS,
    )
    return (comparison,)


def samples_from_pictures(bundle: Bundle, pictures: Sequence[Picture], method: Method | None) -> VerificationSamples:
    """``pictures`` and the features that PyTorch gives them, or without a method ``image_encoder.onnx`` one by one.

    Raises:
        DataError: a picture cannot be decoded.
    """
    pixels = pixels_of(pictures, bundle.image_spec)
    if method is not None:
        expected, reference = image_features(method, pixels), "PyTorch"
    else:
        portable = session_function(onnx_session(bundle.image_encoder))
        expected, reference = run_in_batches(portable, pixels, 1), f"{layout.IMAGE_ENCODER}, one by one"
    return VerificationSamples(
        what="images",
        names=tuple(picture.name for picture in pictures),
        files=tuple(picture.data for picture in pictures),
        pixels=pixels,
        expected=expected,
        reference=reference,
    )


def validate_base_model(bundle: Bundle, method: Method) -> None:
    """Validate that ``bundle`` was packed from the base model of ``method``.

    Raises:
        CheckpointError: it was not.
    """
    if method.clip.digest != bundle.manifest.base_model_digest:
        raise CheckpointError(
            f"the checkpoint is for {method.clip.name} ({method.clip.digest[:12]}), the bundle was packed from "
            f"{bundle.manifest.base_model} ({bundle.manifest.base_model_digest[:12]}): give the bundle's own checkpoint"
        )


def verify_text(bundle: Bundle, method: Method) -> Verification:
    """Compare the bundle's text encoder and class features with PyTorch."""
    prompts = compare_prompts(method, bundle.vocabulary, bundle.path)
    return Verification((*prompts, *compare_vocabulary(method, bundle)))
