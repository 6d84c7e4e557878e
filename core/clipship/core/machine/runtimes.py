"""An encoder's file as a function of its input array, run on this machine's processors by ONNX Runtime or OpenVINO.

For OpenVINO a batch is cut into parts that run in parallel, each on one core: cores that share a matrix product wait
for each other after every product. A batch of fewer rows than cores stays whole, and the cores share its products.
ONNX Runtime gets whole batches and always shares its products between the cores.

This file needs NumPy, the runtime and ``precisions.py``; copies of both files lie beside the model inside Triton.

Legend: N rows (images or class names), D features.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.precisions import PRECISIONS

Run = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Rows [N, ...] -> unit features [N, D]."""


def available_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runtime_name(runtime: str) -> str:
    """The runtime that :func:`open_encoder` takes, with its version: "ONNX Runtime 1.23.0"."""
    if runtime == "openvino":
        return f"OpenVINO {_openvino().__version__.partition('-')[0]}"
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


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

    The first call with fewer rows than cores compiles it once more, and holds its weights once more.

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: OpenVINO cannot read or compile the model.
    """

    def __init__(self, path: str, precision: str, cores: int | None = None) -> None:
        self.cores = cores or available_cores()
        self._path, self._precision = path, precision
        self._requests: dict[int, list[Any]] = {}
        self.compiled = self._compile(self.cores)

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows [N, ...] -> float32 [N, D]; RuntimeError where a run fails."""
        parts = self.cores if len(rows) >= self.cores else 1
        if parts not in self._requests:
            self._compile(parts)
        running = self._requests[parts]
        for request, part in zip(running, np.array_split(rows, parts), strict=True):
            request.start_async({0: np.ascontiguousarray(part)})
        for request in running:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request in running])

    def _compile(self, parts: int) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self._precision].openvino_type,
            "INFERENCE_NUM_THREADS": self.cores,
            "NUM_STREAMS": parts,
        }
        compiled = _openvino().Core().compile_model(self._path, "CPU", settings)
        self._requests[parts] = [compiled.create_infer_request() for _ in range(parts)]
        return compiled


def _openvino() -> Any:
    """The package, whose telemetry raises without a home folder and fills the log where that is read-only."""
    if not os.environ.get("HOME"):
        os.environ["HOME"] = tempfile.gettempdir()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import openvino
    finally:
        logging.disable(disabled)
    return openvino


def open_encoder(path: str, runtime: str, precision: str, cores: int | None = None) -> Run:
    """The encoder's file for ``runtime`` ("openvino", or ONNX Runtime for all others) as a function.

    Raises:
        ImportError: the runtime is not installed.
        Exception: the runtime's own, where it cannot load the file.
    """
    if runtime == "openvino":
        return OpenVinoEncoder(path, precision, cores)
    return OnnxRuntimeEncoder(path, cores)
