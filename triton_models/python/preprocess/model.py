"""Decoding and resizing inside Triton's Python backend: file bytes [N, 1] -> uint8 [N, H, W, 3] and an error [N, 1].

``clipship_images.py`` and ``clipship_tolerances.py`` beside this file are copies of ``images/decoding.py`` and
``tolerances.py`` in ``clipship/core``: the server runs the client's code. An image that cannot be decoded gives zeros
and a message in ``error``; its neighbours are not affected.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import clipship_doors
import clipship_images
import clipship_tolerances
import numpy as np
import PIL
import triton_python_backend_utils as pb_utils

INPUT = "encoded"
PIXELS = "image"
ERROR = "error"


class TritonPythonModel:
    """Decodes the images of all requests in a pool of threads: Pillow works outside the interpreter's lock."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the image specification from the model's parameters, and check the decoder."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.spec = clipship_images.ImageSpec.from_json(json.loads(parameters["image_spec"]["string_value"]))
        self.pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        golden = os.path.join(args["model_repository"], "golden.npz")
        problem = clipship_tolerances.checked(golden, self._problem, pb_utils.Logger.log_warn)
        if problem:
            raise pb_utils.TritonModelException(
                f"{os.path.dirname(golden)} by Pillow {PIL.__version__}: {problem}: install the Pillow that the bundle "
                "was packed with"
            )
        self.door = clipship_doors.Door(args["model_instance_name"])
        self.encoder = clipship_doors.Doors("image_encoder")

    def _problem(self, samples: Any) -> str:
        decoded = list(self.pool.map(self._decode, clipship_tolerances.golden_files(samples)))
        errors = [error.decode() for _, error in decoded if error]
        pixels = np.stack([pixels for pixels, _ in decoded])
        problem: str = errors[0] if errors else clipship_tolerances.pixels_problem(samples["pixels"], pixels)
        return problem

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """One response per request, in order, each when the encoder has capacity."""
        return clipship_doors.answered(requests, self._responses(requests))

    def _responses(self, requests: list[Any]) -> Iterator[Any]:
        batches = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        with self.door.closed(sum(map(clipship_doors.work_of, batches))):
            decoded = [self.pool.map(self._decode, batch.reshape(-1)) for batch in batches]
            for batch, images in zip(batches, decoded, strict=True):
                response = self._response(list(images))
                self.encoder.wait(len(batch))
                yield response

    def finalize(self) -> None:
        """Let the threads end."""
        self.pool.shutdown()

    def _decode(self, data: bytes) -> tuple[Any, bytes]:
        try:
            return clipship_images.pixels_from_bytes(data, self.spec), b""
        except clipship_images.ImageDecodeError as error:
            return np.zeros((self.spec.size_px, self.spec.size_px, 3), dtype=np.uint8), str(error).encode()

    @staticmethod
    def _response(images: list[tuple[Any, bytes]]) -> Any:
        pixels = np.stack([image for image, _ in images])
        errors = np.array([[error] for _, error in images], dtype=np.object_)
        return pb_utils.InferenceResponse([pb_utils.Tensor(PIXELS, pixels), pb_utils.Tensor(ERROR, errors)])
