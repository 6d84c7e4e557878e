"""Encoders on this machine's processors: the same numbers from every runtime, whatever the batch is cut into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clipship.core.cpu import (
    INSTRUCTION_SETS,
    OnnxRuntimeEncoder,
    OpenVinoEncoder,
    available_cores,
    open_encoder,
    processor,
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


EPYC = """processor\t: 0
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu sse2 fma avx avx2 sha_ni

processor\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu sse2 fma avx avx2 sha_ni
"""
XEON_FLAGS = "fma avx avx2 avx512f avx_vnni avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8 avx512_vnni_other"


def test_a_processor_is_told_by_its_name_and_what_decides_speed_and_sums(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(EPYC)
    found = processor(file)
    assert (found.name, found.instruction_sets) == ("AMD EPYC 7763 64-Core Processor", ("avx2", "fma"))
    cores = "1 core" if available_cores() == 1 else f"{available_cores()} cores"
    assert str(found) == f"AMD EPYC 7763 64-Core Processor, {cores}: avx2 fma"
    file.write_text(EPYC.replace("fma avx avx2", XEON_FLAGS))
    assert processor(file).instruction_sets == INSTRUCTION_SETS


def test_a_processor_that_linux_does_not_describe_so(tmp_path: Path) -> None:
    """ARM has features instead of flags, and mostly no name."""
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n")
    for path in (file, tmp_path / "absent"):
        found = processor(path)
        assert found.name
        assert found.instruction_sets == ()
        assert ": plain " in str(found)
