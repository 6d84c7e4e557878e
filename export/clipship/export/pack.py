"""Checkpoint + vocabulary -> bundle: exported, compared with PyTorch, and only then given its name.

Shape legend: N images, H = W pixels, C class names, L tokens, D features, k best classes.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipship.core import bundle as layout
from clipship.core import tensors
from clipship.core.bundle import Bundle, Manifest, VocabularyFeatures, read_bundle, write_manifest
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder, write_json_atomic
from clipship.core.progress import Report, progress
from clipship.core.vocabulary import Vocabulary, prompt_of
from clipship.export.encoders import ImageEncoder, TextEncoder
from clipship.export.onnx import OPSET, onnx_from_module
from clipship.export.reference import (
    GOLDEN_COUNT,
    Picture,
    compare_with_torch,
    image_features,
    pixels_of,
    probabilities,
)

if TYPE_CHECKING:
    from clipship.training.methods.base import Method


def bundle_from_method(
    method: Method,
    vocabulary: Vocabulary,
    pictures: Sequence[Picture],
    out: Path,
    *,
    provenance: dict[str, Any],
    temperature: float | None = None,
) -> Bundle:
    """Export ``method`` for ``vocabulary``, compare it with PyTorch on ``pictures``, and write the bundle ``out``.

    The bundle takes the name ``out`` only when every comparison is within tolerance; until then an older bundle of that
    name stays. ``temperature`` is the checkpoint's: the logit scale is divided by it, so that what is served is
    calibrated as in PyTorch.

    Raises:
        CheckFailed: a comparison is out of tolerance; the message is the whole table.
        DataError: a picture cannot be decoded, a class name is too long for the text tower.
        UsageError: ``out`` exists and is no bundle, or the method cannot be exported.
    """
    refuse_foreign_folder(out)
    if method.not_exportable:
        raise UsageError(f"{method.name} cannot be packed: {method.not_exportable}")
    with progress("pack", 5) as report, replace_folder(out) as folder, torch.inference_mode():
        _export(method, folder, report)
        features = _write_vocabulary(method, vocabulary, folder, temperature or 1.0)
        report(3, "golden samples")
        pixels = pixels_of(pictures, method.clip.image_spec)
        expected = image_features(method, pixels)
        _write_golden(pictures[:GOLDEN_COUNT], pixels, expected, features, folder)
        report(4, "compare with PyTorch")
        verification = compare_with_torch(method, vocabulary, features, pixels, expected, folder)
        if not verification:
            raise CheckFailed(f"the export does not equal PyTorch, nothing was written: {verification}")
        write_json_atomic(folder / layout.VERIFICATION, verification.to_json())
        write_manifest(folder, _manifest(method, vocabulary, provenance))
    return read_bundle(out)


def refuse_foreign_folder(out: Path) -> None:
    """Refuse to put a bundle in the place of anything but an older bundle.

    Raises:
        UsageError: ``out`` is a file, or a non-empty folder without a bundle's manifest.
    """
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    try:
        ours = json.loads((out / layout.MANIFEST).read_text(encoding="utf-8")).get("format") == layout.FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UsageError(f"{out}: exists and is no bundle: give a new folder, or remove it first")


def _export(method: Method, folder: Path, report: Report) -> None:
    clip = method.clip
    metadata = {"clipship.base_model": clip.name, "clipship.method": method.name}
    image_input, image_output = tensors.image_tensor(clip.image_spec.size_px), tensors.embedding_tensor(clip.embed_dim)
    report(0, "image encoder to ONNX")
    onnx_from_module(
        ImageEncoder(method),
        torch.zeros((2, *[int(size) for size in image_input.shape[1:]]), dtype=torch.uint8),
        folder / layout.IMAGE_ENCODER,
        input_spec=image_input,
        output_spec=image_output,
        metadata={**metadata, "clipship.image_spec": json.dumps(clip.image_spec.to_json())},
    )
    report(1, "text encoder to ONNX")
    onnx_from_module(
        TextEncoder(method),
        clip.tokenize([prompt_of(name, method.templates[0]) for name in ("a", "b")]),
        folder / layout.TEXT_ENCODER,
        input_spec=tensors.tokens_tensor(clip.context_length),
        output_spec=tensors.embedding_tensor(clip.embed_dim, tensors.CLASSES),
        metadata={**metadata, "clipship.templates": json.dumps(method.templates)},
    )
    report(2, "text features")


def _write_vocabulary(method: Method, vocabulary: Vocabulary, folder: Path, temperature: float) -> VocabularyFeatures:
    from safetensors.numpy import save

    features = method.class_features(vocabulary.names).cpu().numpy()
    scale = np.array([method.clip.logit_scale / temperature], np.float32)
    tensors = {"features": features, "logit_scale": scale}
    (folder / layout.VOCABULARY_TENSORS).write_bytes(save(tensors))  # save_file would let only the owner read it
    (folder / layout.LABELS).write_text("".join(f"{name}\n" for name in vocabulary), encoding="utf-8")
    return VocabularyFeatures(features=features, logit_scale=float(scale[0]))


def _write_golden(
    pictures: Sequence[Picture],
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    vocabulary: VocabularyFeatures,
    folder: Path,
) -> None:
    from safetensors.numpy import save

    count = len(pictures)
    golden = folder / layout.GOLDEN
    golden.mkdir()
    names = [f"{position}{Path(picture.name).suffix.lower()}" for position, picture in enumerate(pictures)]
    for name, picture in zip(names, pictures, strict=True):
        (golden / name).write_bytes(picture.data)
    write_json_atomic(golden / "files.json", names)
    scores = probabilities(expected[:count], vocabulary)
    k = min(5, scores.shape[1])
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    arrays = {
        "pixels": pixels[:count],
        "embedding": expected[:count],
        "scores": np.take_along_axis(scores, indices, axis=1),
        "indices": indices.astype(np.int64),
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    (folder / layout.GOLDEN_TENSORS).write_bytes(save(contiguous))


def _manifest(method: Method, vocabulary: Vocabulary, provenance: dict[str, Any]) -> Manifest:
    clip = method.clip
    packages = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "pillow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    text_output = tensors.embedding_tensor(clip.embed_dim, tensors.CLASSES)
    return Manifest(
        base_model=clip.name,
        base_model_digest=clip.digest,
        method=method.name,
        image_spec=clip.image_spec,
        inputs_outputs={
            layout.IMAGE_ENCODER: (
                tensors.image_tensor(clip.image_spec.size_px),
                tensors.embedding_tensor(clip.embed_dim),
            ),
            layout.TEXT_ENCODER: (tensors.tokens_tensor(clip.context_length), text_output),
        },
        embed_dim=clip.embed_dim,
        vocabulary=Vocabulary(names=vocabulary.names, templates=method.templates),
        provenance={
            **provenance,
            "opset": OPSET,
            "python": platform.python_version(),
            "packages": versions,
        },
    )
