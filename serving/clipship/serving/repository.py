"""A Triton model repository from a bundle.

::

    REPOSITORY/
      image_encoder/      uint8 [N, H, W, 3] -> unit float32 [N, D]              the bundle's ONNX file, or plans
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from clipship.core import cpu, images
from clipship.core.bundle import DEFAULT_ENCODER, Bundle, EncoderForm, Precision, Runtime
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder
from clipship.core.images import ImageSpec
from clipship.core.plan import Plan, PlanInfo, Target, capability_of, refuse_mismatch
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
    PRECISION,
    PREPROCESS,
    RUNTIME,
    TENSORRT_VERSION,
    TOP_K,
    VOCABULARY_DIGEST,
)

IMAGES_COPY = "clipship_images.py"
"""The name of the copy of ``clipship/core/images.py`` that lies beside the preprocess model."""

Backend = Literal["python", "onnxruntime", "tensorrt"]
"""Who runs the image encoder: ONNX Runtime inside Triton's Python backend, Triton's own ONNX Runtime backend, or its
TensorRT backend, beside which the ONNX Runtime backend runs the classifier (TensorRT has no strings)."""

_ONNX_BACKENDS: Mapping[Backend, str] = {"python": "python", "onnxruntime": "onnxruntime", "tensorrt": "onnxruntime"}
"""Who runs ONNX files."""


_RUNTIMES: Mapping[Backend, tuple[Runtime, ...]] = {
    "python": ("onnx", "onnxruntime", "openvino"),
    "onnxruntime": ("onnx",),
    "tensorrt": (),
}
"""What runs the bundle's forms of the image encoder."""

CPU_COPY = "clipship_cpu.py"
"""The name of the copy of ``clipship/core/cpu.py`` that lies beside the image encoder in Python."""


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
    encoder: EncoderForm = DEFAULT_ENCODER
    """Which form of the image encoder runs where there is no plan."""
    plans: tuple[PlanInfo, ...] = ()
    """The TensorRT plans of the image encoder, one for each kind of GPU."""


def facts_from_bundle(
    bundle: Bundle,
    *,
    max_batch_size: int,
    top_k: int,
    encoder: EncoderForm = DEFAULT_ENCODER,
    plans: Sequence[Plan] = (),
) -> Facts:
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
        encoder=encoder,
        plans=tuple(plan.info for plan in plans),
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
    bundle: Bundle,
    out: Path,
    *,
    backend: Backend,
    precision: Precision = "fp32",
    max_batch_size: int = 64,
    top_k: int = 5,
    plans: Sequence[Plan] = (),
    tensorrt_version: str | None = None,
) -> Path:
    """Write the model repository of ``bundle`` to the folder ``out``, whole or not at all; returns ``out``.

    Args:
        precision: of the image encoder; of the bundle's forms in it the python backend takes the one that was fastest
            where the bundle was packed, the onnxruntime backend the portable one. Plans have their own.
        plans: for the tensorrt backend, one for each kind of GPU of the server.
        tensorrt_version: the server's; None: that of the first plan.

    Raises:
        CheckFailed: the bundle's verification did not pass.
        PlanError: the server could not load a plan, or it is not of the bundle.
        UsageError: a number is out of range, the backend is unknown, or ``out`` is a folder of something else.
        OSError: the disk is full, or ``out`` cannot be written.
    """
    if backend not in _ONNX_BACKENDS:
        raise UsageError(f"backend {backend!r} is not known: give {' or '.join(_ONNX_BACKENDS)}")
    _refuse_unverified(bundle)
    _refuse_foreign_folder(out)
    _refuse_plans(bundle, plans, backend, max_batch_size, tensorrt_version)
    encoder = DEFAULT_ENCODER if plans else bundle.fastest_encoder(precision, _RUNTIMES[backend])
    facts = facts_from_bundle(bundle, max_batch_size=max_batch_size, top_k=top_k, encoder=encoder, plans=plans)
    with replace_folder(out) as folder:
        for name, config in configs_from_facts(facts, backend).items():
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
        for ensemble in (CLASSIFY, CLASSIFY_ENCODED, EMBED):
            (folder / ensemble / "1" / ".keep").touch()  # Triton wants the folder; object stores drop empty ones
        _write_model_files(bundle, folder, facts, backend)
        for plan, name in zip(plans, plan_files(facts.plans), strict=True):
            shutil.copyfile(plan.file, folder / ENCODER / "1" / name)
        _write_warmup_files(bundle, folder)
        refuse_bad_repository(folder)
    return out


