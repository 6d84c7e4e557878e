"""From the float32 graph to one with int8 products: static Q/DQ, symmetric, calibrated on real images.

What is quantised: the products of tokens with weights (QKV, attention output, both of the MLP). Weights are int8 with
one scale for each output, activations int8 with one scale; every zero point is 0, which is all TensorRT takes. What
is not: the product of the patches, the two products inside attention, softmax, LayerNormalization, and all that comes
after the last LayerNormalization (the projection, an adapter).

Two steps keep the accuracy, and both are decided by calibration:

- A product behind a LayerNormalization shares the outliers of its input between activations and weights (SmoothQuant,
  Xiao et al. 2023, https://arxiv.org/abs/2211.10438): scale and bias of the normalisation are divided by what the
  weights are multiplied with, which changes nothing before rounding. It is left out where plain scales do better.
- Where that is not enough, the products that differ most from float32's stay float32, as few as will do.

Shape legend: N images, H = W pixels, K inputs and F outputs of a product, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.comparison import Comparison, compare_features, run_in_batches
from clipship.core.errors import CheckFailed
from clipship.core.tolerances import TOLERANCES
from clipship.export.onnx_graph import (
    METADATA_PRECISION,
    copy_without_weights,
    load_onnx,
    save_onnx,
    set_metadata,
    validate_onnx,
)
from clipship.export.precision.activation_ranges import (
    MIN_IMAGES,
    add_output,
    folded,
    insert_readers,
    magnitudes,
    validate_image_count,
    with_weights,
)
from clipship.export.saturation import INT8_MAX, int8_weights
from clipship.export.verification.runners import CPU_PROVIDER, onnx_session, session_function

if TYPE_CHECKING:
    import onnx

CALIBRATION_COUNT = 2 * MIN_IMAGES
"""Images that scales are taken from; more of them change the largest values little."""

_BATCH = 8
_SMOOTHING = 0.5
"""The share of an outlier's exponent that moves from activations to weights: the paper's alpha."""

_PROBE_PARTS = ("step", "zero", "weight", "q", "dq", "int8", "off", "e", "n")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of tokens [..., K] with a weight [K, F]."""

    node: str
    activation: str
    weight: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A float32 graph and what quantises it."""

    model: onnx.ModelProto
    products: tuple[Product, ...]
    largest: Mapping[str, NDArray[np.float32]]
    """By activation, the largest magnitude of each of its features, [K]."""


def quantized_onnx(source: Path, target: Path, calibration_pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    """Write the float32 graph ``source`` with int8 products to ``target``; input and output keep their names and types.

    Args:
        calibration_pixels: uint8 [N, H, W, 3], real images, N of 32 or more; 64 of them, spread evenly, are used.

    Returns:
        The products that stay float32 because int8 loses too much there; at most half of all. Whether the result is
        good enough is for :func:`clipship.core.comparison.verify_samples` to say.

    Raises:
        DataError: fewer than 32 images.
        CheckFailed: the graph does not pass ONNX's checker.
    """
    validate_image_count(len(calibration_pixels))
    count = min(len(calibration_pixels), CALIBRATION_COUNT)
    pixels = calibration_pixels[np.arange(count) * len(calibration_pixels) // count]
    expected = run_in_batches(session_function(onnx_session(source)), pixels, _BATCH)

    def trial(one: Calibrated, kept: tuple[str, ...] = ()) -> Comparison:
        _write(one, kept, target)
        return _compared(target, pixels, expected)

    plain = calibrated(plain_products(load_onnx(source)), pixels, target.parent)
    trials = [(one, trial(one)) for one in (smoothed(plain), plain)]
    best, verdict = max(trials, key=lambda pair: _closeness(pair[1]))
    kept = () if verdict else _fewest_kept(best, pixels, target.parent, partial(trial, best))
    _write(best, kept, target)
    validate_onnx(target)
    return kept


def _fewest_kept(
    one: Calibrated, pixels: NDArray[np.uint8], scratch: Path, passes: Callable[[tuple[str, ...]], Comparison]
) -> tuple[str, ...]:
    """The 1, 2, 4, ... products with the largest errors whose staying float32 is enough; at most half of all."""
    errors = product_errors(one, pixels, scratch)
    ranked = sorted(errors, key=lambda node: -errors[node])
    kept: tuple[str, ...] = ()
    count = 1
    while count <= len(ranked) // 2:
        kept = tuple(ranked[:count])
        if passes(kept):
            break
        count *= 2
    return kept


def _closeness(comparison: Comparison) -> float:
    """The mean centred cosine; -1 for features that are not numbers."""
    return -1.0 if comparison.problem else comparison.mean_centred_cosine


def _compared(path: Path, pixels: NDArray[np.uint8], expected: NDArray[np.float32]) -> Comparison:
    """The features of the graph at ``path`` within int8's tolerance; no classes are known here, none are compared."""
    tolerance = replace(TOLERANCES["int8"], top1_agreement=0.0)
    given = run_in_batches(session_function(onnx_session(path)), pixels, _BATCH)
    return compare_features(
        "calibration", CPU_PROVIDER, _BATCH, expected, given, references=expected, tolerance=tolerance
    )


