"""The classifier on ONNX Runtime inside Triton's Python backend: float32 [N, D] -> scores, indices, labels [N, k]."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

INPUT = "embedding"
OUTPUTS = ("scores", "indices", "labels")


class TritonPythonModel:
    """Runs the graph that the ONNX Runtime backend would run, so both give the same answers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx``, which lies beside this file."""
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order; labels as UTF-8 bytes."""
        parts = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        scores, indices, labels = self.session.run(list(OUTPUTS), {INPUT: np.concatenate(parts)})
        encoded = np.array([name.encode() for name in labels.flat], dtype=np.object_).reshape(labels.shape)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        by_request = zip(*(np.split(array, ends) for array in (scores, indices, encoded)), strict=True)
        return [self._response(arrays) for arrays in by_request]

    @staticmethod
    def _response(arrays: Sequence[Any]) -> Any:
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(OUTPUTS, arrays, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)
