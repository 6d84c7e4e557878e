"""PyTorch modules to ONNX files with dynamic axes, and the checks that these are dynamic.

Three opset profiles: 18 for the oldest runtimes, 20 has GELU as one node, 23 attention; docs/guides/precision.md says
which versions run them. A graph of 2 GB or more, which one protobuf message cannot hold, keeps its weights in
``<name>.onnx.data``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

_INPUT, _OUTPUT = "clipship_input", "clipship_output"

_ONNX_DOMAINS = ("", "ai.onnx")

OPSET = 18
"""Where LayerNormalization is one node and the oldest of the runtimes can read the file."""

OPSETS = (18, 20, 23)
"""The profiles."""

GELU_OPSET, ATTENTION_OPSET = 20, 23
"""Where GELU, and where attention is one node."""

EXTERNAL_BYTES = 2 * 10**9
"""Graphs whose weights take more than this keep them in a file of their own: protobuf ends at 2^31 bytes."""

METADATA_PRECISION = "clipship.precision"
"""The key in a graph's ``metadata_props`` that names the type of its matrix products."""

_SMALL_BYTES = 1024
"""Constants up to this size stay in the graph: shapes are inferred from them."""


def onnx_from_module(
    module: nn.Module,
    sample: Tensor,
    path: Path,
    *,
    input_spec: TensorSpec,
    output_spec: TensorSpec,
    metadata: Mapping[str, str],
    opset: int = OPSET,
    sizes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    external_bytes: int = EXTERNAL_BYTES,
) -> None:
    """Export ``module`` (one input, one output) to ``path`` with the names of the two specs, axes with names free.

    Args:
        sample: a typical input of at least two rows (the exporter treats sizes 0 and 1 as constants).
        metadata: written into the model's ``metadata_props``, with the precision, the opset and clipship's version.
        opset: one of :data:`OPSETS`.
        sizes: the smallest and the largest size of a free axis by its name; those not named have 1 to 2^20.
        external_bytes: weights above this size go into a file of their own.

    Raises:
        CheckFailed: the exporter fixed a free axis, named or shaped a tensor otherwise than the specs say, or used an
            operator that ``opset`` does not have.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  (the exporter imports it late and says less when it is missing)
        import torch
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from error
    assert sample.shape[0] >= 2, "sizes 0 and 1 would be baked in"
    named = {axis: size for axis, size in enumerate(input_spec.shape) if isinstance(size, str)}
    limits = {size: sizes.get(size, (1, 2**20)) for size in named.values()}
    free = {axis: torch.export.Dim(size, min=limits[size][0], max=limits[size][1]) for axis, size in named.items()}
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (sample,),
            dynamo=True,
            opset_version=opset,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=(free,),
            custom_translation_table=_translations(opset),
        )
    assert program is not None
    model = program.model_proto
    del program
    _finish(model, opset, metadata)
    _rename(model.graph, {_INPUT: input_spec.name, _OUTPUT: output_spec.name})
    save_onnx(model, path, external_bytes=external_bytes)
    validate_onnx(path)
    _validate_tensor(model.graph.input, input_spec, path)
    _validate_tensor(model.graph.output, output_spec, path)


def _translations(opset: int) -> dict[Any, Any]:
    """Our translation of operators that runtimes would not recognise in the exporter's.

    GELU (Hendrycks and Gimpel 2016) is one node from opset 20 on. Before that its five nodes are in the order that
    ONNX Runtime, OpenVINO and TensorRT fuse into one kernel: the half comes last.
    """
    import onnxscript
    import torch

    if opset >= GELU_OPSET:
        return {}
    op = getattr(onnxscript, f"opset{opset}")

    def gelu(x: Any, approximate: str = "none") -> Any:
        if approximate == "tanh":
            root, cubic, one = (op.Constant(value_float=value) for value in (math.sqrt(2 / math.pi), 0.044715, 1.0))
            inner = op.Mul(root, op.Add(x, op.Mul(cubic, op.Mul(x, op.Mul(x, x)))))
            return op.Mul(op.Mul(x, op.Add(op.Tanh(inner), one)), op.Constant(value_float=0.5))
        root_two, one, half = (op.Constant(value_float=value) for value in (math.sqrt(2.0), 1.0, 0.5))
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root_two)), one)), half)

    return {torch.ops.aten.gelu.default: gelu}


def _finish(model: onnx.ModelProto, opset: int, properties: Mapping[str, str]) -> None:
    """Give the exporter's model the opset's own IR version and our metadata, and remove its stack traces.

    The exporter writes a newer IR version than it needs, which older runtimes refuse. When it cannot convert a graph to
    an opset it logs that and returns another one.
    """
    import onnx

    given = opset_of(model)
    if given != opset:
        raise CheckFailed(f"torch {version('torch')} exports this model at opset {given} only: give --opset {given}")
    validate_operators(model, f"opset {opset}", opset=opset)
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    del model.metadata_props[:]
    told = {METADATA_PRECISION: "fp32", "clipship.opset": str(opset), "clipship.version": version("clipship")}
    set_metadata(model, {**properties, **told})
    _strip_traces(model)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that ``model`` uses."""
    return next(int(one.version) for one in model.opset_import if one.domain in _ONNX_DOMAINS)


