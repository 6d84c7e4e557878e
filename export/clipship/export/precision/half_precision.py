"""From the float32 graph to a typed one: float16 or bfloat16 matrix products, everything delicate in float32.

A typed graph needs no builder flag: every runtime computes in the types it names. The rules, by operator:

- *products* (MatMul, Gemm, Conv, Attention) take and give the smaller type; their weights are stored in it;
- *cheap* operators between them (bias, GELU, the scale of attention) follow when every operand that is computed is of
  the smaller type, and *moves* (Reshape, Transpose, ...) when what they move is;
- all others stay float32: LayerNormalization, Softmax, the residual additions (one operand is the float32 stream), the
  normalisation of the pixels, the unit length.

Every value is cast at most once in each direction, and by these rules no cast undoes another. A node stays float32 when
its values on real images do not fit (:func:`unfit_nodes`), and when ONNX has no such operator for the type at its
opset (convolution takes bfloat16 from opset 22 on). The softmax inside an Attention node is the runtime's: its float32
attribute is one that TensorRT refuses.

Why not a library: ONNX Runtime's converter (``onnxruntime.transformers.float16``) has no bfloat16, and casts around
every node that it leaves in float32; NVIDIA's AutoCast needs a dozen packages, some of them for GPUs.

Shape legend: N images, H = W pixels, K inputs and F outputs of a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.precisions import PRECISIONS, REDUCED, Precision
from clipship.export.onnx_graph import (
    METADATA_PRECISION,
    copy_without_weights,
    inferred_types,
    load_onnx,
    opset_of,
    save_onnx,
    set_metadata,
    validate_onnx,
)
from clipship.export.precision.activation_ranges import magnitudes

if TYPE_CHECKING:
    import onnx

HEADROOM = 8
"""Values up to an eighth of the type's largest are trusted: other images have larger values than those seen."""

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
CHEAP = frozenset({"Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Sigmoid", "Tanh", "Relu", "Swish"})
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Slice", "Split", "Flatten", "Identity"})
ANY = frozenset({"Shape", "Size", "Cast"})
"""Operators that read a value of any type without a cast."""


def typed_onnx(
    source: Path, target: Path, precision: Precision, calibration_pixels: NDArray[np.uint8]
) -> tuple[str, ...]:
    """Write the float32 graph ``source`` with ``precision`` matrix products to ``target``.

    Input and output keep their names and types, uint8 and float32.

    Args:
        calibration_pixels: uint8 [N, H, W, 3], real images, N of 32 or more.

    Returns:
        The nodes that stay float32 because their values or weights do not fit into the type.

    Raises:
        DataError: fewer than 32 images.
        CheckFailed: the typed graph does not pass ONNX's checker.
    """
    model = load_onnx(source)
    kept = unfit_nodes(model, precision, calibration_pixels, target.parent)
    typed = typed_model(model, precision, frozenset(kept))
    set_metadata(typed, {METADATA_PRECISION: precision})
    save_onnx(typed, target)
    validate_onnx(target)
    return kept


def unfit_nodes(
    model: onnx.ModelProto, precision: Precision, pixels: NDArray[np.uint8], scratch: Path
) -> tuple[str, ...]:
    """Names of the nodes whose values on ``pixels`` or whose weights do not fit into ``precision``.

    Values do not fit when the largest is above an eighth of the type's largest (float16: 8188), or so small (float16:
    below 4.9e-4) that the type holds it with fewer digits. Weights do not fit when rounding changes those of any output
    by more than the type's relative step, as it does beyond the type's range.
    """
    graph = model.graph
    floats, constants = _floats(model), _constants(graph)
    low = _low_nodes(model, floats, constants, precision, frozenset())
    values = {name for node in low for name in (*node.input, *node.output) if name in floats and name not in constants}
    largest = magnitudes(model, sorted(values), pixels, scratch)
    fits = {name: _fits(float(value), precision) for name, value in largest.items()}
    fits |= {name: _weights_fit(tensor, precision) for name, tensor in _weights_of(low, constants)}
    return tuple(node.name for node in low if not all(fits.get(name, True) for name in (*node.input, *node.output)))


