"""What a repository's models are configured to be: facts of the bundles in, Triton's configurations out.

``write.py`` draws the models and writes them.

Legend: N images, H = W = side of the input in pixels, D embedding size, k classes reported an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clipship.core.bundle import DEFAULT_ENCODER, Bundle, EncoderForm
from clipship.core.errors import UsageError
from clipship.core.images.decoding import ImageSpec
from clipship.core.tensorrt_plan import PlanInfo, TensorRtPlan, capability_of, form_digest, version_parts
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
from clipship.serving.repository.config_pbtxt import (
    Batching,
    Ensemble,
    Model,
    Step,
    Warmup,
    config_from_ensemble,
    config_from_model,
)
from clipship.serving.repository.tuning import DEFAULT_TUNING, ENGINE_CACHE, Tuning, graph_batches

_ENCODED_IMAGE = "encoded_image"
"""The encoder's output inside the ensembles that classify; what they answer as the embedding is the classifier's."""

_ADMITTED = "admitted"
"""What a first step hands on, in the model and in the ensembles."""

_ACCELERATOR_PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
"""By the graph's own types: what the accelerator must allow TensorRT to compute in."""


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """What the configurations say about one vocabulary."""

    name: str | None = None
    """None: the repository's first."""
    bundle_digest: str
    vocabulary_digest: str
    top_k: int
    """Classes reported an image, at most as many as the vocabulary has."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
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
    encoder_digest: str = ""
    """Of the ONNX file that runs, or that the plans were built from."""
    measured_with: tuple[str, ...] = ()
    """Instruction sets of the processor that the encoder's speed was measured on; none where nobody knows."""
    plans: tuple[PlanInfo, ...] = ()
    """The TensorRT plans of the image encoder, one for each kind of GPU."""
    others: tuple[VocabularySettings, ...] = ()
    """Further vocabularies that share the encoder."""
    tuning: Tuning = field(default_factory=lambda: DEFAULT_TUNING)

    @property
    def vocabularies(self) -> tuple[VocabularySettings, ...]:
        """The bundle's own, which has no name, then the others."""
        first = VocabularySettings(
            bundle_digest=self.bundle_digest, vocabulary_digest=self.vocabulary_digest, top_k=self.top_k
        )
        return (first, *self.others)


def model_settings_from_bundle(
    bundle: Bundle,
    *,
    max_batch_size: int,
    top_k: int,
    encoder: EncoderForm = DEFAULT_ENCODER,
    plans: Sequence[TensorRtPlan] = (),
    others: Mapping[str, Bundle] | None = None,
    tuning: Tuning = DEFAULT_TUNING,
) -> ModelSettings:
    """The facts of ``bundle``, with ``top_k`` cut to the size of its vocabulary.

    Args:
        others: bundles of the same encoder whose vocabularies are served too, by their names.

    Raises:
        UsageError: ``max_batch_size`` or ``top_k`` is below 1.
    """
    for name, value in (("max_batch_size", max_batch_size), ("top_k", top_k)):
        if value < 1:
            raise UsageError(f"{name} is {value}: give 1 or more")
    return ModelSettings(
        bundle_digest=bundle.digest,
        vocabulary_digest=bundle.vocabulary.digest,
        image_spec=bundle.image_spec,
        embed_dim=bundle.manifest.embed_dim,
        top_k=min(top_k, len(bundle.vocabulary)),
        max_batch_size=max_batch_size,
        encoder=encoder,
        encoder_digest=plans[0].info.onnx_digest if plans else form_digest(bundle, encoder),
        measured_with=bundle.manifest.measured_on.instruction_sets if bundle.manifest.measured_on else (),
        plans=tuple(plan.info for plan in plans),
        others=tuple(vocabulary_settings(other, name, top_k) for name, other in (others or {}).items()),
        tuning=tuning,
    )


