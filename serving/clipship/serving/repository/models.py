"""The configurations of a repository's models: settings of the bundles in, Triton's messages out.

``write.py`` draws the models and writes them. Fields of the messages have the names of Triton's model_config.proto.

Legend: N images, H = W = side of the input in pixels, D embedding size, k classes reported an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clipship.core.bundle import DEFAULT_ENCODER, Bundle, EncoderVariant
from clipship.core.errors import UsageError
from clipship.core.images.decoding import ImageSpec
from clipship.core.tensorrt_plan import PlanInfo, TensorRtPlan, capability_of, variant_digest, version_parts
from clipship.core.tensors import ENCODED, ERROR, TensorSpec, embedding_tensor, image_tensor, passthrough_tensor
from clipship.serving.model_names import (
    ADMISSION,
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    EMBED,
    ENCODER,
    ENCODER_DIGEST,
    IMAGE_SPEC,
    MEASURED_WITH,
    NEXT,
    OPSET,
    PIXELS_ADMISSION,
    PRECISION,
    PREPROCESS,
    RUNTIME,
    TENSORRT_VERSION,
    THREADS,
    TOP_K,
    VERSION_COMPATIBLE,
    VOCABULARY_DIGEST,
    of_vocabulary,
)
from clipship.serving.repository.backends import BACKENDS, PYTHON, TENSORRT, Backend
from clipship.serving.repository.classifier_graph import classifier_outputs
from clipship.serving.repository.config_pbtxt import config_from_fields, type_and_dims
from clipship.serving.repository.tuning import DEFAULT_TUNING, ENGINE_CACHE, Tuning, graph_batches

Fields = dict[str, Any]
"""Fields of a message of model_config.proto."""

_ENCODED_IMAGE = "encoded_image"
"""The encoder's output inside the ensembles; their own ``embedding`` comes from the classifier."""

_ADMITTED = "admitted"
"""Output of the admission models."""


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """What the configurations of one vocabulary's models depend on."""

    name: str | None = None
    """None: the first vocabulary."""
    bundle_digest: str
    vocabulary_digest: str
    top_k: int
    """Classes returned per image, at most the size of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What the configurations of a repository's models depend on."""

    vocabularies: tuple[VocabularySettings, ...]
    """The bundle's own, which has no name, then the others."""
    image_spec: ImageSpec
    embed_dim: int
    max_batch_size: int = 64
    encoder: EncoderVariant = DEFAULT_ENCODER
    """The variant of the image encoder that runs without plans."""
    encoder_digest: str = ""
    """Digest of the ONNX file that runs, or that the plans were built from."""
    measured_with: tuple[str, ...] = ()
    """Instruction sets of the processor that the encoder's speed was measured on; empty: unknown."""
    plans: tuple[PlanInfo, ...] = ()
    """The TensorRT plans of the image encoder, one for each kind of GPU."""
    tuning: Tuning = field(default_factory=lambda: DEFAULT_TUNING)

    @property
    def image(self) -> TensorSpec:
        """The encoder's input."""
        return image_tensor(self.image_spec.size_px)

    @property
    def embedding(self) -> TensorSpec:
        """The encoder's output."""
        return embedding_tensor(self.embed_dim)


def model_settings_from_bundle(
    bundle: Bundle,
    *,
    max_batch_size: int,
    top_k: int,
    encoder: EncoderVariant = DEFAULT_ENCODER,
    plans: Sequence[TensorRtPlan] = (),
    others: Mapping[str, Bundle] | None = None,
    tuning: Tuning = DEFAULT_TUNING,
) -> ModelSettings:
    """The settings of ``bundle``, with ``top_k`` cut to the size of each vocabulary.

    Args:
        others: further bundles of the same encoder, by the names of their vocabularies.

    Raises:
        UsageError: ``max_batch_size`` or ``top_k`` is below 1.
    """
    for name, value in (("max_batch_size", max_batch_size), ("top_k", top_k)):
        if value < 1:
            raise UsageError(f"{name} is {value}: give 1 or more")
    bundles: list[tuple[str | None, Bundle]] = [(None, bundle), *(others or {}).items()]
    measured_on = bundle.manifest.measured_on
    return ModelSettings(
        vocabularies=tuple(
            VocabularySettings(
                name=name,
                bundle_digest=each.digest,
                vocabulary_digest=each.vocabulary.digest,
                top_k=min(top_k, len(each.vocabulary)),
            )
            for name, each in bundles
        ),
        image_spec=bundle.image_spec,
        embed_dim=bundle.manifest.embed_dim,
        max_batch_size=max_batch_size,
        encoder=encoder,
        encoder_digest=plans[0].info.onnx_digest if plans else variant_digest(bundle, encoder),
        measured_with=measured_on.instruction_sets if measured_on else (),
        plans=tuple(plan.info for plan in plans),
        tuning=tuning,
    )


