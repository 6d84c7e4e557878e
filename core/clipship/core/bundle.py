"""The bundle: a folder that holds an adapted CLIP in exported form. Its format is specified in ``core/README.md``.

Reading needs the standard library, NumPy and safetensors' NumPy reader; nothing here imports PyTorch or ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clipship.core.classification import PARTS
from clipship.core.classification import VocabularyFeatures as VocabularyFeatures
from clipship.core.errors import BundleError, UsageError
from clipship.core.files import read_record, sha256_of, sha256_of_text, write_json_atomic
from clipship.core.images.decoding import ImageSpec
from clipship.core.machine.processor import Processor, emulates, measured_elsewhere, never_runs
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.progress import log
from clipship.core.tensors import TensorSpec
from clipship.core.vocabulary import Vocabulary

FORMAT = "clipship-bundle"
FORMAT_VERSION = 1
VERSION_WITH_PARTS = 2
"""Of a bundle whose classifier has a bias or a cache, which readers of version 1 would ignore."""

MANIFEST = "manifest.json"
IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
TOKENIZER = "tokenizer.json"
VOCABULARY_TENSORS = "vocabulary.safetensors"
LABELS = "labels.txt"
GOLDEN = "golden"
GOLDEN_TENSORS = "golden/golden.safetensors"
GOLDEN_CLASSES = 5
"""The best classes of a golden image that a bundle holds."""

VERIFICATION = "verification.json"

REQUIRED_FILES = (IMAGE_ENCODER, TEXT_ENCODER, VOCABULARY_TENSORS, LABELS, GOLDEN_TENSORS, VERIFICATION)

Runtime = Literal["onnx", "openvino"]
"""The runtime that a variant is for: any that reads ONNX, or OpenVINO, which may compute in another precision."""


@dataclass(frozen=True, kw_only=True)
class EncoderVariant:
    """One ONNX graph of the image encoder, uint8 [N, H, W, 3] -> unit float32 [N, D], and the runtime it is for."""

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
    def from_json(cls, content: Mapping[str, Any]) -> EncoderVariant:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError: a field is missing or of another type.
            ValueError: a precision or runtime that this version does not know.
        """
        for name, known in (("precision", PRECISIONS), ("runtime", get_args(Runtime))):
            if content[name] not in known:
                raise ValueError(f"{name} {content[name]!r} is not one of {', '.join(known)}")
        return cls(**{**content, "kept_fp32": tuple(content["kept_fp32"])})


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


_NAMES: Mapping[Runtime, str] = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}

