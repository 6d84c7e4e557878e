"""The image encoder on ONNX Runtime inside Triton's Python backend: uint8 [N, H, W, 3] -> unit float32 [N, D]."""

import os
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

INPUT = "image"
OUTPUT = "embedding"


class TritonPythonModel:
    """All requests that Triton hands over at once run as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx``, which lies beside this file."""
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        images = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        (embedding,) = self.session.run([OUTPUT], {INPUT: np.concatenate(images)})
        ends = np.cumsum([len(image) for image in images])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, np.ascontiguousarray(part))])
            for part in np.split(embedding, ends)
        ]
