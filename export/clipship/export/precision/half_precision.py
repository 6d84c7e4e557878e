"""From the float32 graph to one with types: float16 or bfloat16 matrix products, everything delicate in float32.

A typed graph needs no builder flag: whoever reads it computes what it says. The rules, by operator:

- *products* (MatMul, Gemm, Conv, Attention) take and give the smaller type; their weights are stored in it;
- *cheap* operators between them (bias, GELU, the scale of attention) follow when every operand that is computed is of
  the smaller type, and *moves* (Reshape, Transpose, ...) when what they move is;
- all others stay float32: LayerNormalization, Softmax, the residual additions (one operand is the float32 stream), the
  normalisation of the pixels, the unit length.

Every value is cast at most once in each direction, and by these rules no cast undoes another. A node stays float32 when
its values on real images do not fit (:func:`unfit_nodes`), and when ONNX has no such operator for the type at its
opset (convolution takes bfloat16 from opset 22 on). The softmax inside an Attention node is the runtime's: its float32
attribute is one that TensorRT refuses.

ONNX Runtime's own converter (``onnxruntime.transformers.float16``) knows no bfloat16 and casts around every node it is
told to leave; NVIDIA's AutoCast brings a dozen packages and a GPU's. What is needed here is smaller than either.

Shape legend: N images, H = W pixels, K inputs and F outputs of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipship.export.onnx_graph import (
    METADATA_PRECISION,
    copy_without_weights,
    inferred_types,
    load_onnx,
    save_onnx,
    set_metadata,
    validate_onnx,
)
from clipship.export.precision.activation_ranges import magnitudes, validate_image_count

if TYPE_CHECKING:
    import onnx

SmallFloat = Literal["fp16", "bf16"]

HEADROOM = 8
"""Values up to an eighth of the type's largest are trusted: other images have larger values than those seen."""

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
CHEAP = frozenset({"Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Sigmoid", "Tanh", "Relu", "Swish"})
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Slice", "Split", "Flatten", "Identity"})
ANY = frozenset({"Shape", "Size", "Cast"})
"""Operators that read a value of any type without a cast."""


def typed_onnx(
    source: Path, target: Path, precision: SmallFloat, calibration_pixels: NDArray[np.uint8]
) -> tuple[str, ...]:
    """Write the float32 graph ``source`` with ``precision`` matrix products to ``target``.

    Input and output keep their names and types. ONNX Runtime and strongly typed TensorRT networks take the graph as it
    is: uint8 occurs at the input only, and a Cast follows it.

    Args:
        calibration_pixels: uint8 [N, H, W, 3], real images, N of 32 or more.

    Returns:
        The nodes that stay float32 because their values or weights do not fit into the type.

    Raises:
        DataError: fewer than 32 images.
        CheckFailed: the typed graph does not pass ONNX's checker.
    """
    validate_image_count(len(calibration_pixels))
    model = load_onnx(source)
    kept = unfit_nodes(model, precision, calibration_pixels, target.parent)
    typed = typed_model(model, precision, frozenset(kept))
    set_metadata(typed, {METADATA_PRECISION: precision})
    save_onnx(typed, target)
    validate_onnx(target)
    return kept


def unfit_nodes(
    model: onnx.ModelProto, precision: SmallFloat, pixels: NDArray[np.uint8], scratch: Path
) -> tuple[str, ...]:
    """Names of the nodes whose values on ``pixels`` or whose weights do not fit into ``precision``.

    Values do not fit when the largest is above an eighth of the type's largest (float16: 8188), or all of them are so
    small (float16: below 4.9e-4) that the type holds them with fewer digits. Weights do not fit when rounding changes
    those of any output by more than the type's relative step, as happens beyond its range at either end.
    """
    graph = model.graph
    floats, constants = _floats(model), _constants(graph)
    low = _low_nodes(model, floats, constants, precision, frozenset())
    values = {name for node in low for name in (*node.input, *node.output) if name in floats and name not in constants}
    largest = magnitudes(model, sorted(values), pixels, scratch)
    fits = {name: _fits(float(value), precision) for name, value in largest.items()}
    fits |= {name: _weights_fit(tensor, precision) for name, tensor in _weights_of(low, constants)}
    return tuple(node.name for node in low if not all(fits.get(name, True) for name in (*node.input, *node.output)))


