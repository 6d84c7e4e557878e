"""A Triton model repository from a bundle.

::

    REPOSITORY/
      image_encoder/      uint8 [N, H, W, 3] -> unit float32 [N, D]              the bundle's ONNX file
      classifier/         float32 [N, D] -> scores, indices, labels [N, k]       see graphs.py
      preprocess/         encoded bytes [N, 1] -> uint8 [N, H, W, 3] + error     runs a copy of core/images.py
      classify/           ensemble: pixels -> scores, indices, labels
      classify_encoded/   ensemble: encoded bytes -> scores, indices, labels, error
      embed/              ensemble: pixels -> embedding

Legend: N images, H = W = side of the input in pixels, D embedding size, k classes reported an image.
"""

from __future__ import annotations

import inspect
import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipship.core import images
from clipship.core.bundle import IMAGE_ENCODER, Bundle
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder
from clipship.core.images import ImageSpec
from clipship.core.tensors import ENCODED, ERROR, embedding_tensor, image_tensor
from clipship.serving.check import refuse_bad_repository
from clipship.serving.config import (
    MODEL_FILES,
    Ensemble,
    Model,
    Step,
    Warmup,
    config_from_ensemble,
    config_from_model,
    text_from_config,
)
from clipship.serving.graphs import classifier_graph, classifier_outputs
from clipship.serving.names import (
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    EMBED,
    ENCODER,
    IMAGE_SPEC,
    PREPROCESS,
    TOP_K,
    VOCABULARY_DIGEST,
)

IMAGES_COPY = "clipship_images.py"
"""The name of the copy of ``clipship/core/images.py`` that lies beside the preprocess model."""

Backend = Literal["python", "onnxruntime"]
"""Who runs the ONNX files: Triton's ONNX Runtime backend, or ONNX Runtime inside Triton's Python backend."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the configurations say about a bundle."""

    bundle_digest: str
    vocabulary_digest: str
    image_spec: ImageSpec
    embed_dim: int
    top_k: int
    """Classes reported an image, at most as many as the vocabulary has."""
    max_batch_size: int = 64


def facts_from_bundle(bundle: Bundle, *, max_batch_size: int, top_k: int) -> Facts:
    """The facts of ``bundle``, with ``top_k`` cut to the size of its vocabulary.

    Raises:
        UsageError: ``max_batch_size`` or ``top_k`` is below 1.
    """
    for name, value in (("max_batch_size", max_batch_size), ("top_k", top_k)):
        if value < 1:
            raise UsageError(f"{name} is {value}: give 1 or more")
    return Facts(
        bundle_digest=bundle.digest,
        vocabulary_digest=bundle.vocabulary.digest,
        image_spec=bundle.image_spec,
        embed_dim=bundle.manifest.embed_dim,
        top_k=min(top_k, len(bundle.vocabulary)),
        max_batch_size=max_batch_size,
    )


def configs_from_facts(facts: Facts, backend: Backend) -> dict[str, Any]:
    """The ``inference.ModelConfig`` message of every model, by name."""
    models = (_image_encoder(facts, backend), _classifier(facts, backend), _preprocess(facts))
    ensembles = (_classify(facts), _classify_encoded(facts), _embed(facts))
    return {
        **{model.name: config_from_model(model) for model in models},
        **{ensemble.name: config_from_ensemble(ensemble) for ensemble in ensembles},
    }


def repository_from_bundle(
    bundle: Bundle, out: Path, *, backend: Backend, max_batch_size: int = 64, top_k: int = 5
) -> Path:
    """Write the model repository of ``bundle`` to the folder ``out``, whole or not at all; returns ``out``.

    Raises:
        CheckFailed: the bundle's verification did not pass.
        UsageError: a number is out of range, the backend is unknown, or ``out`` is a folder of something else.
        OSError: the disk is full, or ``out`` cannot be written.
    """
    if backend not in ("python", "onnxruntime"):
        raise UsageError(f"backend {backend!r} is not known: give python or onnxruntime")
    _refuse_unverified(bundle)
    _refuse_foreign_folder(out)
    facts = facts_from_bundle(bundle, max_batch_size=max_batch_size, top_k=top_k)
    with replace_folder(out) as folder:
        for name, config in configs_from_facts(facts, backend).items():
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
        for ensemble in (CLASSIFY, CLASSIFY_ENCODED, EMBED):
            (folder / ensemble / "1" / ".keep").touch()  # Triton wants the folder; object stores drop empty ones
        _write_model_files(bundle, folder, facts, backend)
        _write_warmup_files(bundle, folder)
        refuse_bad_repository(folder)
    return out


def sources_folder() -> Path:
    """``triton_models/``: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    candidates = (here / "triton_models", here.parents[2] / "triton_models")
    for folder in candidates:
        if (folder / "python").is_dir():
            return folder
    raise UsageError(f"the Triton model sources are missing from {candidates[0]}: install clipship again")


def _parameters(facts: Facts) -> dict[str, str]:
    """What a client needs to know; the vocabulary's facts stand at the classifier, which can be published anew."""
    return {BUNDLE_DIGEST: facts.bundle_digest, IMAGE_SPEC: json.dumps(facts.image_spec.to_json())}


