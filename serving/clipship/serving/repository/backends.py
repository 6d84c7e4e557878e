"""Triton's backends that can run the image encoder, and what sets each apart.

To add a backend, add a row. Other modules read the row and never compare names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipship.core.errors import UsageError

if TYPE_CHECKING:
    from clipship.core.bundle import Runtime


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One of Triton's backends."""

    name: str
    model_file: str
    """Default name of the file in a version folder."""
    platform: str = ""
    """Triton's legacy name of backend and file format, which some of its tools still read."""
    runtimes: tuple[Runtime, ...] = ()
    """Runtimes that run the bundle's ONNX encoders in it; none: it loads TensorRT plans."""
    classifier: str
    """The backend that runs the classifier's ONNX graph; TensorRT has no strings."""
    in_python: bool = False
    """Whether its models are the sources in ``triton_models/python``; that encoder has a door (``doors.py``)."""
    device: str = "auto"
    """Where its models run: "cpu", "gpu", or "auto", which leaves the choice to Triton and to the user."""
    accelerators: tuple[str, ...] = ()
    """Execution accelerators that it can hand the encoder to."""

    @property
    def takes_plans(self) -> bool:
        """Whether it loads TensorRT plans instead of ONNX files."""
        return not self.runtimes

    @property
    def triton_runs_onnx(self) -> bool:
        """Whether Triton's own ONNX Runtime loads the encoder; its release then limits opset and types."""
        return bool(self.runtimes) and not self.in_python


TENSORRT_ACCELERATOR = "tensorrt"

PYTHON = Backend(
    name="python",
    model_file="model.py",
    runtimes=("onnx", "openvino"),
    classifier="python",
    in_python=True,
    device="cpu",
)
ONNXRUNTIME = Backend(
    name="onnxruntime",
    model_file="model.onnx",
    platform="onnxruntime_onnx",
    runtimes=("onnx",),
    classifier="onnxruntime",
    accelerators=(TENSORRT_ACCELERATOR,),
)
TENSORRT = Backend(
    name="tensorrt", model_file="model.plan", platform="tensorrt_plan", classifier="onnxruntime", device="gpu"
)

BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (PYTHON, ONNXRUNTIME, TENSORRT)}

ACCELERATORS = tuple(dict.fromkeys(name for backend in BACKENDS.values() for name in backend.accelerators))


def backend_named(name: str) -> Backend:
    """The backend that Triton calls ``name``.

    Raises:
        UsageError: clipship writes no repositories for it.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known: give {' or '.join(BACKENDS)}")
    return BACKENDS[name]
