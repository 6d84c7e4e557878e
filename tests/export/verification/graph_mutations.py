"""Mistakes that exports make, as edits of a right ONNX graph: every one must be noticed by ``verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Saboteur = Callable[[onnx.ModelProto], None]


def sabotaged(path: Path, saboteur: Saboteur, out: Path) -> Path:
    """The graph at ``path`` with ``saboteur``'s mistake, written to ``out``."""
    model = onnx.load(path)
    before = model.SerializeToString()
    saboteur(model)
    assert model.SerializeToString() != before, "nothing was sabotaged"
    onnx.checker.check_model(model)
    onnx.save(model, out)
    return out


def _nodes(operators: str, names: Mapping[str, str], prefix: str) -> list[onnx.NodeProto]:
    """Nodes written as ``result = Operator(operand, ...) key=value``; inner names get ``prefix``."""
    made = []
    for line in operators.strip().splitlines():
        result, _, call = line.strip().partition(" = ")
        kind, _, rest = call.partition("(")
        operands, _, attributes = rest.partition(")")
        given: dict[str, Any] = {
            key: int(value) for key, _, value in (pair.partition("=") for pair in attributes.split())
        }
        inputs = [names.get(name.strip(), prefix + name.strip()) for name in operands.split(",")]
        made.append(helper.make_node(kind, inputs, [names.get(result, prefix + result)], **given))
    return made


def _constants(model: onnx.ModelProto, prefix: str, values: Mapping[str, NDArray[Any]]) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(value, prefix + name) for name, value in values.items())


def replace_node(model: onnx.ModelProto, old: onnx.NodeProto, operators: str, **values: NDArray[Any]) -> None:
    """Put ``operators`` in the place of ``old``; x, y, z are its inputs, ``out`` its output."""
    prefix = f"sabotage_{old.output[0]}_"
    names = dict(zip("xyz", old.input, strict=False)) | {"out": old.output[0]}
    _constants(model, prefix, values)
    position = list(model.graph.node).index(old)
    model.graph.node.remove(old)
    for node in reversed(_nodes(operators, names, prefix)):
        model.graph.node.insert(position, node)


def change_input(model: onnx.ModelProto, operators: str, **values: NDArray[Any]) -> None:
    """Everybody who read the image reads ``out`` instead, made of ``image``."""
    name = model.graph.input[0].name
    _constants(model, "sabotage_", values)
    for node in model.graph.node:
        node.input[:] = ["sabotage_out" if one == name else one for one in node.input]
    for node in reversed(_nodes(operators, {"image": name}, "sabotage_")):
        model.graph.node.insert(0, node)


def change_output(model: onnx.ModelProto, operators: str, **values: NDArray[Any]) -> None:
    """The output becomes ``out``, made of what it was, ``x``."""
    name = model.graph.output[0].name
    _constants(model, "sabotage_", values)
    for node in model.graph.node:
        node.output[:] = ["sabotage_x" if one == name else one for one in node.output]
    model.graph.node.extend(_nodes(operators, {"out": name}, "sabotage_"))


def _of_kind(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    found = [node for node in model.graph.node if node.op_type == kind]
    assert found, f"the graph has no {kind}"
    return found


def tanh_gelu(model: onnx.ModelProto) -> None:
    """erf(z) by the tanh formula of the "approximate" GELU."""
    for node in _of_kind(model, "Erf"):
        replace_node(
            model,
            node,
            """
            square = Mul(x, x)
            cube = Mul(square, x)
            third = Mul(cube, a)
            sum = Add(x, third)
            scaled = Mul(sum, b)
            out = Tanh(scaled)
            """,
            a=np.array(2 * 0.044715, np.float32),
            b=np.array(2 / np.sqrt(np.pi), np.float32),
        )


def quick_gelu(model: onnx.ModelProto) -> None:
    """x sigmoid(1.702 x) for x Phi(x): OpenAI's GELU in a model that was trained with the other one."""
    for node in _of_kind(model, "Erf"):
        replace_node(model, node, "scaled = Mul(x, a)\nout = Tanh(scaled)", a=np.array(1.702 / np.sqrt(2), np.float32))


def shifted_crop(model: onnx.ModelProto) -> None:
    """The crop one pixel too low."""
    height = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    rows = np.minimum(np.arange(height) + 1, height - 1)
    change_input(model, "out = Gather(image, rows) axis=1", rows=rows)


def bgr(model: onnx.ModelProto) -> None:
    change_input(model, "out = Gather(image, order) axis=3", order=np.array([2, 1, 0]))


def no_pixel_normalisation(model: onnx.ModelProto) -> None:
    """Scaled to 0..1, but neither mean nor standard deviation."""
    _of_shape(model, (3, 1, 1), lambda values, position: np.full_like(values, position))


def swapped_mean_and_std(model: onnx.ModelProto) -> None:
    arrays = [numpy_helper.to_array(one) for one in model.graph.initializer if tuple(one.dims) == (3, 1, 1)]
    _of_shape(model, (3, 1, 1), lambda values, position: arrays[1 - position])


def no_unit_length(model: onnx.ModelProto) -> None:
    """The last division left out."""
    (last,) = [node for node in model.graph.node if node.output[0] == model.graph.output[0].name]
    assert last.op_type == "Div"
    last.op_type = "Identity"
    del last.input[1]


def transposed_head(model: onnx.ModelProto) -> None:
    """The projection [width, D] read as [D, width] and reshaped, as a wrong memory order does."""
    (head,) = [one for one in model.graph.initializer if one.name.endswith("visual.proj")]
    values = numpy_helper.to_array(head)
    head.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.T).reshape(values.shape), head.name))


