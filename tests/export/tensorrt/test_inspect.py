"""The parsed network against the graph: agreement in every precision, and each kind of difference seen."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.precisions import Precision
from clipship.core.tensors import TensorSpec, embedding_tensor, image_tensor
from clipship.export.precision.half_precision import typed_onnx
from clipship.export.precision.quantization import quantized_onnx
from clipship.export.reference import Picture, pixels_of
from clipship.export.tensorrt.build import variant_for
from clipship.export.tensorrt.inspect import Inspection, inspect_network, parse, read_graph, types_from_graph
from clipship.export.tensorrt.runtime import Loaded, typed_network
from tests.export.tensorrt.graphs import one_node_model

SPECS = (image_tensor(32), embedding_tensor(32))


def inspection_of(
    rtx: Loaded,
    path: Path,
    precision: Precision,
    *,
    says: Path | None = None,
    specs: tuple[TensorSpec, TensorSpec] = SPECS,
) -> Inspection:
    """Parse ``path`` and compare it with the graph in ``says`` (default: the same)."""
    network = typed_network(rtx, rtx.trt.Builder(rtx.logger))
    parser = parse(rtx, network, path)
    found = inspect_network(network, read_graph(says or path), specs, precision)
    del parser
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_network_is_what_the_graph_says(bundle: Bundle, rtx: Loaded, precision: Precision) -> None:
    path = bundle.path / variant_for(bundle, precision).file
    found = inspection_of(rtx, path, precision)
    assert found
    computed = sum(node.op_type not in ("Constant", "Identity") for node in onnx.load(path).graph.node)
    assert found.compared > 0.6 * computed  # TensorRT names the rest otherwise, or folds it
    found.validate("the graph")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_variants_that_pack_writes_are_read_as_they_are(
    bundle: Bundle, rtx: Loaded, pictures: list[Picture], tmp_path: Path, precision: Precision
) -> None:
    pixels = pixels_of(pictures[:32], bundle.image_spec)
    path = tmp_path / "variant.onnx"
    if precision == "int8":
        quantized_onnx(bundle.image_encoder, path, pixels)
    else:
        assert precision != "fp32"
        typed_onnx(bundle.image_encoder, path, precision, pixels)
    found = inspection_of(rtx, path, precision)
    assert found.disagreements == ()
    assert found.compared > 100


def test_a_parser_that_changes_types_is_seen(bundle: Bundle, rtx: Loaded) -> None:
    """The network of the float16 variant stands in for what a parser might make of the float32 one."""
    wrong = inspection_of(rtx, bundle.path / "image_encoder.fp16.onnx", "fp16", says=bundle.image_encoder)
    assert wrong  # the casts are around the products: tensors of the float32 graph are float32 here, too
    other = inspection_of(rtx, bundle.path / "image_encoder.fp16.onnx", "bf16")
    assert not other
    with pytest.raises(CheckFailed, match=r"no matrix product is BF16, they are .*HALF"):
        other.validate("image_encoder.onnx")


def test_a_tensor_of_another_type_is_named(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    model = onnx.load(bundle.path / "image_encoder.fp16.onnx")
    node = next(node for node in model.graph.node if node.op_type == "Cast" and node.name.endswith(".cast"))
    node.attribute[0].i = onnx.TensorProto.BFLOAT16
    says = tmp_path / "says.onnx"
    onnx.save(model, says)
    found = inspection_of(rtx, bundle.path / "image_encoder.fp16.onnx", "fp16", says=says)
    assert f"{node.output[0]} is HALF instead of BF16" in found.disagreements


def test_other_edges_are_named(bundle: Bundle, rtx: Loaded) -> None:
    found = inspection_of(rtx, bundle.image_encoder, "fp32", specs=(image_tensor(224), embedding_tensor(32)))
    assert found.disagreements == (
        "the input is [('image', 'UINT8', (-1, 32, 32, 3))] instead of [('image', 'UINT8', (-1, 224, 224, 3))]",
    )


def test_layernorm_and_softmax_in_half_precision_are_refused(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    model = onnx.load(bundle.image_encoder)
    half = onnx.TensorProto.FLOAT16
    for kind in ("LayerNormalization", "Softmax"):
        node = next(node for node in model.graph.node if node.op_type == kind)
        at = list(model.graph.node).index(node)
        casts = [
            onnx.helper.make_node("Cast", [name], [f"{node.name}.{slot}"], name=f"{node.name}.{slot}", to=half)
            for slot, name in enumerate(node.input)
        ]
        up = onnx.helper.make_node("Cast", [f"{node.name}.out"], [node.output[0]], name=f"{node.name}.up", to=1)
        node.input[:] = [cast.output[0] for cast in casts]
        node.output[:] = [f"{node.name}.out"]
        nodes = [*model.graph.node[:at], *casts, node, up, *model.graph.node[at + 1 :]]
        copies = [onnx.NodeProto.FromString(one.SerializeToString()) for one in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
    path = tmp_path / "half.onnx"
    onnx.save(model, path)
    found = inspection_of(rtx, path, "fp32")
    assert len(found.disagreements) == 2
    assert all(" is HALF instead of FLOAT" in reason for reason in found.disagreements)


def test_a_variant_without_its_layers_is_refused(bundle: Bundle, rtx: Loaded) -> None:
    assert "no QUANTIZE layer" in inspection_of(rtx, bundle.image_encoder, "int8").disagreements[0]


@pytest.mark.parametrize(
    ("operator", "domain", "opset", "message"),
    [
        ("Det", "", 18, "operator Det of node 'the_node', which ONNX has since opset 11, in a graph of opset 18"),
        ("Hann", "", 18, "operator Hann of node 'the_node', of the domain 'ai.onnx', which ONNX does not know"),
        ("FusedMatMul", "com.microsoft", 18, "domain 'com.microsoft', which ONNX does not know .* choose a variant"),
        ("ImageDecoder", "", 20, "since opset 20, in a graph of opset 20 .*with an opset below 20"),
    ],
)
def test_an_unsupported_operator_is_named_with_its_opset(
    rtx: Loaded, tmp_path: Path, operator: str, domain: str, opset: int, message: str
) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(one_node_model(operator, domain, opset))
    with pytest.raises(UsageError, match=message):
        inspection_of(rtx, path, "fp32")


def test_a_file_that_is_no_graph(rtx: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x00\x01noise")
    with pytest.raises(UsageError, match="is no ONNX file"):
        inspection_of(rtx, path, "fp32")


def test_uint8_may_only_meet_a_cast(rtx: Loaded, bundle: Bundle) -> None:
    """Why the encoder casts before it transposes: TensorRT refuses uint8 anywhere else."""
    (first,) = (
        node for node in onnx.load(bundle.image_encoder).graph.node if "image" in node.input and node.op_type != "Shape"
    )
    assert first.op_type == "Cast"


def test_types_come_from_the_graph(bundle: Bundle) -> None:
    model = read_graph(bundle.path / "image_encoder.fp16.onnx")
    types = types_from_graph(model)
    assert types["image"] == "UINT8"
    assert types["embedding"] == "FLOAT"
    products = sum(node.op_type == "MatMul" for node in model.graph.node)
    assert sum(dtype == "HALF" for dtype in types.values()) == 3 * products  # two operands and a result of each
