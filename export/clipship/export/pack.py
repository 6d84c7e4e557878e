"""Checkpoint + vocabulary -> bundle: exported, compared with PyTorch, and only then given its name.

Shape legend: N images, H = W pixels, C class names, L tokens, D features, k best classes.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipship.core import bundle as layout
from clipship.core import tensors
from clipship.core.bundle import Bundle, EncoderVariant, Manifest, VocabularyFeatures, read_bundle, write_manifest
from clipship.core.bundle import validate_folder as validate_folder
from clipship.core.comparison import VerificationSamples
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder, write_json_atomic
from clipship.core.machine.processor import this_processor
from clipship.core.progress import Report, progress
from clipship.core.vocabulary import Vocabulary, prompt_of
from clipship.export.encoders import TextEncoder
from clipship.export.fused_encoder import FusedImageEncoder
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.precision.activation_ranges import validate_image_count
from clipship.export.precision.encoder_variants import Profile, encoder_variants
from clipship.export.reference import (
    GOLDEN_COUNT,
    Picture,
    compare_with_torch,
    image_features,
    pixels_of,
    validate_classifier,
)
from clipship.export.tokenizer import tokenizer_from_open_clip
from clipship.training.model.prompts import is_causal

if TYPE_CHECKING:
    from clipship.training.methods.base import Method
    from clipship.training.model.clip import Clip

_PLAIN = Profile()


def bundle_from_method(
    method: Method,
    vocabulary: Vocabulary,
    pictures: Sequence[Picture],
    out: Path,
    *,
    provenance: dict[str, Any],
    temperature: float | None = None,
    profile: Profile = _PLAIN,
) -> Bundle:
    """Export ``method`` for ``vocabulary``, compare it with PyTorch on ``pictures``, and write the bundle ``out``.

    The bundle replaces an older one at ``out`` only when every comparison is within tolerance.

    Args:
        pictures: reduced precisions are calibrated on them, too.
        temperature: the checkpoint's. The logit scale is divided by it, so that the server is calibrated as PyTorch is.
        profile: the graphs' opset, and the variants of the image encoder beside the float32 one.

    Raises:
        CheckFailed: a comparison is out of tolerance, also of a reduced precision; the message is the whole table.
        DataError: an image cannot be decoded, a class name is too long for the text tower, or there are fewer than 32
            images for a reduced precision.
        UsageError: ``out`` exists and is no bundle, or the method cannot be exported.
    """
    validate_folder(out)
    if profile.precisions:
        validate_image_count(len(pictures))
    if method.not_exportable:
        raise UsageError(f"{method.name} cannot be packed: {method.not_exportable}")
    if method.closed_vocabulary:  # fails now, not after minutes of export, on names that it does not know
        method.exported_classifier(vocabulary.words).merged(vocabulary.word_rows)
    total = 5 + len(profile.precisions)
    with progress("pack", total) as report, replace_folder(out) as folder, torch.inference_mode():
        _export(method, vocabulary, profile, folder, report)
        _write_tokenizer(method, vocabulary, folder)
        features = _write_vocabulary(method, vocabulary, folder, temperature or 1.0)
        report(3, "golden samples")
        pixels = pixels_of(pictures, method.clip.image_spec)
        expected = image_features(method, pixels)
        order = _golden_first(expected)
        pictures, pixels, expected = [pictures[place] for place in order], pixels[order], expected[order]
        _write_golden(pictures[:GOLDEN_COUNT], pixels, expected, features, folder)
        report(4, "compare with PyTorch")
        verification = compare_with_torch(method, vocabulary, features, pixels, expected, folder)
        if not verification:
            raise CheckFailed(f"the export does not equal PyTorch, nothing was written: {verification}")
        samples = VerificationSamples(
            what="images", names=(), files=(), pixels=pixels, expected=expected, reference="PyTorch"
        )
        variants, verified = encoder_variants(folder, profile, samples, features, report, 5)
        verification += verified
        write_json_atomic(folder / layout.VERIFICATION, verification.to_json())
        write_manifest(folder, _manifest(method, vocabulary, features, variants, provenance))
    return read_bundle(out)


def _golden_first(expected: NDArray[np.float32]) -> list[int]:
    """The order of images, by unit features [N, D], with the golden ones first: the first, then the most different.

    The first few of a sorted folder are of one class, and of equal images centring leaves nothing but the error.
    """
    order, closest = [0], expected @ expected[0]
    while len(order) < min(GOLDEN_COUNT, len(expected)):
        closest[order[-1]] = np.inf
        order.append(int(closest.argmin()))
        closest = np.maximum(closest, expected @ expected[order[-1]])
    return [*order, *(place for place in range(len(expected)) if place not in order)]


def validate_weights(base_model: str) -> None:
    """Validate that ``base_model`` has trained weights.

    Raises:
        UsageError: its weights are random.
    """
    from clipship.training.model.clip import has_random_weights

    if has_random_weights(base_model):
        raise UsageError(
            f"base model {base_model}: its weights are random, so it cannot tell classes apart: train on one that has "
            "weights, such as ViT-B-16/openai, or give --allow-random-weights"
        )


def _write_tokenizer(method: Method, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the tokenizer of ``clipship vocab``, after comparing it with open_clip's on the vocabulary.

    Raises:
        CheckFailed: it gives other tokens than the model's own.
    """
    tokenizer = tokenizer_from_open_clip(method.clip.tokenizer)
    for prompt in vocabulary.prompts(method.templates[0]):
        if tokenizer.ids(prompt) != method.clip.token_ids(prompt):
            raise CheckFailed(
                f"prompt {prompt!r}: the bundle's tokenizer differs from open_clip's, nothing was written"
            )
    tokenizer.write(folder / layout.TOKENIZER)