def dropped_positions(model: onnx.ModelProto) -> None:
    """No positional embedding."""
    for one in model.graph.initializer:
        if one.name.endswith("positional_embedding"):
            one.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(one)), one.name))


def half_weights(model: onnx.ModelProto) -> None:
    """All weights through float16, in a variant that says it is float32."""
    for one in model.graph.initializer:
        if one.data_type == TensorProto.FLOAT and len(one.dims) > 1:
            rounded = numpy_helper.to_array(one).astype(np.float16).astype(np.float32)
            one.CopyFrom(numpy_helper.from_array(rounded, one.name))


def reversed_batch(model: onnx.ModelProto) -> None:
    """Answers in the wrong order: right at batch 1."""
    change_output(
        model,
        "out = Slice(x, first, last, axis, step)",
        first=np.array([-1]),
        last=np.array([np.iinfo(np.int64).min]),
        axis=np.array([0]),
        step=np.array([-1]),
    )


def leaking_batch(model: onnx.ModelProto) -> None:
    """Each answer holds a little of its neighbours': right at batch 1."""
    change_output(
        model,
        """
        mean = ReduceMean(x, axis) keepdims=1
        away = Sub(x, mean)
        part = Mul(away, amount)
        moved = Add(x, part)
        length = ReduceL2(moved, one) keepdims=1
        out = Div(moved, length)
        """,
        axis=np.array([0]),
        one=np.array([1]),
        amount=np.array(0.5, np.float32),
    )


def first_of_the_batch(model: onnx.ModelProto) -> None:
    """From the 33rd row of a batch on, the first row's answer: right at batches 1, 2 and 7."""
    change_output(
        model,
        """
        shape = Shape(x)
        count = Gather(shape, zero) axis=0
        rows = Range(zero, count, one)
        late = Greater(rows, limit)
        chosen = Where(late, zero, rows)
        out = Gather(x, chosen) axis=0
        """,
        zero=np.array(0),
        one=np.array(1),
        limit=np.array(32),
    )


def fixed_batch(model: onnx.ModelProto) -> None:
    """A batch of one baked in: fails at any other."""
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    change_output(model, "out = Reshape(x, shape)", shape=np.array([1, dim]))


def not_a_number(model: onnx.ModelProto) -> None:
    """NaN wherever a value is negative."""
    change_output(model, "out = Sqrt(x)")


def half_layer_norm(model: onnx.ModelProto) -> None:
    """LayerNorm taken apart and computed in float16: squares of more than 255 overflow."""
    for node in _of_kind(model, "LayerNormalization"):
        _half_layer_norm(model, node)


def _half_layer_norm(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    steps = {
        "mean": "ReduceMean(x16, axis) keepdims=1",
        "away": "Sub(x16, mean16)",
        "square": "Mul(away16, away16)",
        "variance": "ReduceMean(square16, axis) keepdims=1",
    }
    lines = [f"cast_x = Cast(x) to={half}", f"x16 = Cast(cast_x) to={full}"]
    for name, step in steps.items():  # each result through float16, so that no runtime can leave the casts out
        lines += [
            f"{name} = {step}",
            f"cast_{name} = Cast({name}) to={half}",
            f"{name}16 = Cast(cast_{name}) to={full}",
        ]
    lines += ["safe = Add(variance16, epsilon)", "deviation = Sqrt(safe)", "unit = Div(away16, deviation)"]
    lines += ["scaled = Mul(unit, y)", "out = Add(scaled, z)"]
    replace_node(model, node, "\n".join(lines), axis=np.array([-1]), epsilon=np.array(1e-5, np.float32))


def _of_shape(
    model: onnx.ModelProto, shape: tuple[int, ...], change: Callable[[NDArray[Any], int], NDArray[Any]]
) -> None:
    """The mean (position 0) and the standard deviation (1) of the pixels."""
    found = [one for one in model.graph.initializer if tuple(one.dims) == shape]
    assert len(found) == 2
    for position, one in enumerate(found):
        one.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(one), position), one.name))
