"""PyTorch modules to ONNX files, with one free axis, and the checks that it really is free."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

_INPUT, _OUTPUT = "clipship_input", "clipship_output"

OPSET = 18
"""Where LayerNormalization is one node and every runtime of the last three years can read the file."""

IR_VERSION = 8
"""That of opset 18. The exporter writes a newer one, which older runtimes refuse, and uses nothing of it."""


def onnx_from_module(
    module: nn.Module,
    sample: Tensor,
    path: Path,
    *,
    input_spec: TensorSpec,
    output_spec: TensorSpec,
    metadata: Mapping[str, str],
) -> None:
    """Export ``module`` (one input, one output, axis 0 free) to ``path`` with the names of the two specs.

    Args:
        sample: a typical input of at least two rows (the exporter treats sizes 0 and 1 as constants).
        metadata: written into the model's ``metadata_props``.

    Raises:
        CheckFailed: the exporter fixed the free axis, or named or shaped a tensor otherwise than the specs say.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter imports it late and says less when it is missing)
        import torch
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from error
    assert sample.shape[0] >= 2, "sizes 0 and 1 would be baked in"
    free_axis = torch.export.Dim(str(input_spec.shape[0]), min=1, max=2**20)
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (sample,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=({0: free_axis},),
        )
    assert program is not None
    model = program.model_proto
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    model.ir_version = IR_VERSION
    _strip_traces(model)
    _rename(model.graph, {_INPUT: input_spec.name, _OUTPUT: output_spec.name})
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    _check_tensor(model.graph.input, input_spec, path)
    _check_tensor(model.graph.output, output_spec, path)


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
    """Give values their final names; an inner value that happens to have one of them makes room.

    (Given the final names, the exporter writes an invalid graph when an operator's own value is called the same.)
    """
    full = {**{name: f"{name}_inner" for name in names.values()}, **names}
    for node in graph.node:
        node.input[:] = [full.get(name, name) for name in node.input]
        node.output[:] = [full.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = full.get(value.name, value.name)


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove per-node metadata: it holds stack traces with paths of the exporting machine."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def _check_tensor(values: list[onnx.ValueInfoProto], spec: TensorSpec, path: Path) -> None:
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