DEFAULT_ENCODER = EncoderVariant(file=IMAGE_ENCODER, precision="fp32", runtime="onnx", opset=18)
"""The variant that every bundle has."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything needed to use the bundle; ``manifest.json`` is its JSON."""

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
    context_length: int | None = None
    """L, the most tokens of a prompt that ``text_encoder.onnx`` takes; None: as many as its input's shape says."""
    image_encoders: tuple[EncoderVariant, ...] = (DEFAULT_ENCODER,)
    """``image_encoder.onnx``, then the variants for a precision or a machine that the bundle was packed with."""
    classifier_parts: tuple[str, ...] = ()
    """What the classifier has besides features and scale, of :data:`~clipship.core.classification.PARTS`."""
    measured_on: Processor | None = None
    """The processor that the speeds were measured on; None: unknown, the bundle is of version 0.5 or older."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object, without the file digests that the writer adds."""
        return {
            **({"measured_on": self.measured_on.to_json()} if self.measured_on else {}),
            "format": FORMAT,
            "format_version": VERSION_WITH_PARTS if self.classifier_parts else FORMAT_VERSION,
            "base_model": self.base_model,
            "base_model_digest": self.base_model_digest,
            "method": self.method,
            "image_spec": self.image_spec.to_json(),
            "tensors": {
                name: {"input": pair[0].to_json(), "output": pair[1].to_json()}
                for name, pair in self.inputs_outputs.items()
            },
            "embed_dim": self.embed_dim,
            "context_length": self.context_length,
            "image_encoders": [variant.to_json() for variant in self.image_encoders],
            "classifier_parts": list(self.classifier_parts),
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
        encoders = content.get("image_encoders", [DEFAULT_ENCODER.to_json()])  # 0.1 wrote none
        measured_on = content.get("measured_on")
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
                context_length=content.get("context_length"),
                vocabulary=Vocabulary.from_json(content["vocabulary"]),
                provenance=content["provenance"],
                classifier_parts=_parts(content),
                # Up to 0.5, pack could add variants that resize whole images of one size, which no server runs.
                image_encoders=tuple(EncoderVariant.from_json(one) for one in encoders if "source_size" not in one),
                measured_on=Processor.from_json(measured_on) if measured_on else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the manifest is malformed ({error}): pack the bundle again") from error


def _mean_speed(variant: EncoderVariant) -> float:
    """The geometric mean over batch sizes; 1 is ``image_encoder.onnx``, 0 what could not be run."""
    if variant.speed:
        return geometric_mean(variant.speed.values())
    return 1.0 if variant.file == IMAGE_ENCODER and variant.runtime == "onnx" else 0.0


def _parts(content: Mapping[str, Any]) -> tuple[str, ...]:
    parts = tuple(content.get("classifier_parts", ()))
    if not set(parts) <= set(PARTS):
        raise ValueError(f"classifier_parts {list(parts)}: this version knows {', '.join(PARTS)}")
    return parts


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
    def context_length(self) -> int:
        """L, the most tokens of a prompt that the text encoder takes."""
        given = self.manifest.context_length
        return int(self.manifest.inputs_outputs[TEXT_ENCODER][0].shape[1]) if given is None else given

    @property
    def takes_short_prompts(self) -> bool:
        """Whether padding may be cut: the text encoder takes rows of any common length up to L."""
        return isinstance(self.manifest.inputs_outputs[TEXT_ENCODER][0].shape[1], str)

    @property
    def image_encoders(self) -> tuple[EncoderVariant, ...]:
        """All variants of the image encoder, ``image_encoder.onnx`` first."""
        return self.manifest.image_encoders

    def fastest_encoder(
        self,
        precision: Precision,
        runtimes: Collection[Runtime],
        *,
        processor: Processor | None = None,
        gpu: bool = False,
    ) -> EncoderVariant:
        """Of the variants of ``precision`` that one of ``runtimes`` runs, the one that was fastest where it was packed.

        The log names a faster variant that cannot run on this processor. Variants without a measured speed come last;
        of equally fast ones the first is taken.

        Args:
            processor: what will run it; None: not known yet, assumed to be like the one where the bundle was packed.
            gpu: the encoder runs on a GPU.

        Raises:
            UsageError: no variant of that precision exists, or none can run there; says why, and what else there is.
        """
        variants = [one for one in self.image_encoders if one.runtime in runtimes]
        judged = [(one, "" if gpu else self._problem_of(one, processor)) for one in variants]
        fitting = [(variant, problem) for variant, problem in judged if variant.precision == precision]
        running = [variant for variant, problem in fitting if not problem]
        if not running:
            raise UsageError(f"{self.path}: no {precision} {self._alternatives(precision, runtimes, judged)}")
        fastest = max(running, key=_mean_speed)
        for variant, problem in fitting:
            if problem and _mean_speed(variant) > _mean_speed(fastest):
                chosen, faster = (_NAMES[one.runtime] for one in (fastest, variant))
                log(f"{self.path}: {chosen} runs {fastest.file}, not {faster}: {problem}")
        return fastest

    def _alternatives(
        self, precision: Precision, runtimes: Collection[Runtime], judged: Sequence[tuple[EncoderVariant, str]]
    ) -> str:
        """Why none of the ``judged`` variants, each with its problem, runs in ``precision``; and which others run."""
        others = ", ".join(dict.fromkeys(variant.precision for variant, problem in judged if not problem))
        if any((one.precision, one.runtime) == (precision, "openvino") for one in self.image_encoders):
            others += "" if "openvino" in runtimes else ", or pip install 'clipship[openvino]', which runs it"
        reasons = [f"{one.file} by {_NAMES[one.runtime]}: {why}" for one, why in judged if one.precision == precision]
        if reasons:
            return f"variant of the image encoder runs there ({'; '.join(reasons)}): give one of {others}"
        pack = f"or pack the checkpoint again with --precision {precision}"
        return f"variant of the image encoder: give one of {others}, {pack}"

    def _problem_of(self, variant: EncoderVariant, processor: Processor | None) -> str:
        """Why ``variant`` cannot run on ``processor``, or not at its measured speed; empty where it can."""
        runtime, precision, measured_on = variant.runtime, variant.precision, self.manifest.measured_on
        never = never_runs(runtime, precision)
        if never or processor is None:
            return never
        sets = measured_on.instruction_sets if measured_on else ()
        return emulates(runtime, precision, processor) or measured_elsewhere(runtime, precision, sets, processor)

    @property
    def text_encoder(self) -> Path:
        """The ONNX file int64 [C, L] -> unit float32 [C, D]."""
        return self.path / TEXT_ENCODER

    @property
    def tokenizer(self) -> Path:
        """The file that turns class names into tokens.

        Raises:
            BundleError: the bundle was packed before bundles had it.
        """
        if TOKENIZER not in self.files:
            raise BundleError(
                f"{self.path}: it has no {TOKENIZER}, because an older version packed it: pack the checkpoint again"
            )
        return self.path / TOKENIZER

    def vocabulary_features(self) -> VocabularyFeatures:
        """The classifier of embeddings.

        Raises:
            BundleError: tensors that are missing or do not fit.
        """
        features = VocabularyFeatures.from_tensors(load_tensors(self.path / VOCABULARY_TENSORS))
        if features.parts != self.manifest.classifier_parts:
            raise BundleError(
                f"{self.path}: {VOCABULARY_TENSORS} has {features.parts or 'no parts'}, the manifest says "
                f"{self.manifest.classifier_parts or 'none'}: pack the bundle again"
            )
        return features

    def golden(self) -> Golden:
        """The golden samples."""
        tensors = load_tensors(self.path / GOLDEN_TENSORS)
        names = json.loads((self.path / GOLDEN / "files.json").read_text(encoding="utf-8"))
        return Golden(files=tuple(names), **tensors)

    def verification(self) -> dict[str, Any]:
        """The comparisons of ``pack``, with the verdict under ``"passed"``."""
        content: dict[str, Any] = json.loads((self.path / VERIFICATION).read_text(encoding="utf-8"))
        return content


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file, by name."""
    from safetensors.numpy import load_file

    tensors: dict[str, NDArray[Any]] = load_file(path)
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file. (The library's ``save_file`` makes it readable by its owner only.)"""
    from safetensors.numpy import save

    path.write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))


