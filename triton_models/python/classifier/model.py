"""The classifier on ONNX Runtime inside Triton's Python backend: float32 [N, D] -> scores, indices, labels [N, k].

The embedding is passed through on request; see ``passthrough_tensor`` in ``clipship/core/tensors.py``.
``clipship_tolerances.py`` beside this file is a copy of ``clipship/core/tolerances.py``.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import clipship_tolerances
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

INPUT = "embedding"
OUTPUTS = ("scores", "indices", "labels")
PASSTHROUGH = "embedding_passthrough"


class TritonPythonModel:
    """Runs the same graph as the ONNX Runtime backend would."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx`` beside this file with the configured number of threads, and check it."""
        version = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(version, "model.onnx")
        options = onnxruntime.SessionOptions()
        parameters = json.loads(args["model_config"])["parameters"]
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        golden, self.labels = (os.path.join(version, name) for name in ("golden.npz", "labels.txt"))
        problem = clipship_tolerances.checked(golden, self._problem, pb_utils.Logger.log_warn)
        if problem:
            about = f"{path} by ONNX Runtime {onnxruntime.__version__}"
            raise pb_utils.TritonModelException(f"{about}: {problem}: publish the vocabulary again")

    def _problem(self, truth: Any) -> str:
        with open(self.labels, encoding="utf-8", newline="\n") as file:
            names = file.read().split("\n")[:-1]
        scores, indices, labels = self.session.run(list(OUTPUTS), {INPUT: truth["embedding"]})
        limit = clipship_tolerances.RULE_ATOL
        problem: str = clipship_tolerances.classes_problem(truth["scores"], names, scores, indices, labels, limit)
        return problem

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order; labels as UTF-8 bytes."""
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
