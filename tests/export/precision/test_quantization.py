"""int8 graphs: what is quantised and how, that nothing else is, and what calibration decides."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from clipship.core.errors import DataError
from clipship.core.machine.processor import this_processor
from clipship.export.onnx_graph import load_onnx, save_onnx
from clipship.export.precision.quantization import calibrated, plain_products, product_errors, quantized_onnx, smoothed
from clipship.export.reference import Picture, pixels_of
from clipship.training.model.clip import Clip
from tests.export.conftest import method_of
from tests.export.graphs import centred_cosines, features, image_encoder

BLOCKS = 3


@pytest.fixture(scope="module")
def pixels(clip: Clip, pictures: list[Picture]) -> NDArray[np.uint8]:
    return pixels_of(pictures[:40], clip.image_spec)


@pytest.fixture(scope="module")
def source(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoder(method_of(clip, "sync-clip"), tmp_path_factory.mktemp("graphs") / "fp32.onnx")


@pytest.fixture(scope="module")
def int8(source: Path, pixels: NDArray[np.uint8]) -> Path:
    target = source.with_name("int8.onnx")
    assert quantized_onnx(source, target, pixels) == ()
    return target


def test_the_products_of_tokens_with_weights_are_int8_and_nothing_else(int8: Path) -> None:
    graph = onnx.load(int8).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    quantised = [
        node
        for node in graph.node
        if node.op_type == "MatMul"
        and all(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input)
    ]
    assert len(quantised) == 4 * BLOCKS
    readers = {
        node.op_type
        for node in graph.node
        if {makers[n].op_type for n in node.input if n in makers} & {"DequantizeLinear"}
    }
    assert readers == {"MatMul"}
    for node in quantised:
        weight = makers[node.input[1]]
        stored, scales = constants[weight.input[0]], constants[weight.input[1]]
        assert stored.dtype == np.int8
        assert scales.shape == (stored.shape[1],), "one scale for each output"
        assert constants[makers[node.input[0]].input[1]].shape == (), "one scale for the activation"
    rounding = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[name] for node in rounding for name in node.input[2:]]
    assert len(zeros) == 2 * 4 * BLOCKS
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros), "TensorRT takes zero points of 0 only"


def test_onnx_runtime_runs_all_of_them_in_int8(int8: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["MatMulIntegerToFloat"] == 4 * BLOCKS
    assert counts["DequantizeLinear"] == 0


def test_the_features_are_close_and_the_rounding_is_real(
    source: Path, int8: Path, pixels: NDArray[np.uint8], tell_way: Callable[[str], None]
) -> None:
    expected, given = features(source, pixels), features(int8, pixels)
    cosines = centred_cosines(expected, given)
    sums = (
        "32 bits" if {"avx512_vnni", "avx_vnni", "amx_int8"} & {*this_processor().instruction_sets} else "16 bits first"
    )
    tell_way(f"8-bit products are added in {sums}: centred cosine {cosines.mean():.5f}")
    assert cosines.mean() >= 0.998
    assert np.abs(given - expected).max() > 1e-4
    assert int8.stat().st_size < 0.5 * source.stat().st_size


def test_plain_products_and_smoothing_compute_the_same(source: Path, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    plain = calibrated(plain_products(load_onnx(source)), pixels, tmp_path)
    smooth = smoothed(plain)
    assert "Gemm" not in {node.op_type for node in plain.model.graph.node}
    assert len(plain.products) == 4 * BLOCKS
    expected = features(source, pixels)
    for name, one in (("plain", plain), ("smooth", smooth)):
        path = tmp_path / f"{name}.onnx"
        save_onnx(one.model, path)
        np.testing.assert_allclose(features(path, pixels), expected, atol=2e-6)
    changed = [name for name in plain.largest if not np.array_equal(plain.largest[name], smooth.largest[name])]
    assert len(changed) == 2 * BLOCKS, "behind both normalisations of every block"


def _with_outlier(clip: Clip, factor: float) -> Clip:
    """One channel of the last block's second normalisation far above the others, and its weights far below."""
    model = copy.deepcopy(clip.model)
    block = model.visual.transformer.resblocks[-1]
    with torch.no_grad():
        block.ln_2.weight[7] *= factor
        block.ln_2.bias[7] *= factor
        block.mlp.c_fc.weight[:, 7] /= factor
    return replace(clip, model=model)


def test_smoothing_takes_outliers_of_normalised_activations_away(
    clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    source = image_encoder(method_of(_with_outlier(clip, 1000.0), "zero-shot"), tmp_path / "fp32.onnx")
    plain = calibrated(plain_products(load_onnx(source)), pixels, tmp_path)
    worst = max(product_errors(plain, pixels, tmp_path).items(), key=lambda pair: pair[1])
    assert worst[1] > 0.2
    assert product_errors(smoothed(plain), pixels, tmp_path)[worst[0]] < 0.03
    assert quantized_onnx(source, tmp_path / "int8.onnx", pixels) == ()
    assert centred_cosines(features(source, pixels), features(tmp_path / "int8.onnx", pixels)).mean() >= 0.998


def test_a_product_that_int8_cannot_hold_stays_float32_and_is_named(
    clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """An outlier of the hidden layer: no normalisation stands before it that could take it away."""
    model = copy.deepcopy(clip.model)
    mlp = model.visual.transformer.resblocks[1].mlp
    with torch.no_grad():
        mlp.c_fc.bias[5] = 6e3
        mlp.c_proj.weight[:, 5] *= 1e-5
    source = image_encoder(method_of(replace(clip, model=model), "zero-shot"), tmp_path / "fp32.onnx")
    kept = quantized_onnx(source, tmp_path / "int8.onnx", pixels)
    assert len(kept) == 1
    assert kept[0] in {node.name for node in onnx.load(source).graph.node}
    assert centred_cosines(features(source, pixels), features(tmp_path / "int8.onnx", pixels)).mean() >= 0.998


def test_calibration_needs_32_images(source: Path, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration on 31 images: a reduced precision needs 32 or more"):
        quantized_onnx(source, tmp_path / "int8.onnx", pixels[:31])
    assert list(tmp_path.iterdir()) == []
