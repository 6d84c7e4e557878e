"""Typed variants of a float32 graph, written here in the plainest way: casts or Q/DQ around each matrix product."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clipship.core.bundle import MANIFEST, Bundle, EncoderVariant, Manifest, read_bundle, write_manifest
from clipship.core.precisions import Precision

FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def typed(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """``model`` with its MatMul nodes in ``precision`` and all else in float32."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.value_info[:]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            made.graph.node.append(node)
        elif precision != "int8":
            made.graph.node.extend(_cast_product(node, FLOATS[precision]))
        elif node.input[1] in weights:
            made.graph.node.extend(_quantised_product(made.graph, node, weights[node.input[1]]))
        else:
            made.graph.node.append(node)
    return made


def _cast_product(node: onnx.NodeProto, to: int) -> Iterator[Any]:
    names = [f"{node.name}.{slot}" for slot in range(2)]
    for source, name in zip(node.input, names, strict=True):
        yield helper.make_node("Cast", [source], [name], name=f"{name}.cast", to=to)
    yield helper.make_node("MatMul", names, [f"{node.name}.low"], name=node.name)
    yield helper.make_node("Cast", [f"{node.name}.low"], [node.output[0]], name=f"{node.name}.up", to=TensorProto.FLOAT)


def _quantised_product(graph: onnx.GraphProto, node: onnx.NodeProto, weight_KF: np.ndarray[Any, Any]) -> Iterator[Any]:
    """Activations with one scale, weights with one for each of the F outputs, zero points of 0."""
    name = node.name
    scale_F = (np.abs(weight_KF).max(axis=0) / 127 + 1e-9).astype(np.float32)
    constants = {
        "w": np.clip(np.round(weight_KF / scale_F), -127, 127).astype(np.int8),
        "w.scale": scale_F,
        "w.zero": np.zeros(len(scale_F), np.int8),
        "a.scale": np.array(0.05, np.float32),
        "a.zero": np.array(0, np.int8),
    }
    graph.initializer.extend(numpy_helper.from_array(array, f"{name}.{key}") for key, array in constants.items())
    a, w = ([f"{name}.{key}.scale", f"{name}.{key}.zero"] for key in ("a", "w"))
    yield helper.make_node("QuantizeLinear", [node.input[0], *a], [f"{name}.q"], name=f"{name}.quantise")
    yield helper.make_node("DequantizeLinear", [f"{name}.q", *a], [f"{name}.dq"], name=f"{name}.dequantise")
    yield helper.make_node("DequantizeLinear", [f"{name}.w", *w], [f"{name}.wdq"], name=f"{name}.weights", axis=1)
    yield helper.make_node("MatMul", [f"{name}.dq", f"{name}.wdq"], [node.output[0]], name=name)


def one_node_model(operator: str, domain: str = "", opset: int = 18) -> bytes:
    """uint8 [N, 4] -> cast -> ``operator`` -> float32 [N, 4]."""
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], name="cast", to=TensorProto.FLOAT),
        helper.make_node(operator, ["cast"], ["embedding"], name="the_node", domain=domain),
    ]
    edges = [("image", TensorProto.UINT8), ("embedding", TensorProto.FLOAT)]
    infos = [helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name, dtype in edges]
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph(nodes, "graph", infos[:1], infos[1:])
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


def with_variants(bundle: Bundle, out: Path, variants: Sequence[tuple[EncoderVariant, bytes]]) -> Bundle:
    """A copy of ``bundle`` in ``out`` whose variants are its first one and ``variants``."""
    shutil.copytree(bundle.path, out)
    for variant, data in variants:
        (out / variant.file).write_bytes(data)
    manifest = Manifest.from_json(json.loads((out / MANIFEST).read_text(encoding="utf-8")))
    every = (manifest.image_encoders[0], *(variant for variant, _ in variants))
    write_manifest(out, replace(manifest, image_encoders=every))
    return read_bundle(out)
