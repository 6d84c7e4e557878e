"""Typed graphs: what is of which type, what stays float32 and why, and that the numbers hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from clipship.core.errors import DataError
from clipship.core.precisions import Precision
from clipship.export.onnx_graph import load_onnx, save_onnx
from clipship.export.precision.half_precision import emulated_onnx, typed_model, typed_onnx
from clipship.export.reference import Picture, pixels_of
from clipship.training.model.clip import Clip
from tests.export.conftest import OPSETS, method_of
from tests.export.graphs import centred_cosines, features, image_encoder, value_types

ELEMENT = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT32_OPERATORS = {"LayerNormalization", "Softmax", "ReduceL2", "Clip"}
PROFILES = tuple(opset for opset in (18, 23) if opset in OPSETS)
TYPES: tuple[Precision, ...] = ("fp16", "bf16")
CASES = [(opset, precision) for opset in PROFILES for precision in TYPES]


@pytest.fixture(scope="module")
def pixels(clip: Clip, pictures: list[Picture]) -> NDArray[np.uint8]:
    return pixels_of(pictures[:40], clip.image_spec)


@pytest.fixture(scope="module")
def sources(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    method = method_of(clip, "sync-clip")
    return {opset: image_encoder(method, folder / f"{opset}.onnx", opset=opset) for opset in PROFILES}


@pytest.fixture(scope="module")
def typed(sources: dict[int, Path], pixels: NDArray[np.uint8]) -> dict[tuple[int, Precision], Path]:
    made = {}
    for opset, precision in CASES:
        made[opset, precision] = sources[opset].with_name(f"{opset}-{precision}.onnx")
        assert typed_onnx(sources[opset], made[opset, precision], precision, pixels) == ()
    return made


@pytest.mark.parametrize(("opset", "precision"), CASES)
def test_every_node_computes_in_the_type_that_the_rules_say(
    opset: int, precision: Precision, typed: dict[tuple[int, Precision], Path]
) -> None:
    target = typed[opset, precision]
    types, graph = value_types(target), onnx.load(target).graph
    small = ELEMENT[precision]
    for node in graph.node:
        given = {types[name] for name in (*node.input, *node.output)} & {TensorProto.FLOAT, small}
        if node.op_type in FLOAT32_OPERATORS:
            assert given == {TensorProto.FLOAT}, node.name
        elif node.op_type in ("MatMul", "Gemm", "Attention"):
            assert given == {small}, node.name
        elif node.op_type == "Conv":  # ONNX's convolution takes bfloat16 from opset 22 on
            assert given == {TensorProto.FLOAT if (opset, precision) == (18, "bf16") else small}
        elif node.op_type not in ("Cast", "Shape"):
            assert len(given) < 2, f"{node.name} mixes types"
    assert (types["image"], types["embedding"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    readers = {node.op_type for node in graph.node if "image" in node.input}
    assert readers <= {"Cast", "Shape"}, "TensorRT takes uint8 at the input only, and a cast must follow"


@pytest.mark.parametrize(("opset", "precision"), CASES)
def test_no_cast_is_made_twice_and_none_undoes_another(
    opset: int, precision: Precision, typed: dict[tuple[int, Precision], Path]
) -> None:
    graph = onnx.load(typed[opset, precision]).graph
    casts = [node for node in graph.node if node.op_type == "Cast"]
    made = {node.output[0] for node in casts}
    assert len({node.input[0] for node in casts}) == len(casts)
    assert not [node for node in casts if node.input[0] in made]
    blocks = 3
    # of a block: in and out of the attention, in and out of the MLP, and around the softmax where it is a node
    inside = 6 if opset == 18 else 4
    around = 1 + 2 * (2 - ((opset, precision) == (18, "bf16")))  # the pixels; the patches and the projection
    assert len(casts) == inside * blocks + around


@pytest.mark.parametrize(("opset", "precision"), CASES)
def test_the_features_are_close_and_the_rounding_is_real(
    opset: int,
    precision: Precision,
    sources: dict[int, Path],
    typed: dict[tuple[int, Precision], Path],
    pixels: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    path, emulated = typed[opset, precision], tmp_path / "emulated.onnx"
    emulated_onnx(path, emulated)
    expected, given = features(sources[opset], pixels), features(emulated, pixels)
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision]
    difference = np.abs(given - expected).max()
    assert step / 30 < difference < step, "rounded, and no more than that"
    assert centred_cosines(expected, given).min() > 0.99
    assert path.stat().st_size < 0.62 * sources[opset].stat().st_size
    if precision == "fp16":
        np.testing.assert_allclose(features(path, pixels), expected, atol=step)


def _with_outlier(clip: Clip) -> Clip:
    """One hidden unit of the second block's MLP beyond float16's range, its weights within."""
    model = copy.deepcopy(clip.model)
    mlp = model.visual.transformer.resblocks[1].mlp
    with torch.no_grad():
        mlp.c_fc.weight[5] *= 3e3
        mlp.c_fc.bias[5] = 6.5e4
        mlp.c_proj.weight[:, 5] *= 1e-5
    return replace(clip, model=model)


def test_massive_activations_break_plain_float16_and_not_ours(
    clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    source = image_encoder(method_of(_with_outlier(clip), "zero-shot"), tmp_path / "fp32.onnx")
    expected = features(source, pixels)
    plain, ours = tmp_path / "plain.onnx", tmp_path / "ours.onnx"
    save_onnx(typed_model(load_onnx(source), "fp16", frozenset()), plain)
    kept = typed_onnx(source, ours, "fp16", pixels)
    for path in (plain, ours):
        emulated_onnx(path, path.with_name(f"emulated-{path.name}"))
    assert np.isfinite(features(plain, pixels)).all(), (
        "ONNX Runtime's CPU provider computes in float32: it sees nothing"
    )
    assert not np.isfinite(features(tmp_path / "emulated-plain.onnx", pixels)).all()
    given = features(tmp_path / "emulated-ours.onnx", pixels)
    assert centred_cosines(expected, given).min() > 0.999
    operators = {node.name: node.op_type for node in onnx.load(source).graph.node}
    assert {operators[name] for name in kept} >= {"MatMul", "Add", "Erf"}, (
        "the bias, the GELU and the product behind it"
    )
    assert len(kept) < 10
    assert typed_onnx(source, tmp_path / "bf16.onnx", "bf16", pixels) == (), "bfloat16 has float32's range"


def test_weights_that_float16_loses_stay_float32(clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    model = copy.deepcopy(clip.model)
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_proj.weight[3] *= 1e-6  # float16 rounds such weights to nothing
    source = image_encoder(method_of(replace(clip, model=model), "zero-shot"), tmp_path / "fp32.onnx")
    kept = typed_onnx(source, tmp_path / "fp16.onnx", "fp16", pixels)
    assert len(kept) == 1
    node = next(one for one in onnx.load(source).graph.node if one.name == kept[0])
    assert node.op_type == "MatMul"


def test_calibration_needs_32_images(sources: dict[int, Path], pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration on 31 images: a reduced precision needs 32 or more"):
        typed_onnx(sources[18], tmp_path / "typed.onnx", "fp16", pixels[:31])
    assert list(tmp_path.iterdir()) == []
    typed_onnx(sources[18], tmp_path / "typed.onnx", "fp16", pixels[:32])
    assert [path.name for path in tmp_path.iterdir()] == ["typed.onnx"], "no scratch file stays"
