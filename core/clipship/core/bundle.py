"""The bundle: a folder that holds an adapted CLIP in exported form. Its format is specified in ``core/README.md``.

Reading needs the standard library, NumPy and safetensors' NumPy reader; nothing here imports PyTorch or ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import BundleError
from clipship.core.files import read_record, sha256_of, sha256_of_text, write_json_atomic
from clipship.core.images import ImageSpec
from clipship.core.tensors import TensorSpec
from clipship.core.vocabulary import Vocabulary

FORMAT = "clipship-bundle"
FORMAT_VERSION = 1

MANIFEST = "manifest.json"
IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
VOCABULARY_TENSORS = "vocabulary.safetensors"
LABELS = "labels.txt"
GOLDEN = "golden"
GOLDEN_TENSORS = "golden/golden.safetensors"
VERIFICATION = "verification.json"

REQUIRED_FILES = (IMAGE_ENCODER, TEXT_ENCODER, VOCABULARY_TENSORS, LABELS, GOLDEN_TENSORS, VERIFICATION)


Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""The type of a form's matrix products. LayerNorm, softmax, the unit length and the logits stay float32 in all."""

Runtime = Literal["onnx", "onnxruntime", "openvino"]
"""Who can run a form: every ONNX runtime, ONNX Runtime only (it has operators of its own), or OpenVINO."""