def _metadata(method: Method, vocabulary: Vocabulary) -> dict[str, str]:
    """Metadata of every graph."""
    return {
        "clipship.base_model": method.clip.name,
        "clipship.base_model_digest": method.clip.digest,
        "clipship.method": method.name,
        "clipship.vocabulary_digest": replace(vocabulary, templates=method.templates).digest,
    }


def _export(method: Method, vocabulary: Vocabulary, profile: Profile, folder: Path, report: Report) -> None:
    clip, metadata, specs = method.clip, _metadata(method, vocabulary), _inputs_outputs(method.clip)
    written = partial(onnx_from_module, opset=profile.opset, external_bytes=profile.external_bytes)
    report(0, "image encoder to ONNX")
    image, embedding = specs[layout.IMAGE_ENCODER]
    written(
        FusedImageEncoder(method, opset=profile.opset),
        torch.zeros((2, *[int(size) for size in image.shape[1:]]), dtype=torch.uint8),
        folder / layout.IMAGE_ENCODER,
        input_spec=image,
        output_spec=embedding,
        metadata={**metadata, "clipship.image_spec": json.dumps(clip.image_spec.to_json())},
    )
    report(1, "text encoder to ONNX")
    shortest = [prompt_of(name, method.templates[0]) for name in ("a", "b")]
    tokens, embedding = specs[layout.TEXT_ENCODER]
    written(
        TextEncoder(method),
        clip.tokenize(shortest),
        folder / layout.TEXT_ENCODER,
        input_spec=tokens,
        output_spec=embedding,
        sizes={tensors.TOKENS: (len(clip.token_ids(shortest[0])) + 2, clip.context_length)},
        metadata={**metadata, "clipship.templates": json.dumps(method.templates)},
    )
    report(2, "text features")


def _inputs_outputs(clip: Clip) -> dict[str, tuple[tensors.TensorSpec, tensors.TensorSpec]]:
    """By file. Prompts may have any length up to the context length where padding does not matter."""
    length = tensors.TOKENS if is_causal(clip) else clip.context_length
    return {
        layout.IMAGE_ENCODER: (tensors.image_tensor(clip.image_spec.size_px), tensors.embedding_tensor(clip.embed_dim)),
        layout.TEXT_ENCODER: (tensors.tokens_tensor(length), tensors.embedding_tensor(clip.embed_dim, tensors.CLASSES)),
    }


def _write_vocabulary(method: Method, vocabulary: Vocabulary, folder: Path, temperature: float) -> VocabularyFeatures:
    classifier = method.exported_classifier(vocabulary.words)
    validate_classifier(method, vocabulary.words, classifier)
    features = classifier.merged(vocabulary.word_rows).tempered(temperature)
    layout.write_vocabulary(folder, vocabulary, features.tensors())
    return features


def _write_golden(
    pictures: Sequence[Picture],
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    vocabulary: VocabularyFeatures,
    folder: Path,
) -> None:
    count = len(pictures)
    golden = folder / layout.GOLDEN
    golden.mkdir()
    names = [f"{position}{Path(picture.name).suffix.lower()}" for position, picture in enumerate(pictures)]
    for name, picture in zip(names, pictures, strict=True):
        (golden / name).write_bytes(picture.data)
    write_json_atomic(golden / "files.json", names)
    scores, indices = vocabulary.best(expected[:count], layout.GOLDEN_CLASSES)
    arrays: dict[str, NDArray[Any]] = {"pixels": pixels[:count], "embedding": expected[:count]}
    layout.save_tensors(folder / layout.GOLDEN_TENSORS, {**arrays, "scores": scores, "indices": indices})


def _manifest(
    method: Method,
    vocabulary: Vocabulary,
    features: VocabularyFeatures,
    variants: Sequence[EncoderVariant],
    provenance: dict[str, Any],
) -> Manifest:
    clip = method.clip
    packages = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "pillow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return Manifest(
        base_model=clip.name,
        base_model_digest=clip.digest,
        method=method.name,
        image_spec=clip.image_spec,
        inputs_outputs=_inputs_outputs(clip),
        embed_dim=clip.embed_dim,
        context_length=clip.context_length,
        vocabulary=replace(vocabulary, templates=method.templates),
        classifier_parts=features.parts,
        image_encoders=tuple(variants),
        measured_on=this_processor(),
        provenance={
            **provenance,
            "opset": variants[0].opset,
            "python": platform.python_version(),
            "packages": versions,
        },
    )