def configs_from_settings(settings: ModelSettings, backend: Backend) -> dict[str, Any]:
    """The ``inference.ModelConfig`` message of every model, by name."""
    models = [_image_encoder(settings, backend), _preprocess(settings)]
    models.append(_admission(settings, ADMISSION, PREPROCESS, ENCODED))
    if backend.in_python:
        models.append(_admission(settings, PIXELS_ADMISSION, ENCODER, settings.image))
    models.append(_embed(settings, backend))
    for vocabulary in settings.vocabularies:
        models.append(_classifier(settings, vocabulary, backend))
        models += [_classify(settings, vocabulary, backend), _classify_encoded(settings, vocabulary)]
    return {fields["name"]: config_from_fields(fields) for fields in models}


def plan_files(plans: Sequence[PlanInfo]) -> tuple[str, ...]:
    """The name of each plan's file in the encoder's version folder."""
    if len(plans) == 1:
        return (TENSORRT.model_file,)
    return tuple(f"model_{'_'.join(plan.gpus)}.plan" for plan in plans)


def _model(
    settings: ModelSettings,
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    parameters: Mapping[str, str],
) -> Fields:
    """The fields of every model, ensembles among them."""
    return {
        "name": name,
        "max_batch_size": settings.max_batch_size,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [{"name": tensor.name, **type_and_dims(tensor)} for tensor in inputs],
        "output": [{"name": tensor.name, **type_and_dims(tensor)} for tensor in outputs],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _run_by(backend: Backend, *, kind: str = "KIND_CPU", count: int = 1, **instances: Any) -> Fields:
    """The fields of a model that a backend runs."""
    return {
        "backend": backend.name,
        "platform": backend.platform,
        "default_model_filename": backend.model_file,
        "instance_group": [{"kind": kind, "count": count, **instances}],
    }


def _batching(tuning: Tuning, **more: Any) -> Fields:
    """The dynamic batcher. A queue limit disables Triton's prefetching of batches."""
    policy: Fields = {"max_queue_size": tuning.max_queue_size} if tuning.max_queue_size else {}
    if tuning.queue_timeout_s:
        policy["default_timeout_microseconds"] = round(tuning.queue_timeout_s * 1e6)
        policy |= {"timeout_action": "REJECT", "allow_timeout_override": True}
    limits = {"default_queue_policy": policy} if policy else {}
    return {"dynamic_batching": {"max_queue_delay_microseconds": tuning.max_queue_delay_us, **limits, **more}}


def _warmups(settings: ModelSettings, tensor: TensorSpec) -> Fields:
    """Warm-up runs with the golden sample in ``warmup/``, which Triton repeats to each batch size."""
    inputs = {tensor.name: {**type_and_dims(tensor), "input_data_file": tensor.name}}
    sizes = settings.tuning.warmups(settings.max_batch_size)
    return {"model_warmup": [{"name": f"golden_{size}", "batch_size": size, "inputs": inputs} for size in sizes]}


def _cached(tuning: Tuning) -> Fields:
    return {"response_cache": {"enable": True}} if tuning.response_cache else {}


def _parameters(settings: ModelSettings) -> dict[str, str]:
    """What a client needs to know. The vocabulary's digest is in the classifier, which can be republished."""
    return {
        BUNDLE_DIGEST: settings.vocabularies[0].bundle_digest,
        IMAGE_SPEC: json.dumps(settings.image_spec.to_json()),
    }


def _image_encoder(settings: ModelSettings, backend: Backend) -> Fields:
    tuning = settings.tuning
    device = "gpu" if tuning.gpus else tuning.device
    kind = f"KIND_{(device if backend.device == 'auto' else backend.device).upper()}"
    instances: Fields = {"kind": kind, "count": tuning.instances, "gpus": list(tuning.gpus)}
    runs = _plan_parameters(settings) if backend.takes_plans else _variant_parameters(settings)
    fields = {
        **_model(settings, ENCODER, (settings.image,), (settings.embedding,), runs),
        **_run_by(backend, **instances, profile=["0"] if backend.takes_plans else []),
        **_batching(tuning, preferred_batch_size=list(tuning.preferred_batch_sizes)),
        **_warmups(settings, settings.image),
        **_cached(tuning),
    }
    return fields | (_plan_fields(settings) if backend.takes_plans else _accelerator(settings))


def _variant_parameters(settings: ModelSettings) -> dict[str, str]:
    """The encoder variant that runs, and its threads."""
    variant, tuning = settings.encoder, settings.tuning
    runs = {RUNTIME: variant.runtime, PRECISION: variant.precision, OPSET: str(variant.opset)}
    runs[ENCODER_DIGEST] = settings.encoder_digest
    if variant.runtime != "onnx" and settings.measured_with:
        runs[MEASURED_WITH] = " ".join(settings.measured_with)
    threads = {} if tuning.threads is None else {THREADS: str(tuning.threads)}
    return {**_parameters(settings), **runs, **threads}


def _accelerator(settings: ModelSettings) -> Fields:
    """One cached engine for all batches; without a profile each new batch size would build another."""
    if settings.tuning.accelerator is None:
        return {}
    size_px, largest = settings.image_spec.size_px, settings.max_batch_size
    name, batches = settings.image.name, {"min": 1, "opt": max(1, largest // 2), "max": largest}
    parameters = {
        "precision_mode": settings.encoder.precision.upper(),  # the types of the graph itself
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": ENGINE_CACHE,
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": ENGINE_CACHE,
        **{f"trt_profile_{kind}_shapes": f"{name}:{n}x{size_px}x{size_px}x3" for kind, n in batches.items()},
    }
    accelerators = [{"name": settings.tuning.accelerator, "parameters": parameters}]
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": accelerators}}}


def _plan_parameters(settings: ModelSettings) -> dict[str, str]:
    """The plans' precisions and the TensorRT version that the server needs.

    Plain plans need exactly their own version; version-compatible plans need at least the newest of theirs."""
    plans = settings.plans
    plain = [plan.runtime_version for plan in plans if not plan.version_compatible]
    version = plain[0] if plain else max((plan.runtime_version for plan in plans), key=version_parts)
    compatible = {VERSION_COMPATIBLE: "some" if plain else "all"} if len(plain) < len(plans) else {}
    return {
        **_parameters(settings),
        TENSORRT_VERSION: version,
        **compatible,
        PRECISION: ", ".join(sorted({plan.precision for plan in plans})),
        ENCODER_DIGEST: settings.encoder_digest,
    }


def _plan_fields(settings: ModelSettings) -> Fields:
    """The plan of each GPU; the default is a hardware-compatible plan where there is one."""
    files = dict(zip(plan_files(settings.plans), settings.plans, strict=True))
    usual = next((name for name, plan in files.items() if plan.hardware_compatible), next(iter(files)))
    fields: Fields = {
        "default_model_filename": usual,
        "cc_model_filenames": {capability_of(gpu): name for name, plan in files.items() for gpu in plan.gpus},
    }
    if settings.tuning.cuda_graphs:
        batches = graph_batches(max(plan.profile.min for plan in settings.plans), settings.max_batch_size)
        inputs = {settings.image.name: {"dim": type_and_dims(settings.image)["dims"]}}
        specs = [{"batch_size": size, "input": inputs} for size in batches]
        fields["optimization"] = {"cuda": {"graphs": True, "graph_spec": specs}}
    return fields


def _classifier(settings: ModelSettings, vocabulary: VocabularySettings, backend: Backend) -> Fields:
    """Runs on one thread: its products are too small to split, and the encoder needs the cores."""
    digests = {BUNDLE_DIGEST: vocabulary.bundle_digest, VOCABULARY_DIGEST: vocabulary.vocabulary_digest}
    outputs = (*classifier_outputs(vocabulary.top_k), passthrough_tensor(settings.embed_dim))
    parameters = {**digests, TOP_K: str(vocabulary.top_k), THREADS: "1"}
    return {
        **_model(settings, of_vocabulary(CLASSIFIER, vocabulary.name), (settings.embedding,), outputs, parameters),
        **_run_by(BACKENDS[backend.classifier]),
        **_batching(settings.tuning),
        "version_policy": {"specific": {"versions": [1]}},
    }


def _preprocess(settings: ModelSettings) -> Fields:
    outputs = (settings.image, ERROR)
    return {
        **_model(settings, PREPROCESS, (ENCODED,), outputs, _parameters(settings)),
        **_run_by(PYTHON, count=settings.tuning.decoders),
        **_batching(settings.tuning),
        **_warmups(settings, ENCODED),
        **_cached(settings.tuning),
    }


def _admission(settings: ModelSettings, name: str, to: str, tensor: TensorSpec) -> Fields:
    """Requests leave one by one; a batcher is only needed for queue limits."""
    tuning = settings.tuning
    batching = _batching(replace(tuning, max_queue_delay_us=0)) if tuning.limits_queue else {}
    parameters = {**_parameters(settings), NEXT: to}
    model = _model(settings, name, (tensor,), (replace(tensor, name=_ADMITTED),), parameters)
    return {**model, **_run_by(PYTHON), **batching}


def _ensemble(
    settings: ModelSettings,
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    steps: Sequence[Fields],
) -> Fields:
    fields = _model(settings, name, inputs, outputs, _parameters(settings))
    return {**fields, "platform": "ensemble", "ensemble_scheduling": {"step": list(steps)}}


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Fields:
    """The newest loaded version of ``model``: its tensors' names -> the ensemble's tensors' names."""
    return {"model_name": model, "model_version": -1, "input_map": dict(inputs), "output_map": dict(outputs)}


def _same(*names: str) -> dict[str, str]:
    """A step's tensors under their own names in the ensemble."""
    return {name: name for name in names}


def _encode_step(settings: ModelSettings, image: str, output: str) -> Fields:
    return _step(ENCODER, {settings.image.name: image}, {settings.embedding.name: output})


def _encode_steps(settings: ModelSettings, backend: Backend, output: str) -> list[Fields]:
    """From an ensemble's pixels to ``output``."""
    if not backend.in_python:
        return [_encode_step(settings, settings.image.name, output)]
    admission = _step(PIXELS_ADMISSION, _same(settings.image.name), _same(_ADMITTED))
    return [admission, _encode_step(settings, _ADMITTED, output)]


def _classify_step(settings: ModelSettings, vocabulary: VocabularySettings) -> Fields:
    """The embedding leaves the ensemble as the classifier hands it on, see :func:`passthrough_tensor`."""
    embedding, passed = settings.embedding.name, passthrough_tensor(settings.embed_dim).name
    outputs = _same(*(tensor.name for tensor in classifier_outputs(vocabulary.top_k)))
    return _step(
        of_vocabulary(CLASSIFIER, vocabulary.name), {embedding: _ENCODED_IMAGE}, {**outputs, passed: embedding}
    )


def _classify(settings: ModelSettings, vocabulary: VocabularySettings, backend: Backend) -> Fields:
    name, outputs = (
        of_vocabulary(CLASSIFY, vocabulary.name),
        (*classifier_outputs(vocabulary.top_k), settings.embedding),
    )
    steps = (*_encode_steps(settings, backend, _ENCODED_IMAGE), _classify_step(settings, vocabulary))
    return _ensemble(settings, name, (settings.image,), outputs, steps)


def _classify_encoded(settings: ModelSettings, vocabulary: VocabularySettings) -> Fields:
    image = settings.image.name
    outputs = (*classifier_outputs(vocabulary.top_k), ERROR, settings.embedding)
    steps = (
        _step(ADMISSION, _same(ENCODED.name), _same(_ADMITTED)),
        _step(PREPROCESS, {ENCODED.name: _ADMITTED}, _same(image, ERROR.name)),
        _encode_step(settings, image, _ENCODED_IMAGE),
        _classify_step(settings, vocabulary),
    )
    return _ensemble(settings, of_vocabulary(CLASSIFY_ENCODED, vocabulary.name), (ENCODED,), outputs, steps)


def _embed(settings: ModelSettings, backend: Backend) -> Fields:
    steps = _encode_steps(settings, backend, settings.embedding.name)
    return _ensemble(settings, EMBED, (settings.image,), (settings.embedding,), steps)