@dataclass(frozen=True, kw_only=True)
class EncoderForm:
    """One form of the image encoder: uint8 [N, H, W, 3] -> unit float32 [N, D] like all, each within its tolerance."""

    file: str
    """Relative to the bundle."""
    precision: Precision
    runtime: Runtime
    opset: int
    kept_fp32: tuple[str, ...] = ()
    """Nodes that would have been of ``precision``, but whose values on real images do not fit into it."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """By batch size: images a second on the machine that packed, divided by those of ``image_encoder.onnx`` there."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {**asdict(self), "kept_fp32": list(self.kept_fp32), "speed": dict(self.speed)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EncoderForm:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError: a field is missing or of another type.
            ValueError: a precision or runtime that this version does not know.
        """
        for name, known in (("precision", get_args(Precision)), ("runtime", get_args(Runtime))):
            if content[name] not in known:
                raise ValueError(f"{name} {content[name]!r} is not one of {', '.join(known)}")
        return cls(**{**content, "kept_fp32": tuple(content["kept_fp32"])})


@dataclass(frozen=True, kw_only=True)
class VocabularyFeatures:
    """What classifies an embedding: ``softmax(logit_scale * embedding @ features.T)``."""

    features: NDArray[np.float32]
    """[C, D], rows of unit length, in the order of the vocabulary."""
    logit_scale: float
    """The factor before the softmax (100 for OpenAI's CLIP), already exponentiated."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The few images every later step is compared with. N images, top k of the vocabulary."""

    files: tuple[str, ...]
    """The images' own files under ``golden/``, as they came (JPEG, PNG, ...)."""
    pixels: NDArray[np.uint8]
    """[N, H, W, 3] after preprocessing."""
    embedding: NDArray[np.float32]
    """[N, D] by the PyTorch model."""
    scores: NDArray[np.float32]
    """[N, k] probabilities by the PyTorch model, descending."""
    indices: NDArray[np.int64]
    """[N, k] positions in the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything needed to use the bundle right; ``manifest.json`` is its JSON form."""

    base_model: str
    """The open_clip model, e.g. "ViT-B-16/openai"."""
    base_model_digest: str
    """SHA-256 over the base model's tensors."""
    method: str
    """The recipe's method, e.g. "sync-clip"."""
    image_spec: ImageSpec
    inputs_outputs: Mapping[str, tuple[TensorSpec, TensorSpec]]
    """By ONNX file name: its input and its output."""
    embed_dim: int
    vocabulary: Vocabulary
    """Class names, and the templates ``text_encoder.onnx`` expects them in."""
    provenance: Mapping[str, Any]
    """Recipe, seed, scores and tool versions: for people, never needed to run the bundle."""
    image_encoders: tuple[EncoderForm, ...] = (
        EncoderForm(file=IMAGE_ENCODER, precision="fp32", runtime="onnx", opset=18),
    )
    """``image_encoder.onnx``, then the forms for a precision or a machine that the bundle was packed with."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object, without the file digests that the writer adds."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "base_model_digest": self.base_model_digest,
            "method": self.method,
            "image_spec": self.image_spec.to_json(),
            "tensors": {
                name: {"input": pair[0].to_json(), "output": pair[1].to_json()}
                for name, pair in self.inputs_outputs.items()
            },
            "embed_dim": self.embed_dim,
            "image_encoders": [form.to_json() for form in self.image_encoders],
            "vocabulary": self.vocabulary.to_json(),
            "vocabulary_digest": self.vocabulary.digest,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_json`.

        Raises:
            BundleError: a field is missing or malformed.
        """
        try:
            return cls(
                base_model=content["base_model"],
                base_model_digest=content["base_model_digest"],
                method=content["method"],
                image_spec=ImageSpec.from_json(content["image_spec"]),
                inputs_outputs={
                    name: (TensorSpec.from_json(pair["input"]), TensorSpec.from_json(pair["output"]))
                    for name, pair in content["tensors"].items()
                },
                embed_dim=int(content["embed_dim"]),
                vocabulary=Vocabulary.from_json(content["vocabulary"]),
                provenance=content["provenance"],
                **_forms(content),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the manifest is malformed ({error}): pack the bundle again") from error


def _forms(content: Mapping[str, Any]) -> dict[str, tuple[EncoderForm, ...]]:
    """Bundles written before there were several forms have the first one only."""
    if "image_encoders" not in content:
        return {}
    return {"image_encoders": tuple(EncoderForm.from_json(one) for one in content["image_encoders"])}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, whose files have been checked against its manifest's digests."""

    path: Path
    manifest: Manifest
    files: Mapping[str, str]
    """SHA-256 of every file, by path relative to the bundle."""
    digest: str
    """SHA-256 over the manifest, and so over all that it lists: the bundle's identity."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The class names and templates."""
        return self.manifest.vocabulary

    @property
    def image_spec(self) -> ImageSpec:
        """How images become the encoder's input."""
        return self.manifest.image_spec

    @property
    def image_encoder(self) -> Path:
        """The ONNX file uint8 [N, H, W, 3] -> unit float32 [N, D]."""
        return self.path / IMAGE_ENCODER

    @property
    def image_encoders(self) -> tuple[EncoderForm, ...]:
        """All forms of the image encoder, ``image_encoder.onnx`` first."""
        return self.manifest.image_encoders

    @property
    def text_encoder(self) -> Path:
        """The ONNX file int64 [C, L] -> unit float32 [C, D]."""
        return self.path / TEXT_ENCODER

    def vocabulary_features(self) -> VocabularyFeatures:
        """The text features of the vocabulary."""
        tensors = _load_tensors(self.path / VOCABULARY_TENSORS)
        return VocabularyFeatures(features=tensors["features"], logit_scale=float(tensors["logit_scale"][0]))

    def golden(self) -> Golden:
        """The golden samples."""
        tensors = _load_tensors(self.path / GOLDEN_TENSORS)
        names = json.loads((self.path / GOLDEN / "files.json").read_text(encoding="utf-8"))
        return Golden(files=tuple(names), **tensors)

    def verification(self) -> dict[str, Any]:
        """What ``pack`` and ``verify`` compared, with the verdict under ``"passed"``."""
        content: dict[str, Any] = json.loads((self.path / VERIFICATION).read_text(encoding="utf-8"))
        return content


def _load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    tensors: dict[str, NDArray[Any]] = load_file(path)
    return tensors


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` last, with the SHA-256 of every other file in ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    content = {**manifest.to_json(), "files": files}
    write_json_atomic(folder / MANIFEST, {**content, "digest": _digest_of(content)})


def _digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a manifest without its own digest."""
    kept = {key: value for key, value in content.items() if key != "digest"}
    return sha256_of_text(json.dumps(kept, sort_keys=True, ensure_ascii=False))


def read_bundle(path: Path) -> Bundle:
    """Open the bundle at ``path`` and check every file's SHA-256.

    Raises:
        BundleError: no bundle there, a missing, unlisted or changed file, or a malformed manifest.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(f"{path}: no bundle there ({MANIFEST} is missing): write one with clipship pack")
    content = read_record(
        manifest_path,
        record_format=FORMAT,
        version=FORMAT_VERSION,
        error=BundleError,
        advice="write the bundle again with clipship pack",
    )
    manifest = Manifest.from_json(content)
    digest = _digest_of(content)
    if digest != content.get("digest"):
        raise BundleError(f"{manifest_path} has changed since it was packed: copy the bundle again, or pack it anew")
    files = content.get("files", {})
    _check_files(path, files)
    return Bundle(path=path, manifest=manifest, files=files, digest=digest)


def _check_files(path: Path, files: Mapping[str, str]) -> None:
    missing = [name for name in REQUIRED_FILES if name not in files]
    if missing:
        raise BundleError(f"{path}: the manifest does not list {', '.join(missing)}: write it again with clipship pack")
    for name, digest in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path}: the manifest names {name}, which lies outside the bundle")
        if not file.is_file():
            raise BundleError(f"{path}: {name} is missing: copy the bundle again, or write it with clipship pack")
        if sha256_of(file) != digest:
            raise BundleError(f"{path}: {name} has changed since it was packed: copy the bundle again, or pack it anew")
