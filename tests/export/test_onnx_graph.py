"""Opset profiles, files of weights, metadata and the checks of a graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from clipship.core.bundle import Bundle, read_bundle
from clipship.core.errors import BundleError, CheckFailed
from clipship.core.images.decoding import ImageSpec
from clipship.core.tensors import TensorSpec
from clipship.core.vocabulary import Vocabulary
from clipship.export.onnx_graph import (
    onnx_from_module,
    since_opset,
    validate_onnx,
    validate_operators,
)
from clipship.export.pack import bundle_from_method
from clipship.export.precision.encoder_variants import Profile
from clipship.export.reference import Picture, image_features, pixels_of
from clipship.serving.repository.write import repository_from_bundle
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, OPSETS, RUNTIME, method_of
from tests.export.graphs import features, image_encoder

IR_VERSIONS = {18: 8, 20: 9, 23: 11}
BLOCKS = 3


@pytest.fixture(scope="module")
def graphs(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    method = method_of(clip, "sync-clip")
    return {opset: image_encoder(method, folder / f"{opset}.onnx", opset=opset) for opset in IR_VERSIONS}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("opset", [18, 20])
def test_gelu_is_pytorchs_and_its_exact_form_one_kernel(approximate: str, opset: int, tmp_path: Path) -> None:
    module, rows = nn.GELU(approximate=approximate), torch.linspace(-6, 6, 24).reshape(6, 4)
    spec = {name: TensorSpec(name=name, dtype="float32", shape=("batch", 4)) for name in ("x", "y")}
    path = tmp_path / "gelu.onnx"
    onnx_from_module(module, rows, path, input_spec=spec["x"], output_spec=spec["y"], metadata={}, opset=opset)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": rows.numpy()})[0], module(rows).numpy(), atol=2e-6)
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    if approximate == "none" and RUNTIME >= (1, 22):  # earlier ones do not know this order of operators
        assert kinds == {"Gelu"}


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_every_profile_gives_pytorchs_features(
    opset: int, graphs: dict[int, Path], clip: Clip, pictures: list[Picture]
) -> None:
    pixels = pixels_of(pictures[:9], clip.image_spec)
    expected = image_features(method_of(clip, "sync-clip"), pixels)
    if opset not in OPSETS:
        with pytest.raises(CheckFailed, match="ONNX Runtime cannot load it"):
            features(graphs[opset], pixels)
        return
    np.testing.assert_allclose(features(graphs[opset], pixels), expected, atol=1e-6)
    np.testing.assert_allclose(features(graphs[opset], pixels[:1]), expected[:1], atol=1e-6)


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_every_profile_has_its_own_operators_and_versions(opset: int, graphs: dict[int, Path]) -> None:
    model = onnx.load(graphs[opset])
    assert [(one.domain, one.version) for one in model.opset_import if one.domain == ""] == [("", opset)]
    assert model.ir_version == IR_VERSIONS[opset]
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Gelu"] == (BLOCKS if opset >= 20 else 0)
    assert counts["Erf"] == (0 if opset >= 20 else BLOCKS)
    assert counts["Attention"] == (BLOCKS if opset >= 23 else 0)
    assert counts["Softmax"] == (0 if opset >= 23 else BLOCKS)
    assert counts["LayerNormalization"] >= 2 * BLOCKS + 2
    assert not counts["Pow"] + counts["ReduceMean"], "a normalisation was taken apart"
    told = {prop.key: prop.value for prop in model.metadata_props}
    assert told["clipship.opset"] == str(opset)
    assert told["clipship.precision"] == "fp32"
    assert told["clipship.base_model"] == "small"
    assert told["clipship.version"][0].isdigit()


def test_an_operator_that_a_target_does_not_have_is_named_with_its_opset(graphs: dict[int, Path]) -> None:
    model = onnx.load(graphs[23])
    message = "TensorRT 10.3 does not know Attention, which opset 23 has: pack with --opset 20"
    with pytest.raises(CheckFailed, match=message):
        validate_operators(model, "TensorRT 10.3", opset=20)
    with pytest.raises(
        CheckFailed, match="Attention, which opset 23 has; Gelu, which opset 20 has: pack with --opset 18"
    ):
        validate_operators(model, "an old runtime", opset=19)
    validate_operators(model, "ONNX Runtime 1.23", opset=23)
    assert (since_opset("LayerNormalization"), since_opset("Nonsense")) == (17, None)


def test_an_operator_of_one_runtime_is_named(graphs: dict[int, Path]) -> None:
    model = onnx.load(graphs[18])
    model.graph.node.append(onnx.helper.make_node("FusedMatMul", ["a", "b"], ["c"], domain="com.microsoft"))
    with pytest.raises(
        CheckFailed, match=r"FusedMatMul of com\.microsoft, which is no ONNX operator: pack a variant of"
    ):
        validate_operators(model, "TensorRT", opset=18)


def test_a_graph_that_is_not_valid_is_refused(graphs: dict[int, Path], tmp_path: Path) -> None:
    model = onnx.load(graphs[18])
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    norm.input[0] = "image"  # uint8 pixels into a normalisation: only type inference can see it
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(CheckFailed, match=r"broken\.onnx is not valid ONNX"):
        validate_onnx(tmp_path / "broken.onnx")


@pytest.fixture(scope="module")
def split(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_from_method(
        method_of(clip, "coop"),
        Vocabulary(names=NAMES),
        pictures[:40],
        tmp_path_factory.mktemp("bundles") / "split",
        provenance={},
        profile=Profile(external_bytes=10_000, precisions=("fp16",)),
    )


def test_a_large_graph_keeps_its_weights_beside_it(split: Bundle, tmp_path: Path) -> None:
    weights = split.path / "image_encoder.onnx.data"
    graph = onnx.load(split.image_encoder, load_external_data=False).graph
    places = {entry.value for one in graph.initializer for entry in one.external_data if entry.key == "location"}
    assert places == {weights.name}
    assert weights.stat().st_size > 100_000 > split.image_encoder.stat().st_size
    assert {"image_encoder.onnx.data", "text_encoder.onnx.data"} <= set(split.files)
    golden = split.golden()
    np.testing.assert_allclose(features(split.image_encoder, golden.pixels), golden.embedding, atol=1e-5)
    np.testing.assert_allclose(
        features(split.path / "image_encoder.fp16.onnx", golden.pixels), golden.embedding, atol=1e-3
    )


def test_a_changed_weight_is_noticed(split: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(split.path, copy)
    data = bytearray((copy / "image_encoder.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "image_encoder.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"image_encoder\.onnx\.data has changed"):
        read_bundle(copy)


def test_a_repository_takes_the_weights_along(split: Bundle, tmp_path: Path) -> None:
    repository = repository_from_bundle(split, tmp_path / "repository", backend="onnxruntime")
    golden = split.golden()
    given = features(repository / "image_encoder" / "1" / "model.onnx", golden.pixels)
    np.testing.assert_allclose(given, golden.embedding, atol=1e-5)


def test_the_metadata_names_model_vocabulary_and_preprocessing(split: Bundle) -> None:
    import json

    told = {prop.key: prop.value for prop in onnx.load(split.image_encoder).metadata_props}
    assert told["clipship.base_model_digest"] == split.manifest.base_model_digest
    assert told["clipship.method"] == "coop"
    assert told["clipship.vocabulary_digest"] == split.vocabulary.digest
    assert ImageSpec.from_json(json.loads(told["clipship.image_spec"])) == split.image_spec
    half = {p.key: p.value for p in onnx.load(split.path / "image_encoder.fp16.onnx").metadata_props}
    assert half == {**told, "clipship.precision": "fp16"}
