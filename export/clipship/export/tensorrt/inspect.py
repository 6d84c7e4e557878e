"""What TensorRT made of an ONNX file, compared with what the file says, before anything is built.

A parser that skips a cast or widens a type would give a plan that is slow or wrong and looks well. A strongly typed
network must have the graph's types at every tensor, so that is what is compared: each tensor that has the same name on
both sides, the types at input and output, and the layers that must never leave float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipship.core.errors import CheckFailed, UsageError
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.tensors import TensorSpec
from clipship.export.onnx_graph import OPSET, inferred_types, opset_of, since_opset
from clipship.export.tensorrt.runtime import Loaded, deprecations_allowed

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION")
ALWAYS_FLOAT = ("NORMALIZATION", "SOFTMAX")

_TYPES = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}
"""TensorRT's name of an ONNX type; all others have the same name."""

_SHOWN = 3
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a parsed network."""

    name: str
    kind: str
    """TensorRT's ``LayerType``, e.g. "MATRIX_MULTIPLY"."""
    inputs: tuple[str, ...]
    """Types of its inputs, e.g. ("HALF", "HALF")."""
    outputs: Mapping[str, str]
    """Type by tensor name."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A parsed network beside its ONNX graph; true when they agree."""

    layers: Mapping[str, int]
    """Count by kind and output type, e.g. {"MATRIX_MULTIPLY HALF": 25}; helper layers of shapes (INT64) are in it."""
    compared: int
    """Tensors that have a name on both sides."""
    disagreements: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.disagreements

    def validate(self, what: str) -> None:
        """Validate that the network is what the graph says.

        Raises:
            CheckFailed: it is not; names the first few differences.
        """
        if not self:
            more = len(self.disagreements) - _SHOWN
            listed = "; ".join(self.disagreements[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise CheckFailed(f"the parsed network is not what {what} says, so no plan is built: {listed}")


def parse(loaded: Loaded, network: Any, onnx_path: Path) -> Any:
    """Fill ``network`` from the ONNX file; returns the parser, which owns weights and must live as long as the network.

    Raises:
        UsageError: an operator is not supported; names it with its node, its opset and since which opset it exists.
    """
    parser = loaded.trt.OnnxParser(network, loaded.logger)
    with deprecations_allowed():
        parsed = parser.parse_from_file(str(onnx_path))
    if not parsed:
        raise UsageError(f"{onnx_path.name}: {_refusal(loaded, parser, read_graph(onnx_path))}")
    return parser


def let_attention_decompose(loaded: Loaded, network: Any) -> None:
    """Allow each fused attention (ONNX ``Attention``, opset 23) to become several kernels where there is no fused one.

    There is none for float32, and without the permission the build fails. Where there is one, it is still taken.
    """
    for position in range(network.num_layers):
        layer = network.get_layer(position)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = loaded.trt.IAttentionInputLayer  # the bindings' way of a downcast
            layer.attention.decomposable = True


def inspect_network(
    network: Any, model: onnx.ModelProto, specs: tuple[TensorSpec, TensorSpec], precision: Precision
) -> Inspection:
    """Compare a parsed ``network`` with the graph ``model`` and with what a variant of ``precision`` promises."""
    layers = tuple(layers_of(network))
    expected = types_from_graph(model)
    found = {name: dtype for layer in layers for name, dtype in layer.outputs.items()}
    both = found.keys() & expected.keys()
    wrong = [
        f"{name} is {found[name]} instead of {expected[name]}" for name in sorted(both) if found[name] != expected[name]
    ]
    kinds = Counter(f"{layer.kind} {next(iter(layer.outputs.values()))}" for layer in layers)
    return Inspection(
        layers=dict(sorted(kinds.items())),
        compared=len(both),
        disagreements=(*_edge_problems(network, specs), *_promise_problems(layers, precision), *wrong),
    )


def layers_of(network: Any) -> Iterator[Layer]:
    """Every layer of ``network`` in order."""
    for position in range(network.num_layers):
        layer = network.get_layer(position)
        inputs = (layer.get_input(slot) for slot in range(layer.num_inputs))
        outputs = (layer.get_output(slot) for slot in range(layer.num_outputs))
        yield Layer(
            name=layer.name,
            kind=layer.type.name,
            inputs=tuple(tensor.dtype.name for tensor in inputs if tensor is not None),
            outputs={tensor.name: tensor.dtype.name for tensor in outputs},
        )


def read_graph(path: Path) -> onnx.ModelProto:
    """The ONNX file without external weights, which types do not depend on.

    Raises:
        UsageError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"{path}: is no ONNX file ({error}): pack the bundle again") from error


def types_from_graph(model: onnx.ModelProto) -> dict[str, str]:
    """The type of every value, in TensorRT's names, by ONNX's own type inference."""
    import onnx

    types = {name: tensor.elem_type for name, tensor in inferred_types(model).items()}
    names = {name: onnx.TensorProto.DataType.Name(number) for name, number in types.items()}
    return {name: _TYPES.get(dtype, dtype) for name, dtype in names.items()}


def _edge_problems(network: Any, specs: tuple[TensorSpec, TensorSpec]) -> Iterator[str]:
    """What is wrong at the network's inputs and outputs."""
    kinds = (("input", network.num_inputs, network.get_input), ("output", network.num_outputs, network.get_output))
    for (kind, count, get), spec in zip(kinds, specs, strict=True):
        found = [(tensor.name, tensor.dtype.name, tuple(tensor.shape)) for tensor in map(get, range(count))]
        shape = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
        wanted = [(spec.name, {"uint8": "UINT8", "float32": "FLOAT"}[spec.dtype], shape)]
        if found != wanted:
            yield f"the {kind} is {found} instead of {wanted}"


def _promise_problems(layers: tuple[Layer, ...], precision: Precision) -> Iterator[str]:
    """Every variant has LayerNorm and softmax in float32, and the products or Q/DQ layers that its precision names."""
    for layer in layers:
        types = {*layer.inputs, *layer.outputs.values()}
        if layer.kind in ALWAYS_FLOAT and not types <= {"FLOAT", "INT64", "INT32"}:
            yield f"{layer.kind} {layer.name} is {'/'.join(sorted(types))} instead of FLOAT"
    products = Counter(dtype for layer in layers if layer.kind in PRODUCTS for dtype in layer.outputs.values())
    spec = PRECISIONS[precision]
    wanted = _TYPES.get(spec.onnx_type, spec.onnx_type)
    if spec.quantized:  # the products are of the type of the dequantised values
        if not any(layer.kind == "QUANTIZE" for layer in layers):
            yield f"it has no QUANTIZE layer: this is no {precision} variant"
    elif not products[wanted]:
        found = ", ".join(products) or "absent"
        yield f"no matrix product is {wanted}, they are {found}: this is no {precision} variant"


def _refusal(loaded: Loaded, parser: Any, model: onnx.ModelProto) -> str:
    """Why the parser failed, as the end of a message."""
    who = f"{loaded.runtime.name} {loaded.version}"
    if not parser.num_errors:
        return f"{who} cannot read it ({loaded.why()}): check the file with clipship verify"
    error = parser.get_error(0)
    node = next((node for node in model.graph.node if node.name == error.node_name()), None)
    reason = " ".join(error.desc().split())
    if node is None:
        return f"{who} cannot read it ({reason}): check the file with clipship verify"
    since = since_opset(node.op_type) if node.domain in _STANDARD_DOMAINS else None
    where, way_out = _unknown_operator(node) if since is None else _late_operator(model, since)
    return f"{who} does not support operator {node.op_type} of node {node.name!r}, {where} ({reason}): {way_out}"


def _unknown_operator(node: onnx.NodeProto) -> tuple[str, str]:
    where = f"of the domain {node.domain or 'ai.onnx'!r}, which ONNX does not know"
    return where, "choose a variant of the bundle that any ONNX runtime can run (--precision)"


def _late_operator(model: onnx.ModelProto, since: int) -> tuple[str, str]:
    lower = f", with an opset below {since}" if since > OPSET else ""
    where = f"which ONNX has since opset {since}, in a graph of opset {opset_of(model)}"
    return where, f"pack the bundle again with this clipship{lower}"
