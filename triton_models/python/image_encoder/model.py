"""The image encoder inside Triton's Python backend: uint8 [N, H, W, 3] -> unit float32 [N, D].

``clipship_runtimes.py``, ``clipship_processor.py`` and ``clipship_tolerances.py`` beside this file are copies of
modules of ``clipship/core``: the server runs the verified code, and fails to load if its answers differ.
"""

import json
import os
from typing import Any

import clipship_doors
import clipship_processor
import clipship_runtimes
import clipship_tolerances
import numpy as np
import triton_python_backend_utils as pb_utils

INPUT = "image"
OUTPUT = "embedding"


class TritonPythonModel:
    """Requests that Triton passes together run as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx`` beside this file with the configured runtime, and check it.

        On a processor other than the one that the runtime was fastest on, ONNX Runtime loads the same file.
        """
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        parameters = json.loads(args["model_config"])["parameters"]
        runtime, precision = (parameters[name]["string_value"] for name in ("runtime", "precision"))
        measured_with = parameters.get("measured_with", {"string_value": ""})["string_value"].split()
        here = clipship_processor.this_processor()
        runtime, why = clipship_processor.runtime_here(runtime, precision, measured_with, here)
        if why:
            pb_utils.Logger.log_warn(f"image_encoder: ONNX Runtime runs it, not OpenVINO: {why}")
        threads = parameters.get("intra_op_thread_count", {"string_value": "0"})["string_value"]
        cores = int(threads) or clipship_runtimes.available_cores()
        self.encode = clipship_runtimes.open_encoder(path, runtime, precision, cores)
        by = f"{clipship_runtimes.runtime_name(runtime)} on {here}"
        golden = os.path.join(args["model_repository"], "golden.npz")
        problem = clipship_tolerances.checked(
            golden, lambda samples: self._problem(samples, precision, cores), pb_utils.Logger.log_warn
        )
        if problem:
            advice = clipship_tolerances.advice(precision)
            raise pb_utils.TritonModelException(f"{path} ({precision}) by {by} answers wrongly: {problem}: {advice}")
        self.door = clipship_doors.Door(args["model_instance_name"])

    def _problem(self, samples: Any, precision: str, cores: int) -> str:
        pixels, embedding = samples["pixels"], samples["embedding"]
        counts = (max(len(pixels), cores), 1)  # batches smaller than the number of cores take another code path
        problems = (
            clipship_tolerances.encoder_problem(self.encode, pixels, embedding, precision, count) for count in counts
        )
        return next(filter(None, problems), "")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order."""
        images = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        batch = np.concatenate(images)
        with self.door.closed(len(batch)):
            embedding = self.encode(batch)
        ends = np.cumsum([len(image) for image in images])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, np.ascontiguousarray(part))])
            for part in np.split(embedding, ends)
        ]
