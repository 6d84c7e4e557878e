"""The first step of an ensemble: passes its input on when the next model has capacity; see ``clipship_doors.py``.

A request that waits here when its client disconnects costs a copy, and Triton drops it before the next step.
"""

import json
from collections.abc import Iterator
from typing import Any

import clipship_doors
import triton_python_backend_utils as pb_utils

OUTPUT = "admitted"


class TritonPythonModel:
    """Requests leave in order of arrival."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the next model's doors."""
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        self.next = clipship_doors.Doors(config["parameters"]["next"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """One response per request, each in its turn."""
        return clipship_doors.answered(requests, self._responses(requests))

    def _responses(self, requests: list[Any]) -> Iterator[Any]:
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy()
            response = pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, array)])
            self.next.wait(clipship_doors.work_of(array))
            yield response