def typed_model(model: onnx.ModelProto, precision: Precision, kept: frozenset[str]) -> onnx.ModelProto:
    """``model`` with ``precision`` products, but for the nodes named in ``kept``. ``model`` is left as it is."""
    floats, constants = _floats(model), _constants(model.graph)
    low = _low_nodes(model, floats, constants, precision, kept)
    typed = copy_without_weights(model, nodes=False)
    writer = _Writer(
        graph=typed.graph,
        floats=floats,
        constants=constants,
        low_values=frozenset(name for node in low for name in node.output),
        low_type=_elem_type(precision),
        made={},
    )
    low_names = {id(node) for node in low}
    for node in model.graph.node:
        writer.add(node, low=id(node) in low_names)
    assert not {value.name for value in model.graph.output} & writer.low_values, "the output is float32"
    return typed


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes nodes in order, with a cast or a typed copy of a constant before the first node that needs it."""

    graph: onnx.GraphProto
    floats: frozenset[str]
    constants: Mapping[str, onnx.TensorProto]
    low_values: frozenset[str]
    """Computed values of the smaller type."""
    low_type: int
    made: dict[tuple[str, int], str]
    """By value and type, the name of its cast or typed copy."""

    def add(self, node: onnx.NodeProto, *, low: bool) -> None:
        """Append ``node``, its inputs in the type that it takes."""
        import onnx

        wanted = self.low_type if low else onnx.TensorProto.FLOAT
        inputs = [self._input(node, name, wanted) for name in node.input]  # their casts come before the node
        copy = self.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = inputs

    def _input(self, node: onnx.NodeProto, name: str, elem_type: int) -> str:
        """The name of the value ``name`` as ``elem_type``, cast on first use."""
        import onnx

        if name in self.constants:
            return self._constant(name, elem_type)
        have = self.low_type if name in self.low_values else onnx.TensorProto.FLOAT
        if node.op_type in ANY or name not in self.floats or have == elem_type:
            return name
        key = (name, elem_type)
        if key not in self.made:
            self.made[key] = f"{name}_{_suffix(elem_type)}"
            cast = onnx.helper.make_node("Cast", [name], [self.made[key]], name=f"cast_{self.made[key]}", to=elem_type)
            self.graph.node.append(cast)
        return self.made[key]

    def _constant(self, name: str, elem_type: int) -> str:
        import onnx

        tensor = self.constants[name]
        key = (name, elem_type if name in self.floats else tensor.data_type)
        if key not in self.made:
            self.made[key] = name if key[1] == tensor.data_type else f"{name}_{_suffix(elem_type)}"
            if key[1] != tensor.data_type:
                values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
                tensor = onnx.numpy_helper.from_array(values, self.made[key])
            self.graph.initializer.append(tensor)
        return self.made[key]


def _low_nodes(
    model: onnx.ModelProto,
    floats: frozenset[str],
    constants: Mapping[str, onnx.TensorProto],
    precision: Precision,
    kept: frozenset[str],
) -> list[onnx.NodeProto]:
    """The nodes that compute in ``precision`` by the rules at the top of this file, without ``kept`` ones."""
    opset = opset_of(model)
    low: list[onnx.NodeProto] = []
    values: set[str] = set()
    for node in model.graph.node:
        computed = [name for name in node.input if name in floats and name not in constants]
        follows = bool(computed) and all(name in values for name in computed)
        takes = node.op_type in PRODUCTS or (node.op_type in CHEAP | MOVES and follows)
        if takes and computed and node.name not in kept and _takes(node.op_type, precision, opset):
            low.append(node)
            values.update(node.output)
    return low


@cache
def _takes(op_type: str, precision: Precision, opset: int) -> bool:
    """Whether the operator takes ``precision`` at ``opset``."""
    import onnx

    types = onnx.defs.get_schema(op_type, opset).outputs[0].types
    return f"tensor({PRECISIONS[precision].onnx_type.lower()})" in types


def _floats(model: onnx.ModelProto) -> frozenset[str]:
    import onnx

    types = inferred_types(model)
    return frozenset(name for name, one in types.items() if one.elem_type == onnx.TensorProto.FLOAT)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _weights_of(
    nodes: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Float constants of ``nodes``, weights as [K..., F]: the outputs of a product come last."""
    import onnx

    for node in nodes:
        transposed = node.op_type == "Conv" or any(one.name == "transB" and one.i for one in node.attribute)
        for name in node.input:
            if name in constants and constants[name].data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(constants[name])
                yield name, np.moveaxis(values, 0, -1) if transposed and values.ndim > 1 else values


