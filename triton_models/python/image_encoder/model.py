"""The image encoder inside Triton's Python backend: uint8 [N, H, W, 3] -> unit float32 [N, D].

``clipship_cpu.py`` beside this file is a copy of ``clipship/core/cpu.py``: the server runs what was verified.
"""

import json
import os
from typing import Any

import clipship_cpu
import clipship_doors
import numpy as np
import triton_python_backend_utils as pb_utils

INPUT = "image"
OUTPUT = "embedding"


class TritonPythonModel:
    """All requests that Triton hands over at once run as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx``, which lies beside this file, by the runtime that the parameters name."""
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        parameters = json.loads(args["model_config"])["parameters"]
        runtime, precision = (parameters[name]["string_value"] for name in ("runtime", "precision"))
        threads = parameters.get("intra_op_thread_count", {"string_value": "0"})["string_value"]
        self.encode = clipship_cpu.open_encoder(path, runtime, precision, int(threads) or None)
        self.door = clipship_doors.Door(args["model_instance_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        images = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        batch = np.concatenate(images)
        with self.door.closed(len(batch)):
            embedding = self.encode(batch)
        ends = np.cumsum([len(image) for image in images])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, np.ascontiguousarray(part))])
            for part in np.split(embedding, ends)
        ]
