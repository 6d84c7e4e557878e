"""8-bit products that cannot saturate on any processor, and an emulation of those that can.

x86-64 processors without VNNI (AVX2, and AVX-512 before Cascade Lake) multiply 8-bit numbers with VPMADDUBSW (Intel's
Software Developer's Manual, volume 2): the products of two neighbouring inputs are added into 16 bits *with
saturation*. A sum beyond 32767 becomes 32767, and features are silently wrong. The kernels of ONNX Runtime and of
oneDNN, which OpenVINO uses, both pair inputs 2i and 2i + 1, and both take unsigned activations: an int8 activation x
becomes x + 128, from 0 to 255.

So weights are safe when the magnitudes of equal sign in every pair add up to at most 128: 255 * 128 = 32640. (Weights
of 7 bits are safe, too, but coarser: few columns have their two largest weights side by side.) No other quantiser that
we know makes such weights; NVIDIA ModelOpt's are not pair-safe, and it needs PyTorch and a GPU's packages.

Legend: N images, M rows, K inputs and F outputs of a product, H = W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.machine.runtimes import Run
from clipship.export.onnx_graph import copy_without_weights, load_onnx

if TYPE_CHECKING:
    import onnx

INT8_MAX = 127
_OFFSET = 128  # of a signed activation among unsigned ones
_INT16 = np.iinfo(np.int16)
_MOST_OF_A_PAIR = _INT16.max // (INT8_MAX + _OFFSET)  # 128
_EXACT_INPUTS = 1024  # so many products of two int8 numbers add up exactly in float32
_DOMAIN, _PRODUCT = "clipship.emulation", "SaturatingMatMul"


def int8_weights(weight_KF: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights as int8 [K, F] that cannot saturate, and the size [F] of each column's step, above 0.

    Two magnitudes that add up to 127 steps before rounding add up to at most 128 after it.
    """
    steps_F = np.maximum(_pair_sums(weight_KF).max(axis=0), 1e-30) / INT8_MAX
    return np.round(weight_KF / steps_F).astype(np.int8), steps_F.astype(np.float32)


def can_saturate(weight_KF: NDArray[np.int8]) -> NDArray[np.bool_]:
    """The pairs of inputs, [K / 2, F], that some activations would saturate."""
    result: NDArray[np.bool_] = _pair_sums(weight_KF.astype(np.int16)) > _MOST_OF_A_PAIR
    return result


def graph_can_saturate(path: Path) -> bool:
    """Whether any product of the int8 graph at ``path`` could saturate for some input."""
    import onnx

    stored = (tensor for tensor in load_onnx(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8)
    weights = (onnx.numpy_helper.to_array(tensor) for tensor in stored if len(tensor.dims) == 2)
    return any(can_saturate(weight_KF).any() for weight_KF in weights)


def _pair_sums(weight_KF: NDArray[Any]) -> NDArray[Any]:
    """[K / 2, F]: the larger of a pair's sum of positive and sum of negative weights."""
    pairs = _in_pairs(weight_KF)
    sums: NDArray[Any] = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1))
    return sums


def _in_pairs(weight_KF: NDArray[Any]) -> NDArray[Any]:
    """[K / 2, 2, F]; an odd last row gets zeros beside it."""
    even = np.pad(weight_KF, ((0, len(weight_KF) % 2), (0, 0)))
    return even.reshape(-1, 2, weight_KF.shape[1])


def saturating_product(x_MK: NDArray[np.int8], weight_KF: NDArray[np.int8]) -> NDArray[np.float64]:
    """``x @ weight`` [M, F] in whole numbers, as a processor without VNNI adds them up."""
    sums_MF = _exact_product(x_MK, weight_KF)
    unsigned_MK = np.pad(x_MK.astype(np.int32) + _OFFSET, ((0, 0), (0, len(weight_KF) % 2)))
    pairs, risky = _in_pairs(weight_KF), can_saturate(weight_KF)
    for pair in np.flatnonzero(risky.any(axis=1)):
        columns = np.flatnonzero(risky[pair])
        of_pair = unsigned_MK[:, 2 * pair : 2 * pair + 2] @ pairs[pair][:, columns].astype(np.int32)
        sums_MF[:, columns] -= of_pair - np.clip(of_pair, _INT16.min, _INT16.max)
    return sums_MF


