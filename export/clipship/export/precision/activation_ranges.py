"""How large the values inside a graph get on real images, which decides what fits into a smaller type.

Shape legend: N images, H = W pixels, F features of a value's last axis.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import DataError
from clipship.export.onnx_graph import copy_without_weights, inferred_types, save_onnx
from clipship.export.verification.runners import onnx_session

if TYPE_CHECKING:
    import onnx

MIN_IMAGES = 32
"""Fewer images miss the outliers that calibration is for."""

_BATCH = 8


def validate_image_count(count: int) -> None:
    """Validate that ``count`` images are enough to calibrate on.

    Raises:
        DataError: they are fewer than :data:`MIN_IMAGES`.
    """
    if count < MIN_IMAGES:
        raise DataError(
            f"calibration on {count} images: a reduced precision needs {MIN_IMAGES} or more: give --images a larger "
            "folder, or leave --images out to calibrate on the built-in world"
        )


def magnitudes(
    model: onnx.ModelProto, values: Sequence[str], pixels: NDArray[np.uint8], scratch: Path, *, by_feature: bool = False
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value that each of ``values`` takes on ``pixels`` [N, H, W, 3].

    The maxima are taken inside the graph, so that a batch's activations never leave ONNX Runtime.

    Args:
        values: names of float32 values inside the graph of ``model``.
        scratch: a writable folder; nothing stays in it.
        by_feature: a maximum for each feature of the last axis, [F], instead of one for the whole value, [].

    Raises:
        DataError: fewer than 32 images.
    """
    validate_image_count(len(pixels))
    watched = with_weights(model)
    types = inferred_types(model) if by_feature else {}
    names = _watch(watched.graph, values, {name: len(one.shape.dim) for name, one in types.items()})
    return dict(zip(values, folded(watched, names, pixels, scratch, np.maximum), strict=True))


def folded(
    model: onnx.ModelProto,
    outputs: Sequence[str],
    pixels: NDArray[np.uint8],
    scratch: Path,
    fold: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]],
) -> list[NDArray[np.float32]]:
    """``outputs`` of ``model`` on ``pixels`` [N, H, W, 3]; ``fold`` combines those of two batches."""
    from onnxruntime import ExecutionOrder

    path = scratch / f"{uuid.uuid4().hex}.onnx"
    files = save_onnx(model, path)
    found: list[NDArray[np.float32]] = []
    try:
        session = onnx_session(path, execution_order=ExecutionOrder.PRIORITY_BASED)  # by default readers run late
        feed = session.get_inputs()[0].name
        for start in range(0, len(pixels), _BATCH):
            batch = session.run(list(outputs), {feed: pixels[start : start + _BATCH]})
            found = [fold(*pair) for pair in zip(found, batch, strict=True)] if found else batch
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    return found


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` to which nodes and outputs can be added, without its own outputs."""
    copy = copy_without_weights(model)
    copy.graph.initializer.extend(model.graph.initializer)
    del copy.graph.output[:]
    return copy


def _watch(graph: onnx.GraphProto, values: Sequence[str], ranks: Mapping[str, int]) -> list[str]:
    """Add ``max(abs(value))`` of every value as an output; over all axes, or all but the last where ranks are given."""
    import onnx

    names, readers = [], {}
    for position, value in enumerate(values):
        absolute, name = f"clipship_abs_{position}", f"clipship_max_{position}"
        inputs = [absolute]
        if ranks:
            axes = np.arange(ranks[value] - 1, dtype=np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(axes, f"clipship_axes_{position}"))
            inputs.append(f"clipship_axes_{position}")
        readers[value] = [
            onnx.helper.make_node("Abs", [value], [absolute]),
            onnx.helper.make_node("ReduceMax", inputs, [name], keepdims=0),
        ]
        names.append(add_output(graph, name))
    insert_readers(graph, readers)
    return names


def insert_readers(graph: onnx.GraphProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Insert nodes that read a value right behind the node that makes it.

    At the end of the graph they would keep all their inputs in memory, over 20 GB of ViT-L/14.
    """
    ordered = []
    for node in graph.node:
        ordered.append(node)
        for name in node.output:
            ordered += readers.get(name, ())
    assert len(ordered) == len(graph.node) + sum(map(len, readers.values())), "a value that no node makes"
    arranged = type(graph)()
    arranged.node.extend(ordered)
    del graph.node[:]
    graph.node.extend(arranged.node)


def add_output(graph: onnx.GraphProto, name: str) -> str:
    """Make the float32 value ``name`` an output; returns ``name``."""
    import onnx

    graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return name