def plan_files(plans: Sequence[PlanInfo]) -> tuple[str, ...]:
    """The name of each plan's file in the encoder's version folder."""
    if len(plans) == 1:
        return (MODEL_FILES["tensorrt"],)
    return tuple(f"model_{'_'.join(plan.gpus)}.plan" for plan in plans)


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
    kinds = {"python": "KIND_CPU", "onnxruntime": "KIND_AUTO", "tensorrt": "KIND_GPU"}
    return Model(
        name=ENCODER,
        backend=backend,
        **(_plan_settings(facts) if backend == "tensorrt" else {"parameters": _form_parameters(facts)}),
        inputs=(image,),
        outputs=(embedding_tensor(facts.embed_dim),),
        max_batch_size=facts.max_batch_size,
        instance_kind=kinds[backend],
        warmups=(warmup,),
    )


def _form_parameters(facts: Facts) -> dict[str, str]:
    return {**_parameters(facts), RUNTIME: facts.encoder.runtime, PRECISION: facts.encoder.precision}


def _plan_settings(facts: Facts) -> dict[str, Any]:
    """Which plan is for which GPU; a plan for every GPU since Ampere is for those that have none of their own."""
    files = dict(zip(plan_files(facts.plans), facts.plans, strict=True))
    usual = next((name for name, plan in files.items() if plan.hardware_compatible), next(iter(files)))
    facts_of_plans = {
        TENSORRT_VERSION: facts.plans[0].runtime_version,
        PRECISION: ", ".join(sorted({plan.precision for plan in facts.plans})),
    }
    return {
        "file": usual,
        "file_by_capability": {capability_of(gpu): name for name, plan in files.items() for gpu in plan.gpus},
        "parameters": {**_parameters(facts), **facts_of_plans},
    }


def _classifier(facts: Facts, backend: Backend) -> Model:
    vocabulary = {VOCABULARY_DIGEST: facts.vocabulary_digest, TOP_K: str(facts.top_k)}
    return Model(
        name=CLASSIFIER,
        backend=_ONNX_BACKENDS[backend],
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


def _refuse_plans(
    bundle: Bundle, plans: Sequence[Plan], backend: Backend, max_batch_size: int, tensorrt_version: str | None
) -> None:
    """Refuse plans that a server with this TensorRT could not load, or that would not take its batches."""
    if (backend == "tensorrt") != bool(plans):
        raise UsageError(
            f"backend {backend} with {len(plans)} plans: give --plan with --backend tensorrt, and only then"
        )
    for plan in plans:
        version = tensorrt_version or plans[0].info.runtime_version
        refuse_mismatch(plan, Target(runtime="tensorrt", version=version, platform="linux"), bundle)
        plan.info.profile.refuse(1)
        plan.info.profile.refuse(max_batch_size)
    twice = [gpu for gpu, count in Counter(gpu for plan in plans for gpu in plan.info.gpus).items() if count > 1]
    if twice:
        raise UsageError(f"two plans are for {', '.join(twice)}: give one for each kind of GPU")


def _write_model_files(bundle: Bundle, folder: Path, facts: Facts, backend: Backend) -> None:
    onnx_file = MODEL_FILES["onnxruntime"]
    if backend != "tensorrt":
        shutil.copyfile(bundle.path / facts.encoder.file, folder / ENCODER / "1" / onnx_file)
        weights = f"{facts.encoder.file}.data"  # of a graph above 2 GB, which names this file
        if weights in bundle.files:
            shutil.copyfile(bundle.path / weights, folder / ENCODER / "1" / weights)
    graph = classifier_graph(bundle.vocabulary, bundle.vocabulary_features(), facts.top_k)
    (folder / CLASSIFIER / "1" / onnx_file).write_bytes(graph)
    for name in (PREPROCESS, *((ENCODER, CLASSIFIER) if backend == "python" else ())):
        source = sources_folder() / "python" / name / "model.py"
        shutil.copyfile(source, folder / name / "1" / MODEL_FILES["python"])
    _copy_source(images, folder / PREPROCESS / "1" / IMAGES_COPY)
    if backend == "python":
        _copy_source(cpu, folder / ENCODER / "1" / CPU_COPY)


def _copy_source(module: ModuleType, target: Path) -> None:
    source = inspect.getsourcefile(module)
    assert source is not None
    shutil.copyfile(source, target)


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