def _image_encoder(facts: Facts, backend: Backend) -> Model:
    image = image_tensor(facts.image_spec.size_px)
    warmup = Warmup(name="golden", batch_size=1, files={image.name: image.name})
    return Model(
        name=ENCODER,
        backend=backend,
        inputs=(image,),
        outputs=(embedding_tensor(facts.embed_dim),),
        max_batch_size=facts.max_batch_size,
        parameters=_parameters(facts),
        instance_kind="KIND_CPU" if backend == "python" else "KIND_AUTO",
        warmups=(warmup,),
    )


def _classifier(facts: Facts, backend: Backend) -> Model:
    vocabulary = {VOCABULARY_DIGEST: facts.vocabulary_digest, TOP_K: str(facts.top_k)}
    return Model(
        name=CLASSIFIER,
        backend=backend,
        inputs=(embedding_tensor(facts.embed_dim),),
        outputs=classifier_outputs(facts.top_k),
        max_batch_size=facts.max_batch_size,
        parameters={BUNDLE_DIGEST: facts.bundle_digest, **vocabulary},
    )


def _preprocess(facts: Facts) -> Model:
    return Model(
        name=PREPROCESS,
        backend="python",
        inputs=(ENCODED,),
        outputs=(image_tensor(facts.image_spec.size_px), ERROR),
        max_batch_size=facts.max_batch_size,
        parameters=_parameters(facts),
        warmups=(Warmup(name="golden", batch_size=1, files={ENCODED.name: ENCODED.name}),),
    )


def _same(*names: str) -> dict[str, str]:
    """A step's tensors under their own names in the ensemble."""
    return {name: name for name in names}


def _encode_step(facts: Facts) -> Step:
    image, embedding = image_tensor(facts.image_spec.size_px), embedding_tensor(facts.embed_dim)
    return Step(model=ENCODER, inputs=_same(image.name), outputs=_same(embedding.name))


def _classify_step(facts: Facts) -> Step:
    outputs = _same(*(tensor.name for tensor in classifier_outputs(facts.top_k)))
    return Step(model=CLASSIFIER, inputs=_same(embedding_tensor(facts.embed_dim).name), outputs=outputs)


def _classify(facts: Facts) -> Ensemble:
    return Ensemble(
        name=CLASSIFY,
        inputs=(image_tensor(facts.image_spec.size_px),),
        outputs=classifier_outputs(facts.top_k),
        max_batch_size=facts.max_batch_size,
        steps=(_encode_step(facts), _classify_step(facts)),
        parameters=_parameters(facts),
    )


def _classify_encoded(facts: Facts) -> Ensemble:
    image = image_tensor(facts.image_spec.size_px)
    decode = Step(model=PREPROCESS, inputs=_same(ENCODED.name), outputs=_same(image.name, ERROR.name))
    return Ensemble(
        name=CLASSIFY_ENCODED,
        inputs=(ENCODED,),
        outputs=(*classifier_outputs(facts.top_k), ERROR),
        max_batch_size=facts.max_batch_size,
        steps=(decode, _encode_step(facts), _classify_step(facts)),
        parameters=_parameters(facts),
    )


def _embed(facts: Facts) -> Ensemble:
    return Ensemble(
        name=EMBED,
        inputs=(image_tensor(facts.image_spec.size_px),),
        outputs=(embedding_tensor(facts.embed_dim),),
        max_batch_size=facts.max_batch_size,
        steps=(_encode_step(facts),),
        parameters=_parameters(facts),
    )


def _refuse_unverified(bundle: Bundle) -> None:
    verification: Mapping[str, Any] = bundle.verification()
    if verification.get("passed") is not True:
        raise CheckFailed(
            f"{bundle.path}: the bundle's verification did not pass, so no repository is written: "
            "see its verification.json, and pack it again"
        )


def _refuse_foreign_folder(out: Path) -> None:
    """``out`` is replaced as a whole, so it must be new, empty, or a repository of ours."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CLASSIFY / "config.pbtxt").is_file():
        raise UsageError(f"{out}: holds something that is not a clipship repository: give a new folder")


def _write_model_files(bundle: Bundle, folder: Path, facts: Facts, backend: Backend) -> None:
    onnx_file = MODEL_FILES["onnxruntime"]
    shutil.copyfile(bundle.path / IMAGE_ENCODER, folder / ENCODER / "1" / onnx_file)
    graph = classifier_graph(bundle.vocabulary, bundle.vocabulary_features(), facts.top_k)
    (folder / CLASSIFIER / "1" / onnx_file).write_bytes(graph)
    for name in (PREPROCESS, *((ENCODER, CLASSIFIER) if backend == "python" else ())):
        source = sources_folder() / "python" / name / "model.py"
        shutil.copyfile(source, folder / name / "1" / MODEL_FILES["python"])
    images_source = inspect.getsourcefile(images)
    assert images_source is not None
    shutil.copyfile(images_source, folder / PREPROCESS / "1" / IMAGES_COPY)


def _write_warmup_files(bundle: Bundle, folder: Path) -> None:
    """The first golden image, as pixels and as the file it came from."""
    golden = bundle.golden()
    encoded = (bundle.path / "golden" / golden.files[0]).read_bytes()
    # Triton's form of one string element: its length as 4 bytes, little end first, then the bytes.
    element = struct.pack("<I", len(encoded)) + encoded
    pixels = golden.pixels[0].tobytes()
    image = image_tensor(bundle.image_spec.size_px)
    for model, name, sample in ((ENCODER, image.name, pixels), (PREPROCESS, ENCODED.name, element)):
        (folder / model / "warmup").mkdir()
        (folder / model / "warmup" / name).write_bytes(sample)