def _exact_product(x_MK: NDArray[np.int8], weight_KF: NDArray[np.int8]) -> NDArray[np.float64]:
    sums_MF = np.zeros((len(x_MK), weight_KF.shape[1]))
    for start in range(0, len(weight_KF), _EXACT_INPUTS):
        rows = slice(start, start + _EXACT_INPUTS)
        sums_MF += x_MK[:, rows].astype(np.float32) @ weight_KF[rows].astype(np.float32)
    return sums_MF


def emulated_int8(path: Path) -> Run:
    """The int8 graph at ``path`` as a function of its input, computed by NumPy with sums that saturate.

    ONNX's reference implementation computes what stays float32. It is slow: use it for a few images.
    """
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(_with_saturating_products(load_onnx(path)), new_ops=_operators())

    def run(rows: NDArray[Any]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = evaluator.run(None, {evaluator.input_names[0]: rows})[0]
        return result

    return run


def _operators() -> list[Any]:
    """The saturating product, and operators that the reference lacks at our opset or computes one by one."""
    from onnx.reference.op_run import OpRun
    from scipy.special import erf

    def product(_self: Any, x: Any, weight_KF: Any, step: Any, steps_F: Any) -> tuple[NDArray[np.float32]]:
        sums_MF = saturating_product(x.reshape(-1, x.shape[-1]), weight_KF)
        return ((sums_MF * (step * steps_F)).astype(np.float32).reshape(*x.shape[:-1], -1),)

    def quantize(_self: Any, x: Any, step: Any, zero: Any, **_options: Any) -> tuple[NDArray[np.int8]]:
        assert zero.dtype == np.int8, "the graph is ours"
        assert not zero.any(), "the graph is ours"
        return (np.clip(np.rint(x / step), -_OFFSET, INT8_MAX).astype(np.int8),)

    def dequantize(_self: Any, x: Any, steps: Any, *_zero: Any, **_options: Any) -> tuple[NDArray[np.float32]]:
        return (x.astype(np.float32) * steps,)  # by column or all alike

    def error_function(_self: Any, x: Any) -> tuple[NDArray[np.float32]]:
        return (erf(x).astype(x.dtype),)

    runs = {"QuantizeLinear": quantize, "DequantizeLinear": dequantize, "Erf": error_function}
    own = [type(name, (OpRun,), {"op_domain": "", "_run": run}) for name, run in runs.items()]
    return [*own, type(_PRODUCT, (OpRun,), {"op_domain": _DOMAIN, "_run": product})]


def _with_saturating_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with a node of ours for every product of two dequantised values."""
    import onnx

    makers = {name: node for node in model.graph.node for name in node.output}
    emulated = copy_without_weights(model, nodes=False)
    emulated.graph.initializer.extend(model.graph.initializer)
    emulated.opset_import.add(domain=_DOMAIN, version=1)
    for node in model.graph.node:
        operands = list(_dequantised(node, makers))
        if len(operands) == 2:
            (x, step), (weight, steps) = operands
            inputs = [x, weight, step, steps]
            emulated.graph.node.append(onnx.helper.make_node(_PRODUCT, inputs, [node.output[0]], domain=_DOMAIN))
        else:
            emulated.graph.node.append(node)
    return emulated


def _dequantised(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """Numbers and step of each operand of a MatMul that is dequantised from int8."""
    if node.op_type == "MatMul":
        for name in node.input:
            if name in makers and makers[name].op_type == "DequantizeLinear":
                yield makers[name].input[0], makers[name].input[1]