def plain_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with every Gemm as a MatMul and an Add of three axes, which compute the same.

    (A Gemm's bias would have to be int32 for ONNX Runtime to run it in int8, and TensorRT takes no such bias; of a
    MatMul and an Add of two axes ONNX Runtime makes a Gemm again.)
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    plain = copy_without_weights(model, nodes=False)
    for node in model.graph.node:
        if node.op_type == "Gemm" and _is_plain(node, constants):
            constants |= {tensor.name: tensor for tensor in _add_product(plain.graph, node, constants)}
        else:
            plain.graph.node.append(node)
    _add_used(plain.graph, constants)
    return plain


def _is_plain(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    options = _options(node)
    unscaled = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
    return unscaled and node.input[1] in constants


def _options(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def _add_product(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> Iterator[onnx.TensorProto]:
    """Append the Gemm ``node`` as Unsqueeze, MatMul, Add and Squeeze; yields the constants they need."""
    import onnx

    weight_KF = onnx.numpy_helper.to_array(constants[node.input[1]])
    if _options(node).get("transB", 0):
        weight_KF = np.ascontiguousarray(weight_KF.T)
    name = node.name
    yield onnx.numpy_helper.from_array(weight_KF, f"{name}_weight")
    yield onnx.numpy_helper.from_array(np.zeros(1, np.int64), f"{name}_axes")
    axes, rows, product, sums = (f"{name}_{part}" for part in ("axes", "rows", "product", "sums"))
    biased = len(node.input) == 3
    steps = [
        ("Unsqueeze", [node.input[0], axes], rows, f"{name}_unsqueeze"),
        ("MatMul", [rows, f"{name}_weight"], product, name),
        *([("Add", [product, node.input[2]], sums, f"{name}_bias")] if biased else []),
        ("Squeeze", [sums if biased else product, axes], node.output[0], f"{name}_squeeze"),
    ]
    for op_type, inputs, output, label in steps:
        graph.node.append(onnx.helper.make_node(op_type, inputs, [output], name=label))


def products_of(graph: onnx.GraphProto) -> tuple[Product, ...]:
    """The products of tokens with weights between the first LayerNormalization and the last."""
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    norms = [position for position, node in enumerate(graph.node) if node.op_type == "LayerNormalization"]
    return tuple(
        Product(node=node.name, activation=node.input[0], weight=node.input[1], output=node.output[0])
        for node in graph.node[min(norms, default=0) : max(norms, default=0)]
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[0] not in weights
    )


def calibrated(model: onnx.ModelProto, pixels: NDArray[np.uint8], scratch: Path) -> Calibrated:
    """The products of ``model`` and how large what they take gets on ``pixels`` [N, H, W, 3].

    Raises:
        DataError: fewer than 32 images.
        CheckFailed: the model has no product that could be quantised.
    """
    products = products_of(model.graph)
    if not products:
        raise CheckFailed("the image encoder has no products of tokens with weights: pack it without int8")
    activations = list(dict.fromkeys(one.activation for one in products))
    largest = magnitudes(model, activations, pixels, scratch, by_feature=True)
    return Calibrated(model=model, products=products, largest=largest)


def smoothed(plain: Calibrated) -> Calibrated:
    """``plain`` with the outliers of normalised activations shared with the weights behind them; computes the same."""
    import onnx

    model = copy_without_weights(plain.model)
    constants = {tensor.name: tensor for tensor in plain.model.graph.initializer}
    readers = {node.name: node for node in model.graph.node}
    largest, products = dict(plain.largest), []
    for product in plain.products:
        norm = _norm_before(model.graph, product)
        if norm is not None:
            weight_KF = onnx.numpy_helper.to_array(constants[product.weight])
            factors_K = _factors(largest[product.activation], np.abs(weight_KF).max(axis=1))
            largest[product.activation] = largest[product.activation] / factors_K
            # Under names of their own: the exporter lets nodes share constants that are equal.
            _replace(readers[product.node], 1, weight_KF * factors_K[:, None], constants)
            for place in range(1, len(norm.input)):
                _replace(norm, place, onnx.numpy_helper.to_array(constants[norm.input[place]]) / factors_K, constants)
        products.append(replace(product, weight=readers[product.node].input[1]))
    _add_used(model.graph, constants)
    return Calibrated(model=model, products=tuple(products), largest=largest)


def _replace(
    node: onnx.NodeProto, place: int, values: NDArray[np.float32], constants: dict[str, onnx.TensorProto]
) -> None:
    """Give ``node`` a constant of its own as the input at ``place``."""
    import onnx

    name = f"{node.name}_smooth_{place}"
    constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
    node.input[place] = name


def _add_used(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto]) -> None:
    """Give ``graph`` those of ``constants`` that its nodes read."""
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)


def _factors(activation_K: NDArray[np.float32], weight_K: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each input of a product is divided by, 1 where the activation or the weights are always zero."""
    alive = (activation_K > 0) & (weight_K > 0)
    factors = np.where(alive, activation_K, 1) ** _SMOOTHING / np.where(alive, weight_K, 1) ** (1 - _SMOOTHING)
    return np.where(alive, factors, 1).astype(np.float32)


def _norm_before(graph: onnx.GraphProto, product: Product) -> onnx.NodeProto | None:
    """The LayerNormalization whose output goes to ``product`` and nowhere else, through nothing but transpositions."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    name = product.activation
    while readers[name] == 1 and name in makers:
        node = makers[name]
        if node.op_type == "LayerNormalization":
            return node
        order = _options(node).get("perm", [0]) if node.op_type == "Transpose" else [0]
        if order[-1] != len(order) - 1 or node.op_type != "Transpose":
            return None
        name = node.input[0]
    return None


def _write(one: Calibrated, kept: Collection[str], target: Path) -> None:
    """Write ``one`` to ``target`` with Q/DQ around all products but those of the nodes ``kept``."""
    written = copy_without_weights(one.model, nodes=False)
    writer = _Writer(graph=written.graph, constants={tensor.name: tensor for tensor in one.model.graph.initializer})
    products = {product.node: product for product in one.products if product.node not in kept}
    for node in one.model.graph.node:
        if node.name in products:
            product = products[node.name]
            writer.add_product(node, product, float(one.largest[product.activation].max()))
        else:
            written.graph.node.append(node)
    _add_used(written.graph, writer.constants)
    set_metadata(written, {METADATA_PRECISION: "int8"})
    save_onnx(written, target)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes Q/DQ nodes: QuantizeLinear and DequantizeLinear behind an activation, once, and DequantizeLinear behind
    weights that are int8 in the file. Other readers of an activation keep reading it as it is."""

    graph: onnx.GraphProto
    constants: dict[str, onnx.TensorProto]

    def add_product(self, node: onnx.NodeProto, product: Product, largest: float) -> None:
        """Append ``node`` between int8 operands; ``largest`` is the largest magnitude of its activation."""
        operands = [self._activation(product.activation, largest), self._weight(product.weight)]
        copy = type(node)()
        copy.CopyFrom(node)
        copy.input[:] = operands
        self.graph.node.append(copy)

    def _activation(self, name: str, largest: float) -> str:
        if self._constant(f"{name}_step", _step(largest)):
            zero = f"{name}_zero"
            self._constant(zero, np.zeros((), np.int8))
            self._node("QuantizeLinear", [name, f"{name}_step", zero], f"{name}_int8")
            self._node("DequantizeLinear", [f"{name}_int8", f"{name}_step", zero], f"{name}_dequantized")
        return f"{name}_dequantized"

    def _weight(self, name: str) -> str:
        import onnx

        weight_KF, steps_F = int8_weights(onnx.numpy_helper.to_array(self.constants[name]))
        if self._constant(f"{name}_int8", weight_KF):
            self._constant(f"{name}_steps", steps_F)
            self._node("DequantizeLinear", [f"{name}_int8", f"{name}_steps"], f"{name}_dequantized", axis=1)
        return f"{name}_dequantized"

    def _constant(self, name: str, values: NDArray[Any]) -> bool:
        """Whether it was not there yet."""
        import onnx

        if name in self.constants:
            return False
        self.constants[name] = onnx.numpy_helper.from_array(values, name)
        return True

    def _node(self, op_type: str, inputs: list[str], output: str, **options: int) -> None:
        import onnx

        self.graph.node.append(onnx.helper.make_node(op_type, inputs, [output], name=output, **options))


def product_errors(one: Calibrated, pixels: NDArray[np.uint8], scratch: Path) -> dict[str, float]:
    """By node, how far int8 moves its product from float32's on ``pixels``, relative to the product's length.

    Each alone, with exact inputs: what the node itself adds to the error of the features.
    """
    import onnx

    probe = with_weights(one.model)
    constants = {tensor.name: tensor for tensor in one.model.graph.initializer}
    names: list[str] = []
    readers = {}
    for product in one.products:
        weight = onnx.numpy_helper.to_array(constants[product.weight])
        readers[product.output] = _probe(probe.graph, product, weight, float(one.largest[product.activation].max()))
        names += [add_output(probe.graph, name) for node in readers[product.output][-2:] for name in node.output]
    insert_readers(probe.graph, readers)
    squares = np.array(folded(probe, names, pixels, scratch, np.add), np.float64).reshape(-1, 2)
    relative = np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], 1e-30))
    return {product.node: float(error) for product, error in zip(one.products, relative, strict=True)}


def _probe(
    graph: onnx.GraphProto, product: Product, weight_KF: NDArray[np.float32], top: float
) -> list[onnx.NodeProto]:
    """The product with rounded operands; the last two nodes give the squares of its error and of itself.

    Their constants are added to ``graph``.
    """
    import onnx

    int8_KF, steps_F = int8_weights(weight_KF)
    step, zero, weight, q, dq, int8, off, error, length = (f"{product.node}_{part}" for part in _PROBE_PARTS)
    constants = {step: _step(top), zero: np.zeros((), np.int8), weight: int8_KF * steps_F}
    graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in constants.items())
    make = onnx.helper.make_node
    return [
        make("QuantizeLinear", [product.activation, step, zero], [q]),
        make("DequantizeLinear", [q, step, zero], [dq]),
        make("MatMul", [dq, weight], [int8]),
        make("Sub", [int8, product.output], [off]),
        make("ReduceSumSquare", [off], [error], keepdims=0),
        make("ReduceSumSquare", [product.output], [length], keepdims=0),
    ]


def _step(largest: float) -> NDArray[np.float32]:
    """What one step of int8 is worth where the largest magnitude is ``largest``."""
    return np.array(max(largest, 1e-30) / INT8_MAX, np.float32)
