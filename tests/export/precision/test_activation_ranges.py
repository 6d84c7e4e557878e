"""What watches a graph's values stands where it costs no memory, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from clipship.export.precision.activation_ranges import insert_readers, magnitudes


def doubling_model(steps: int) -> onnx.ModelProto:
    """uint8 [N, 2, 2, 3] in; value ``v0`` is the input as float32, ``v1`` twice that, and so on."""
    nodes = [helper.make_node("Cast", ["pixels"], ["v0"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Add", [f"v{step}", f"v{step}"], [f"v{step + 1}"]) for step in range(steps)]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 2, 2, 3])
    last = helper.make_tensor_value_info(f"v{steps}", TensorProto.FLOAT, ["N", 2, 2, 3])
    graph = helper.make_graph(nodes, "doubling", [pixels], [last])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_readers_stand_behind_what_they_read() -> None:
    model = doubling_model(3)
    readers = {name: [helper.make_node("Abs", [name], [f"{name}_abs"])] for name in ("v2", "v0")}
    insert_readers(model.graph, readers)
    assert [node.output[0] for node in model.graph.node] == ["v0", "v0_abs", "v1", "v2", "v2_abs", "v3"]
    onnx.checker.check_model(model, full_check=True)


def test_a_value_that_nothing_makes_cannot_be_read() -> None:
    model = doubling_model(1)
    with pytest.raises(AssertionError, match="no node makes"):
        insert_readers(model.graph, {"gone": [helper.make_node("Abs", ["gone"], ["gone_abs"])]})


def test_magnitudes_of_inner_values(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (37, 2, 2, 3), np.uint8)  # the last batch is not full
    model = doubling_model(4)
    found = magnitudes(model, ["v3", "v1"], pixels, tmp_path)
    top = float(pixels.max())
    assert {name: float(value) for name, value in found.items()} == {"v3": 8 * top, "v1": 2 * top}
    by_feature = magnitudes(model, ["v2"], pixels, tmp_path, by_feature=True)["v2"]
    np.testing.assert_array_equal(by_feature, 4 * pixels.max(axis=(0, 1, 2)).astype(np.float32))
    assert len(model.graph.node) == 5, "the model given is left as it is"
    assert list(tmp_path.iterdir()) == []
