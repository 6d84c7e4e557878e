"""Loads and runs a plan on this machine's GPU, with PyTorch's tensors as buffers.

Shape legend: N images, H = W pixels, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.tensorrt_plan import TensorRtPlan, validate_plan
from clipship.export.tensorrt.runtime import Loaded, gpu_here, load_runtime


def require_gpu() -> str:
    """The compute capability of this machine's GPU.

    Raises:
        UsageError: PyTorch sees none.
    """
    here = gpu_here()
    if here is None:
        raise UsageError("a TensorRT plan runs on a GPU, and PyTorch sees none here: run this on the plan's machine")
    return here


def engine_from_plan(loaded: Loaded, plan: TensorRtPlan) -> Any:
    """The ``ICudaEngine`` of ``plan``, which has been validated.

    Raises:
        CheckFailed: the runtime cannot load it; says why.
    """
    runtime = loaded.trt.Runtime(loaded.logger)
    if plan.info.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings its own runtime; it is our own plan
    engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise CheckFailed(f"{plan.file}: {plan.info.runtime} {loaded.version} cannot load it: {loaded.why()}")
    return engine


@dataclass(frozen=True, eq=False)
class PlanRunner:
    """A plan on the GPU, ready to run. Not thread-safe."""

    plan: TensorRtPlan
    context: Any

    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> unit float32 [N, D], in batches of at most the profile's maximum.

        Raises:
            UsageError: N is below the profile's minimum, or the pixels are of another size.
            CheckFailed: the runtime failed.
        """
        profile, side = self.plan.info.profile, tuple(self.plan.info.input.shape[1:])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != side or not len(pixels):
            taken = ", ".join(map(str, side))
            given = f"{pixels.dtype} {list(pixels.shape)}"
            raise UsageError(f"pixels are {given}: the plan takes uint8 [N, {taken}], N above 0")
        parts = np.array_split(pixels, -(-len(pixels) // profile.max))  # of nearly equal size, so none is too small
        profile.validate(min(map(len, parts)))
        return np.concatenate([self._batch(part) for part in parts])

    def _batch(self, pixels_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        info, context = self.plan.info, self.context
        images = torch.from_numpy(np.ascontiguousarray(pixels_NHWC)).cuda()
        embedding = torch.empty((len(images), int(info.output.shape[1])), dtype=torch.float32, device="cuda")
        # The default stream would make TensorRT synchronise with every other.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        accepted = context.set_input_shape(info.input.name, tuple(images.shape))
        for name, tensor in ((info.input.name, images), (info.output.name, embedding)):
            accepted = accepted and context.set_tensor_address(name, tensor.data_ptr())
        if not accepted or not context.execute_async_v3(stream.cuda_stream):
            raise CheckFailed(f"{self.plan.file}: {info.runtime} failed on a batch of {len(images)} images")
        stream.synchronize()
        result: NDArray[np.float32] = embedding.cpu().numpy()
        return result


def load_plan(plan: TensorRtPlan, bundle: Bundle | None = None) -> PlanRunner:
    """Load ``plan`` onto this machine's GPU.

    Raises:
        PlanError: it is for another runtime, version or GPU, its weights are stripped, or it is not of ``bundle``.
        UsageError: there is no GPU here.
        MissingExtraError: its runtime is not installed.
        CheckFailed: the runtime cannot load it.
    """
    loaded = load_runtime(plan.info.runtime)
    validate_plan(plan, loaded.target(), bundle)
    validate_plan(plan, loaded.target(gpu=require_gpu()))
    return PlanRunner(plan, engine_from_plan(loaded, plan).create_execution_context())