def vocabulary_settings(bundle: Bundle, name: str, top_k: int) -> VocabularySettings:
    """The facts of a further vocabulary, with ``top_k`` cut to its size."""
    return VocabularySettings(
        name=name,
        bundle_digest=bundle.digest,
        vocabulary_digest=bundle.vocabulary.digest,
        top_k=min(top_k, len(bundle.vocabulary)),
    )


def configs_from_settings(settings: ModelSettings, backend: Backend) -> dict[str, Any]:
    """The ``inference.ModelConfig`` message of every model, by name."""
    models = [
        _image_encoder(settings, backend),
        _preprocess(settings),
        _admission(settings, ADMISSION, PREPROCESS, ENCODED),
    ]
    if backend.in_python:
        models.append(_admission(settings, PIXELS_ADMISSION, ENCODER, image_tensor(settings.image_spec.size_px)))
    ensembles = [_embed(settings, backend)]
    for vocabulary in settings.vocabularies:
        models.append(_classifier(settings, vocabulary, backend))
        ensembles += [_classify(settings, vocabulary, backend), _classify_encoded(settings, vocabulary)]
    return {
        **{model.name: config_from_model(model) for model in models},
        **{ensemble.name: config_from_ensemble(ensemble) for ensemble in ensembles},
    }


def plan_files(plans: Sequence[PlanInfo]) -> tuple[str, ...]:
    """The name of each plan's file in the encoder's version folder."""
    if len(plans) == 1:
        return (TENSORRT.model_file,)
    return tuple(f"model_{'_'.join(plan.gpus)}.plan" for plan in plans)


def _parameters(settings: ModelSettings) -> dict[str, str]:
    """What a client needs to know; the vocabulary's facts stand at the classifier, which can be published anew."""
    return {BUNDLE_DIGEST: settings.bundle_digest, IMAGE_SPEC: json.dumps(settings.image_spec.to_json())}


def _batching(settings: ModelSettings) -> Batching:
    tuning = settings.tuning
    return Batching(
        max_queue_delay_us=tuning.max_queue_delay_us,
        max_queue_size=tuning.max_queue_size,
        queue_timeout_us=round(tuning.queue_timeout_s * 1e6),
    )


def _warmups(settings: ModelSettings, tensor: str) -> tuple[Warmup, ...]:
    """The golden sample at several batch sizes: Triton repeats it."""
    sizes = settings.tuning.warmups(settings.max_batch_size)
    return tuple(Warmup(name=f"golden_{size}", batch_size=size, files={tensor: tensor}) for size in sizes)


def _image_encoder(settings: ModelSettings, backend: Backend) -> Model:
    image = image_tensor(settings.image_spec.size_px)
    special = _plan_settings(settings) if backend.takes_plans else _form_settings(settings)
    return Model(
        name=ENCODER,
        backend=backend,
        **special,
        inputs=(image,),
        outputs=(embedding_tensor(settings.embed_dim),),
        max_batch_size=settings.max_batch_size,
        instance_kind=_kind(settings.tuning, backend),
        instances=settings.tuning.instances,
        gpus=settings.tuning.gpus,
        batching=replace(_batching(settings), preferred_sizes=settings.tuning.preferred_batch_sizes),
        warmups=_warmups(settings, image.name),
        response_cache=settings.tuning.response_cache,
    )


def _kind(tuning: Tuning, backend: Backend) -> str:
    device = "gpu" if tuning.gpus else tuning.device
    return f"KIND_{(device if backend.device == 'auto' else backend.device).upper()}"


def _form_settings(settings: ModelSettings) -> dict[str, Any]:
    """The bundle's form that runs, its threads, and its accelerator."""
    form = settings.encoder
    runs = {RUNTIME: form.runtime, PRECISION: form.precision, OPSET: str(form.opset)}
    runs[ENCODER_DIGEST] = settings.encoder_digest
    if form.runtime != "onnx" and settings.measured_with:
        runs[MEASURED_WITH] = " ".join(settings.measured_with)
    threads = {} if settings.tuning.threads is None else {THREADS: str(settings.tuning.threads)}
    accelerator = {} if settings.tuning.accelerator is None else _accelerator(settings)
    return {"parameters": {**_parameters(settings), **runs, **threads}, "tensorrt_accelerator": accelerator}


