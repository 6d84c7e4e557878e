"""An encoder's file on this machine's processors: one function of its input array, whoever runs it.

A batch is cut into parts that run side by side, one a core, each on one thread: cores that share a product wait for
each other after every one of them, cores with images of their own do not. Few rows stay together and share the cores.

This file needs NumPy and the runtime only; a copy of it lies beside the model that runs inside Triton.

Legend: N rows (images or class names), D features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Rows [N, ...] -> unit features [N, D]."""

OPENVINO_TYPES = {"fp32": "f32", "int8": "f32", "fp16": "f16", "bf16": "bf16"}
"""By precision: what OpenVINO is asked for. An int8 graph's own Q/DQ nodes say what is int8, the rest is float32."""


def available_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntimeEncoder:
    """A model with one input and one output on ONNX Runtime's CPU provider.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, path: str, cores: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores or available_cores()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._name = self.session.get_inputs()[0].name

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows [N, ...] -> float32 [N, D]; ONNX Runtime's own exceptions where a run fails."""
        result: NDArray[np.float32] = self.session.run(None, {self._name: rows})[0]
        return result


class OpenVinoEncoder:
    """A model with one input and one output (.onnx or .xml) on OpenVINO's CPU device, computing in ``precision``.

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: OpenVINO cannot read or compile the model.
    """

    def __init__(self, path: str, precision: str, cores: int | None = None) -> None:
        import openvino

        self.streams = cores or available_cores()
        settings = {
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision],
            "INFERENCE_NUM_THREADS": self.streams,
            "NUM_STREAMS": self.streams,
        }
        self.compiled = openvino.Core().compile_model(path, "CPU", settings)
        self._requests = [self.compiled.create_infer_request() for _ in range(self.streams)]

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows [N, ...] -> float32 [N, D]; RuntimeError where a run fails."""
        parts = np.array_split(rows, min(self.streams, len(rows)))
        running = self._requests[: len(parts)]
        for request, part in zip(running, parts, strict=True):
            request.start_async({0: np.ascontiguousarray(part)})
        for request in running:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request in running])


def open_encoder(path: str, runtime: str, precision: str, cores: int | None = None) -> Run:
    """The encoder's file for ``runtime`` ("openvino", or ONNX Runtime for all others) as a function.

    Raises:
        ImportError: the runtime is not installed.
        Exception: the runtime's own, where it cannot load the file.
    """
    if runtime == "openvino":
        return OpenVinoEncoder(path, precision, cores)
    return OnnxRuntimeEncoder(path, cores)