def since_opset(op_type: str) -> int | None:
    """The first opset with the ONNX operator ``op_type``, None when ONNX has no such operator."""
    return _first_opsets().get(op_type)


@cache
def _first_opsets() -> Mapping[str, int]:
    """By operator of any domain, the first version that has it."""
    import onnx

    found: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        found[schema.name] = min(schema.since_version, found.get(schema.name, schema.since_version))
    return found


def validate_operators(model: onnx.ModelProto, target: str, *, opset: int) -> None:
    """Validate that ``target``, which has ONNX's operators up to ``opset``, can run ``model``.

    Raises:
        CheckFailed: the graph has other operators; names each, and the opset that has it.
    """
    foreign = {(one.domain, one.op_type) for one in model.graph.node if one.domain not in _ONNX_DOMAINS}
    own = {one.op_type: since_opset(one.op_type) for one in model.graph.node if one.domain in _ONNX_DOMAINS}
    unknown = [f"{name} of {domain}, which is no ONNX operator" for domain, name in sorted(foreign)]
    unknown += [f"{name}, which is in no opset" for name, since in sorted(own.items()) if since is None]
    late = {name: since for name, since in sorted(own.items()) if since is not None and since > opset}
    unknown += [f"{name}, which opset {since} has" for name, since in late.items()]
    if unknown:
        best = max((one for one in OPSETS if one <= opset), default=OPSETS[0])
        advice = f"pack with --opset {best}" if late else "pack a variant of ONNX's own operators"
        raise CheckFailed(f"{target} does not know {'; '.join(unknown)}: {advice}")


def set_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Add ``metadata`` to ``metadata_props``, replacing values of the same keys."""
    import onnx

    old = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, {**old, **metadata})


def load_onnx(path: Path) -> onnx.ModelProto:
    """The model at ``path`` with all its weights."""
    import onnx

    return onnx.load(path)


def save_onnx(model: onnx.ModelProto, path: Path, *, external_bytes: int = EXTERNAL_BYTES) -> tuple[Path, ...]:
    """Write ``model`` to ``path``, and weights of more than ``external_bytes`` to ``<path>.data``; returns the files.

    With a file of weights, ``model`` points into that file afterwards.
    """
    import onnx

    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if weights_bytes <= external_bytes:
        onnx.save(model, path)
        return (path,)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=_SMALL_BYTES)
    return (path, data)


def validate_onnx(path: Path) -> None:
    """ONNX's checker and strict shape inference on the model at ``path``.

    Raises:
        CheckFailed: the model is not valid.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckFailed(f"{path.name} is not valid ONNX ({first}): please report this model") from error


def copy_without_weights(model: onnx.ModelProto, *, nodes: bool = True) -> onnx.ModelProto:
    """``model`` without its initialisers, which can be gigabytes; with ``nodes`` False only its inputs and outputs."""
    import onnx

    copy = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    for name in ("opset_import", "metadata_props"):
        getattr(copy, name).extend(getattr(model, name))
    copy.graph.name = model.graph.name
    for name in ("input", "output", *(("node", "value_info") if nodes else ())):
        getattr(copy.graph, name).extend(getattr(model.graph, name))
    return copy


def inferred_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Element type and shape of every value of ``model``, inputs and initialisers included."""
    import onnx

    light = copy_without_weights(model)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= _SMALL_BYTES:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    for tensor in light.graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return types


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress lines and its own deprecation warnings off the terminal."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give values their final names, and inner values of the same names others.

    With the final names the exporter itself would write an invalid graph where an inner value has one of them.
    """
    full = {**{name: f"{name}_inner" for name in names.values()}, **names}
    for node in graph.node:
        node.input[:] = [full.get(name, name) for name in node.input]
        node.output[:] = [full.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = full.get(value.name, value.name)


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove per-node metadata: it holds stack traces with paths of the exporting machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _validate_tensor(values: list[onnx.ValueInfoProto], spec: TensorSpec, path: Path) -> None:
    import onnx

    if [value.name for value in values] != [spec.name]:
        raise CheckFailed(f"{path.name}: tensors {[value.name for value in values]} instead of [{spec.name!r}]")
    tensor = values[0].type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    free = isinstance(shape[0], str)
    if dtype != spec.dtype or shape[1:] != spec.shape[1:] or not free:
        raise CheckFailed(
            f"{path.name}: {spec.name} is {dtype} {list(shape)} instead of {spec.dtype} {list(spec.shape)}"
        )