def _fits(largest: float, precision: Precision) -> bool:
    info = _finfo(precision)
    return largest == 0 or float(info.tiny) * HEADROOM <= largest <= float(info.max) / HEADROOM


def _weights_fit(values: NDArray[np.float32], precision: Precision) -> bool:
    """By the norm of the rounding error of each output's weights; those of a bias are one group."""
    info = _finfo(precision)
    with np.errstate(over="ignore"):
        rounded = values.astype(info.dtype).astype(np.float32)
    axes = tuple(range(values.ndim - 1)) or None
    error = np.sqrt(((rounded - values) ** 2).sum(axis=axes))
    return bool((error <= float(info.eps) * np.sqrt((values**2).sum(axis=axes))).all())


def emulated_onnx(source: Path, target: Path) -> None:
    """Write the typed graph ``source`` as a float32 graph that rounds every value to its type, as hardware does.

    ONNX Runtime's CPU provider has no bfloat16 kernels, and runs float16 in float32 between casts that it removes, so
    an overflow of a GPU would pass. Any machine can run this graph. Products are summed in float32 and then rounded,
    as tensor cores and AMX do.

    Raises:
        CheckFailed: the graph does not pass ONNX's checker.
    """

    model = load_onnx(source)
    types = inferred_types(model)
    cast = {_elem_type(precision) for precision in REDUCED if not PRECISIONS[precision].quantized}
    small = {name: int(one.elem_type) for name, one in types.items() if one.elem_type in cast}
    emulated = copy_without_weights(model, nodes=False)
    for tensor in model.graph.initializer:
        emulated.graph.initializer.append(_widened(tensor) if tensor.name in small else tensor)
    for node in model.graph.node:
        _add_rounded(emulated.graph, node, small)
    save_onnx(emulated, target)
    validate_onnx(target)


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    import onnx

    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _add_rounded(graph: onnx.GraphProto, node: onnx.NodeProto, small: Mapping[str, int]) -> None:
    """Append ``node``; where its output is computed in a small type, round it there and back."""
    import onnx

    copy = graph.node.add()
    copy.CopyFrom(node)
    output = node.output[0]
    if node.op_type == "Cast" and node.input[0] in small:
        del copy.attribute[:]
        copy.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT))
    elif output in small and node.op_type not in MOVES:
        exact, rounded = f"{output}_exact", f"{output}_rounded"
        copy.output[0] = exact
        if node.op_type == "Cast":
            copy.op_type = "Identity"
            del copy.attribute[:]
        for given, made, to in ((exact, rounded, small[output]), (rounded, output, onnx.TensorProto.FLOAT)):
            graph.node.append(onnx.helper.make_node("Cast", [given], [made], to=to))


def _elem_type(precision: Precision) -> int:
    import onnx

    return int(onnx.TensorProto.DataType.Value(PRECISIONS[precision].onnx_type))


def _finfo(precision: Precision) -> Any:
    """NumPy's ``finfo`` for either type (``ml_dtypes`` comes with onnx)."""
    import ml_dtypes
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(_elem_type(precision))
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _suffix(elem_type: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()
