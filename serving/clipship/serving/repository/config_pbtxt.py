"""Triton model configurations: small dataclasses -> protobuf -> ``config.pbtxt``.

Everything is explicit, because the server runs with ``--disable-auto-complete-config``. The message class is the one
that ``tritonclient`` ships (``model_config.proto``), so a misspelt field cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipship.core.tensors import TensorSpec
from clipship.serving.errors import RepositoryError
from clipship.serving.repository.backends import TENSORRT_ACCELERATOR, Backend

TRITON_TYPES = {"uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "float32": "TYPE_FP32", "string": "TYPE_STRING"}
"""Triton's name of each dtype a :class:`TensorSpec` may have."""

_HEADER = "# Written by `clipship repository`; checked by `clipship serve`.\n"


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests of several clients are put together, and when the server refuses them."""

    max_queue_delay_us: int = 1_000
    """How long a request may wait for company, in microseconds."""
    max_queue_size: int = 0
    """Requests waiting; one more is answered with UNAVAILABLE. 0: no limit."""
    queue_timeout_us: int = 0
    """After so many microseconds in the queue a request is answered with UNAVAILABLE; a client may set its own.

    0: never, and then the batcher fetches ahead, which a time limit would switch off.
    """
    preferred_sizes: tuple[int, ...] = ()
    """Batches that are not kept waiting for more."""

    @property
    def limited(self) -> bool:
        """Whether the queue has a limit, of size or of time."""
        return bool(self.max_queue_size or self.queue_timeout_us)


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """One sample sent through the model while it loads: file names under ``<model>/warmup/``, by input."""

    name: str
    batch_size: int
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that a backend runs."""

    name: str
    backend: Backend
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    parameters: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None
    """The file in each version folder, where it is not the backend's usual one."""
    file_by_capability: Mapping[str, str] = field(default_factory=dict)
    """Other files for GPUs of a compute capability ("8.9"); ``file`` is for all others."""
    instance_kind: str = "KIND_CPU"
    """KIND_CPU, KIND_GPU, or KIND_AUTO (a GPU where there is one and the backend can use it)."""
    instances: int = 1
    gpus: tuple[int, ...] = ()
    """By number; none: all."""
    profiles: tuple[str, ...] = ()
    """A plan's optimisation profiles, by number."""
    cuda_graph_batches: tuple[int, ...] = ()
    """Batches whose work on a GPU is launched as one graph."""
    tensorrt_accelerator: Mapping[str, str] = field(default_factory=dict)
    """Parameters of ONNX Runtime's TensorRT execution accelerator; empty: none."""
    response_cache: bool = False
    """Whether inputs that came before are answered from the server's cache."""
    versions: tuple[int, ...] = ()
    """The versions that are served; none: the newest."""
    batching: Batching | None = field(default_factory=Batching)
    """None: no batching; requests run one by one, in order of arrival."""
    warmups: tuple[Warmup, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One model of an ensemble: its tensors' names -> the ensemble's tensors' names."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Models in a row. Triton allows it no instances, no warm-up and no optimisation of its own."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    steps: tuple[Step, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)


def config_from_model(model: Model) -> Any:
    """The ``inference.ModelConfig`` message of a model that a backend runs."""
    config = _common(model)
    config.backend = model.backend.name
    config.platform = model.backend.platform
    config.default_model_filename = model.file or model.backend.model_file
    config.cc_model_filenames.update(model.file_by_capability)
    config.instance_group.add(count=model.instances, kind=model.instance_kind, gpus=model.gpus, profile=model.profiles)
    if model.versions:
        config.version_policy.specific.versions.extend(model.versions)
    if model.response_cache:
        config.response_cache.enable = True
    if model.batching is not None:
        _set_batching(config, model.batching)
    _set_optimisation(config, model)
    for warmup in model.warmups:
        _add_warmup(config, model, warmup)
    return config


def config_from_ensemble(ensemble: Ensemble) -> Any:
    """The ``inference.ModelConfig`` message of an ensemble. Each step takes the newest loaded version of its model."""
    config = _common(ensemble)
    config.platform = "ensemble"
    for step in ensemble.steps:
        added = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        added.input_map.update(step.inputs)
        added.output_map.update(step.outputs)
    return config


def text_from_config(config: Any) -> str:
    """The text of ``config.pbtxt``; map entries come sorted, so equal configurations give equal text."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, as_utf8=True)
    return _HEADER + text


def config_from_text(text: str) -> Any:
    """The inverse of :func:`text_from_config`.

    Raises:
        ValueError: not the text form of a model configuration; says the line and column.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"not a model configuration: {error}") from error


def read_config(folder: Path) -> Any:
    """The configuration of the model in ``folder``.

    Raises:
        RepositoryError: it is missing, or none.
    """
    path = folder / "config.pbtxt"
    try:
        return config_from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path}: cannot be read ({error}): write it again with clipship repository") from error


def _common(spec: Model | Ensemble) -> Any:
    """Name, batch size, tensors and parameters."""
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig(name=spec.name, max_batch_size=spec.max_batch_size)
    config.version_policy.latest.num_versions = 1
    for added, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
        for tensor in tensors:
            added.add(name=tensor.name, data_type=TRITON_TYPES[tensor.dtype], dims=_dims(tensor))
    for key, value in spec.parameters.items():
        config.parameters[key].string_value = value
    return config


def _dims(tensor: TensorSpec) -> list[int]:
    """The shape without the batch axis, which ``max_batch_size`` stands for."""
    return [-1 if isinstance(size, str) else size for size in tensor.shape[1:]]


def _set_batching(config: Any, batching: Batching) -> None:
    dynamic = config.dynamic_batching
    dynamic.max_queue_delay_microseconds = batching.max_queue_delay_us
    dynamic.preferred_batch_size.extend(batching.preferred_sizes)
    if batching.max_queue_size:
        dynamic.default_queue_policy.max_queue_size = batching.max_queue_size
    if batching.queue_timeout_us:
        policy = dynamic.default_queue_policy
        policy.timeout_action = policy.REJECT
        policy.default_timeout_microseconds = batching.queue_timeout_us
        policy.allow_timeout_override = True


def _set_optimisation(config: Any, model: Model) -> None:
    for size in model.cuda_graph_batches:
        config.optimization.cuda.graphs = True
        graph = config.optimization.cuda.graph_spec.add(batch_size=size)
        for tensor in model.inputs:
            graph.input[tensor.name].dim.extend(_dims(tensor))
    if model.tensorrt_accelerator:
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        accelerators.add(name=TENSORRT_ACCELERATOR).parameters.update(model.tensorrt_accelerator)


def _add_warmup(config: Any, model: Model, warmup: Warmup) -> None:
    added = config.model_warmup.add(name=warmup.name, batch_size=warmup.batch_size)
    for tensor in model.inputs:
        sample = added.inputs[tensor.name]
        sample.data_type = (
            config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name[TRITON_TYPES[tensor.dtype]].number
        )
        sample.dims.extend(_dims(tensor))
        sample.input_data_file = warmup.files[tensor.name]
