"""Encoders on this machine's processors: the same numbers from every runtime, whatever the batch is cut into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clipship.core.machine.runtimes import (
    OnnxRuntimeEncoder,
    OpenVinoEncoder,
    available_cores,
    open_encoder,
)

WEIGHTS = np.random.default_rng(3).normal(size=(12, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """uint8 [N, 2, 2, 3] -> float32 [N, 5]: a product, so that a mixed-up part would be seen."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 2, 2, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(np.array([-1, 12]), "shape"), numpy_helper.from_array(WEIGHTS, "weights")],
    )
    file: Path = tmp_path_factory.mktemp("cpu") / "encoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), file)
    return str(file)


def _pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_every_batch_size(path: str, runtime: str, cores: int) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    run = open_encoder(path, runtime, "fp32", cores)
    for count in (1, 2, 3, 7, 2):
        pixels = _pixels(count)
        np.testing.assert_allclose(run(pixels), pixels.reshape(count, 12) @ WEIGHTS, rtol=1e-5)


def test_an_answer_stays_as_it_is_when_the_next_one_is_computed(path: str) -> None:
    pytest.importorskip("openvino")
    run = OpenVinoEncoder(path, "fp32", 2)
    first = run(_pixels(3))
    kept = first.copy()
    run(_pixels(4)[:3])
    np.testing.assert_array_equal(first, kept)


def test_it_takes_the_cores_that_it_may_use(path: str) -> None:
    assert OnnxRuntimeEncoder(path).session.get_session_options().intra_op_num_threads == available_cores()
    assert OnnxRuntimeEncoder(path, 3).session.get_session_options().intra_op_num_threads == 3
    assert available_cores() >= 1


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(Exception, match=r"broken\.onnx"):
        open_encoder(str(broken), "onnxruntime", "fp32")
