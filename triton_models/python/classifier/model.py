"""The classifier on ONNX Runtime inside Triton's Python backend: float32 [N, D] -> scores, indices, labels [N, k].

The embedding is handed on to those who ask for it; see ``passthrough_tensor`` in ``clipship/core/tensors.py``.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

INPUT = "embedding"
OUTPUTS = ("scores", "indices", "labels")
PASSTHROUGH = "embedding_passthrough"


class TritonPythonModel:
    """Runs the graph that the ONNX Runtime backend would run, so both give the same answers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx``, which lies beside this file, on as many threads as the parameters say."""
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        parameters = json.loads(args["model_config"])["parameters"]
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order; labels as UTF-8 bytes."""
        parts = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        scores, indices, labels = self.session.run(list(OUTPUTS), {INPUT: np.concatenate(parts)})
        encoded = np.array([name.encode() for name in labels.flat], dtype=np.object_).reshape(labels.shape)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        by_request = zip(*(np.split(array, ends) for array in (scores, indices, encoded)), parts, strict=True)
        return [self._response(request, arrays) for request, arrays in zip(requests, by_request, strict=True)]

    @staticmethod
    def _response(request: Any, arrays: Sequence[Any]) -> Any:
        asked = request.requested_output_names()
        named = zip((*OUTPUTS, PASSTHROUGH), arrays, strict=True)
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in named if name in asked]
        return pb_utils.InferenceResponse(tensors)