def _accelerator(settings: ModelSettings) -> dict[str, str]:
    """One engine for all batches, kept on disk: without a stated profile each new batch size builds another."""
    size_px = settings.image_spec.size_px
    image = image_tensor(size_px).name
    batches = {"min": 1, "opt": max(1, settings.max_batch_size // 2), "max": settings.max_batch_size}
    shapes = {f"trt_profile_{kind}_shapes": f"{image}:{n}x{size_px}x{size_px}x3" for kind, n in batches.items()}
    return {
        "precision_mode": _ACCELERATOR_PRECISIONS[settings.encoder.precision],
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": ENGINE_CACHE,
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": ENGINE_CACHE,
        **shapes,
    }


def _plan_settings(settings: ModelSettings) -> dict[str, Any]:
    """Which plan is for which GPU; a plan for every GPU since Ampere is for those that have none of their own."""
    files = dict(zip(plan_files(settings.plans), settings.plans, strict=True))
    usual = next((name for name, plan in files.items() if plan.hardware_compatible), next(iter(files)))
    facts_of_plans = {
        **_tensorrt_facts(settings.plans),
        PRECISION: ", ".join(sorted({plan.precision for plan in settings.plans})),
        ENCODER_DIGEST: settings.encoder_digest,
    }
    least = max(plan.profile.least for plan in settings.plans)
    return {
        "file": usual,
        "file_by_capability": {capability_of(gpu): name for name, plan in files.items() for gpu in plan.gpus},
        "parameters": {**_parameters(settings), **facts_of_plans},
        "profiles": ("0",),
        "cuda_graph_batches": graph_batches(least, settings.max_batch_size) if settings.tuning.cuda_graphs else (),
    }


def _tensorrt_facts(plans: Sequence[PlanInfo]) -> dict[str, str]:
    """The version that the server must have: that of the plain plans, or at least the newest of all others."""
    plain = [plan.runtime_version for plan in plans if not plan.version_compatible]
    version = plain[0] if plain else max((plan.runtime_version for plan in plans), key=version_parts)
    compatible = {VERSION_COMPATIBLE: "some" if plain else "all"} if len(plain) < len(plans) else {}
    return {TENSORRT_VERSION: version, **compatible}


def _classifier(settings: ModelSettings, vocabulary: VocabularySettings, backend: Backend) -> Model:
    """One thread: its products are too small to share, and the encoder's threads need the cores."""
    digests = {BUNDLE_DIGEST: vocabulary.bundle_digest, VOCABULARY_DIGEST: vocabulary.vocabulary_digest}
    return Model(
        name=of_vocabulary(CLASSIFIER, vocabulary.name),
        backend=BACKENDS[backend.classifier],
        inputs=(embedding_tensor(settings.embed_dim),),
        outputs=(*classifier_outputs(vocabulary.top_k), passthrough_tensor(settings.embed_dim)),
        max_batch_size=settings.max_batch_size,
        batching=_batching(settings),
        parameters={**digests, TOP_K: str(vocabulary.top_k), THREADS: "1"},
        versions=(1,),
    )


def _preprocess(settings: ModelSettings) -> Model:
    return Model(
        name=PREPROCESS,
        backend=PYTHON,
        inputs=(ENCODED,),
        outputs=(image_tensor(settings.image_spec.size_px), ERROR),
        max_batch_size=settings.max_batch_size,
        instances=settings.tuning.decoders,
        batching=_batching(settings),
        parameters=_parameters(settings),
        warmups=_warmups(settings, ENCODED.name),
        response_cache=settings.tuning.response_cache,
    )


def _admission(settings: ModelSettings, name: str, to: str, tensor: TensorSpec) -> Model:
    """It has a batcher only for its queue's limits: requests leave one by one."""
    batching = replace(_batching(settings), max_queue_delay_us=0)
    return Model(
        name=name,
        backend=PYTHON,
        inputs=(tensor,),
        outputs=(replace(tensor, name=_ADMITTED),),
        max_batch_size=settings.max_batch_size,
        batching=batching if batching.limited else None,
        parameters={**_parameters(settings), NEXT: to},
    )


def _same(*names: str) -> dict[str, str]:
    """A step's tensors under their own names in the ensemble."""
    return {name: name for name in names}


def _encode_step(settings: ModelSettings, image: str, output: str) -> Step:
    pixels, embedding = image_tensor(settings.image_spec.size_px), embedding_tensor(settings.embed_dim)
    return Step(model=ENCODER, inputs={pixels.name: image}, outputs={embedding.name: output})


def _encode_steps(settings: ModelSettings, backend: Backend, output: str) -> tuple[Step, ...]:
    """From an ensemble's pixels to ``output``."""
    image = image_tensor(settings.image_spec.size_px).name
    if not backend.in_python:
        return (_encode_step(settings, image, output),)
    admission = Step(model=PIXELS_ADMISSION, inputs=_same(image), outputs=_same(_ADMITTED))
    return (admission, _encode_step(settings, _ADMITTED, output))


def _classify_step(settings: ModelSettings, vocabulary: VocabularySettings) -> Step:
    """The embedding leaves the ensemble as the classifier hands it on, see :func:`passthrough_tensor`."""
    embedding, passed = embedding_tensor(settings.embed_dim).name, passthrough_tensor(settings.embed_dim).name
    outputs = _same(*(tensor.name for tensor in classifier_outputs(vocabulary.top_k)))
    model = of_vocabulary(CLASSIFIER, vocabulary.name)
    return Step(model=model, inputs={embedding: _ENCODED_IMAGE}, outputs={**outputs, passed: embedding})


def _classify(settings: ModelSettings, vocabulary: VocabularySettings, backend: Backend) -> Ensemble:
    return Ensemble(
        name=of_vocabulary(CLASSIFY, vocabulary.name),
        inputs=(image_tensor(settings.image_spec.size_px),),
        outputs=(*classifier_outputs(vocabulary.top_k), embedding_tensor(settings.embed_dim)),
        max_batch_size=settings.max_batch_size,
        steps=(*_encode_steps(settings, backend, _ENCODED_IMAGE), _classify_step(settings, vocabulary)),
        parameters=_parameters(settings),
    )


def _classify_encoded(settings: ModelSettings, vocabulary: VocabularySettings) -> Ensemble:
    image = image_tensor(settings.image_spec.size_px)
    admission = Step(model=ADMISSION, inputs=_same(ENCODED.name), outputs=_same(_ADMITTED))
    decode = Step(model=PREPROCESS, inputs={ENCODED.name: _ADMITTED}, outputs=_same(image.name, ERROR.name))
    encode = _encode_step(settings, image.name, _ENCODED_IMAGE)
    return Ensemble(
        name=of_vocabulary(CLASSIFY_ENCODED, vocabulary.name),
        inputs=(ENCODED,),
        outputs=(*classifier_outputs(vocabulary.top_k), ERROR, embedding_tensor(settings.embed_dim)),
        max_batch_size=settings.max_batch_size,
        steps=(admission, decode, encode, _classify_step(settings, vocabulary)),
        parameters=_parameters(settings),
    )


def _embed(settings: ModelSettings, backend: Backend) -> Ensemble:
    return Ensemble(
        name=EMBED,
        inputs=(image_tensor(settings.image_spec.size_px),),
        outputs=(embedding_tensor(settings.embed_dim),),
        max_batch_size=settings.max_batch_size,
        steps=_encode_steps(settings, backend, embedding_tensor(settings.embed_dim).name),
        parameters=_parameters(settings),
    )