def typed_model(model: onnx.ModelProto, precision: SmallFloat, kept: frozenset[str]) -> onnx.ModelProto:
    """``model`` with ``precision`` products, but for the nodes named in ``kept``. ``model`` is left as it is."""
    floats, constants = _floats(model), _constants(model.graph)
    low = _low_nodes(model, floats, constants, precision, kept)
    typed = copy_without_weights(model)
    del typed.graph.node[:]
    del typed.graph.value_info[:]
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
    """Writes nodes one after the other, with a cast or a typed copy of a constant before the first that needs it."""

    graph: onnx.GraphProto
    floats: frozenset[str]
    constants: Mapping[str, onnx.TensorProto]
    low_values: frozenset[str]
    """Computed values of the smaller type."""
    low_type: int
    made: dict[tuple[str, int], str]
    """The name under which a value is there in a type that it was not computed in."""

    def add(self, node: onnx.NodeProto, *, low: bool) -> None:
        """Append ``node``, its inputs in the type that it takes."""
        import onnx

        wanted = self.low_type if low else onnx.TensorProto.FLOAT
        inputs = [name if self._as_it_is(node, name) else self._as(name, wanted) for name in node.input]
        copy = self.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = inputs

    def _as_it_is(self, node: onnx.NodeProto, name: str) -> bool:
        return node.op_type in ANY and name not in self.constants

    def _as(self, name: str, elem_type: int) -> str:
        import onnx

        if name in self.constants:
            return self._constant(name, elem_type)
        have = self.low_type if name in self.low_values else onnx.TensorProto.FLOAT
        if name not in self.floats or have == elem_type:
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
            if key[1] == tensor.data_type:
                self.made[key] = name
                self.graph.initializer.append(tensor)
            else:
                self.made[key] = f"{name}_{_suffix(elem_type)}"
                values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
                self.graph.initializer.append(onnx.numpy_helper.from_array(values, self.made[key]))
        return self.made[key]


def _low_nodes(
    model: onnx.ModelProto,
    floats: frozenset[str],
    constants: Mapping[str, onnx.TensorProto],
    precision: SmallFloat,
    kept: frozenset[str],
) -> list[onnx.NodeProto]:
    """The nodes that compute in ``precision`` by the rules at the top of this file, ``kept`` ones left out."""
    allowed = _type_check(model, precision)
    low: list[onnx.NodeProto] = []
    values: set[str] = set()
    for node in model.graph.node:
        computed = [name for name in node.input if name in floats and name not in constants]
        follows = bool(computed) and all(name in values for name in computed)
        takes = node.op_type in PRODUCTS or (node.op_type in CHEAP | MOVES and follows)
        if takes and computed and node.name not in kept and allowed(node.op_type):
            low.append(node)
            values.update(node.output)
    return low


def _type_check(model: onnx.ModelProto, precision: SmallFloat) -> Callable[[str], bool]:
    """Whether an operator takes ``precision`` at the model's opset."""
    import onnx

    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    name = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[precision]

    def allowed(op_type: str) -> bool:
        schema = onnx.defs.get_schema(op_type, opset)
        return name in schema.outputs[0].types

    return allowed


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


def _fits(largest: float, precision: SmallFloat) -> bool:
    info = _finfo(precision)
    return largest == 0 or float(info.tiny) * HEADROOM <= largest <= float(info.max) / HEADROOM


def _weights_fit(values: NDArray[np.float32], precision: SmallFloat) -> bool:
    """By the norm of the rounding error of each output's weights; those of a bias are one group."""
    with np.errstate(over="ignore"):
        rounded = values.astype(_np_type(precision)).astype(np.float32)
    axes = tuple(range(values.ndim - 1)) or None
    error = np.sqrt(((rounded - values) ** 2).sum(axis=axes))
    return bool((error <= float(_finfo(precision).eps) * np.sqrt((values**2).sum(axis=axes))).all())


def emulated_onnx(source: Path, target: Path) -> None:
    """Write the typed graph ``source`` as a float32 graph that rounds every value as hardware of the type does.

    ONNX Runtime's CPU provider has no bfloat16 kernels, and runs float16 in float32 between casts that it removes: what
    overflows on a GPU passes there. So this graph is what can be checked on any machine. Products are summed in
    float32, as tensor cores and AMX do, and their results rounded.

    Raises:
        CheckFailed: the graph does not pass ONNX's checker.
    """

    model = load_onnx(source)
    types = inferred_types(model)
    small = {name: int(one.elem_type) for name, one in types.items() if one.elem_type in _small_types()}
    emulated = copy_without_weights(model)
    del emulated.graph.node[:]
    del emulated.graph.value_info[:]
    for tensor in model.graph.initializer:
        emulated.graph.initializer.append(_widened(tensor) if tensor.name in small else tensor)
    for node in model.graph.node:
        _add_rounded(emulated.graph, node, small)
    save_onnx(emulated, target)
    validate_onnx(target)


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    import onnx

    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _small_types() -> tuple[int, int]:
    return _elem_type("fp16"), _elem_type("bf16")


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


def _np_type(precision: SmallFloat) -> np.dtype[Any]:
    import onnx

    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(_elem_type(precision)))
    return dtype


def _elem_type(precision: SmallFloat) -> int:
    import onnx

    return int({"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision])


def _finfo(precision: SmallFloat) -> Any:
    """NumPy's ``finfo`` for either type (``ml_dtypes`` comes with onnx)."""
    import ml_dtypes

    return ml_dtypes.finfo(_np_type(precision))  # type: ignore[no-untyped-call]


def _suffix(elem_type: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()
