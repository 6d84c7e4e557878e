"""The image encoder of a small CLIP as a float32 graph, and what other tests compare it with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.export.encoders import ImageEncoder
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.verification.runners import onnx_session, session_function
from clipship.training.methods.base import Method


def image_encoder(method: Method, path: Path, *, opset: int = 18, external_bytes: int = 2 * 10**9) -> Path:
    """``method``'s image encoder, exported to ``path``."""
    size = method.clip.image_spec.size_px
    onnx_from_module(
        ImageEncoder(method),
        torch.zeros((2, size, size, 3), dtype=torch.uint8),
        path,
        input_spec=image_tensor(size),
        output_spec=embedding_tensor(method.clip.embed_dim),
        metadata={"clipship.base_model": "small"},
        opset=opset,
        external_bytes=external_bytes,
    )
    return path


def features(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What ONNX Runtime gives for ``pixels``."""
    return session_function(onnx_session(path))(pixels)


def centred_cosines(expected: NDArray[np.float32], given: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N], after the mean of ``expected`` is taken from both."""
    first, second = expected - expected.mean(0), given - expected.mean(0)
    cosines: NDArray[np.float32] = (first * second).sum(1) / np.linalg.norm(first, axis=1)
    cosines /= np.linalg.norm(second, axis=1)
    return cosines


def value_types(path: Path) -> dict[str, int]:
    """By name, the element type of every value of the graph at ``path``, by ONNX's own shape inference."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    types = {one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output, *graph.value_info)}
    return types | {one.name: one.data_type for one in graph.initializer}