def write_vocabulary(folder: Path, names: Iterable[str], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write the classifier's ``tensors`` and its labels, the class ``names``."""
    save_tensors(folder / VOCABULARY_TENSORS, tensors)
    (folder / LABELS).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` last, with the SHA-256 of every other file in ``folder``."""
    write_manifest_content(folder, manifest.to_json())


def write_manifest_content(
    folder: Path, content: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As :func:`write_manifest`, for a manifest as JSON, which may have keys that this version does not know.

    Args:
        known: SHA-256 by path of the files that need not be read again.

    Returns:
        What was written.
    """
    known = known or {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: known[name] if name in known else sha256_of(path) for name, path in names.items()}
    whole = {**content, "files": files}
    whole["digest"] = _digest_of(whole)
    write_json_atomic(folder / MANIFEST, whole)
    return whole


def validate_folder(out: Path) -> None:
    """Validate that a bundle may be written to ``out``: nothing is there, or an older bundle.

    Raises:
        UsageError: ``out`` is a file, or a non-empty folder without a bundle's manifest.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UsageError(f"{out}: exists and is no bundle: give a new folder, or remove it first")


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
        version=(FORMAT_VERSION, VERSION_WITH_PARTS),
        error=BundleError,
        advice="write the bundle again with clipship pack",
    )
    manifest = Manifest.from_json(content)
    digest = _digest_of(content)
    if digest != content.get("digest"):
        raise BundleError(f"{manifest_path} has changed since it was packed: copy or pack the bundle again")
    files = content.get("files", {})
    _validate_files(path, files)
    return Bundle(path=path, manifest=manifest, files=files, digest=digest)


def _validate_files(path: Path, files: Mapping[str, str]) -> None:
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
            raise BundleError(f"{path}: {name} has changed since it was packed: copy or pack the bundle again")
