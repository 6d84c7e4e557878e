"""The one seam to TensorRT and TensorRT-RTX, which share an API but not their plans.

The fields of :class:`EngineRuntime` are the differences. ``trt`` is the imported module, typed ``Any``: the bindings
have no types.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from clipship.core.errors import MissingExtraError, UsageError
from clipship.core.tensorrt_plan import GPUS, PLATFORM, PlanRuntime, Target, gpu_name


@dataclass(frozen=True, kw_only=True)
class EngineRuntime:
    """What one of the two runtimes can do."""

    name: PlanRuntime
    modules: tuple[str, ...]
    """Names of its Python module; the first that is installed is taken."""
    extra: str
    least_version: tuple[int, int]
    """The first that reads all of our typed ONNX files."""
    builds_for_absent_gpus: bool
    """Takes a list of compute capabilities; otherwise a plan is for the GPU it is built on."""
    lacks: Mapping[str, str]
    """By option of ``clipship engine`` that it does not have, what to do instead."""


RUNTIMES: dict[PlanRuntime, EngineRuntime] = {
    "tensorrt": EngineRuntime(
        name="tensorrt",
        modules=("tensorrt",),
        extra="tensorrt",
        least_version=(10, 12),
        builds_for_absent_gpus=False,
        lacks={},
    ),
    "tensorrt-rtx": EngineRuntime(
        name="tensorrt-rtx",
        # The second is what the wheels of the public index bring, the first NVIDIA's own package around it.
        modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        extra="tensorrt-rtx",
        least_version=(1, 7),
        builds_for_absent_gpus=True,
        lacks={
            "--timing-cache": "it times no kernels while it builds",
            "--version-compatible": "build with the version that runs it",
            "--hardware-compatible": "give --gpu once for each GPU, and the plan runs on all of them",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An imported runtime, and the logger that its objects write to."""

    runtime: EngineRuntime
    trt: Any
    logger: Any = field(repr=False)
    """An ``ILogger`` with ``errors``, the list of error messages so far."""

    @property
    def version(self) -> str:
        """For example "1.7.1.116"."""
        return str(self.trt.__version__)

    def target(self, *, gpu: str | None = None, puts_weights_back: bool = False) -> Target:
        """This runtime on this machine, with ``gpu`` if it is known."""
        return Target(
            runtime=self.runtime.name,
            version=self.version,
            gpu=gpu,
            platform=PLATFORM,
            puts_weights_back=puts_weights_back,
        )

    def why(self) -> str:
        """The last errors in one line, for the end of a message."""
        return "; ".join(" ".join(line.split()) for line in self.logger.errors[-2:]) or "it gives no reason"


def load_runtime(name: PlanRuntime) -> Loaded:
    """Import the runtime ``name``.

    Raises:
        MissingExtraError: its Python package is not installed.
        UsageError: it is older than what strongly typed networks from our files need.
    """
    runtime = RUNTIMES[name]
    trt = _first_module(runtime)
    found = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
    if found < runtime.least_version:
        least = ".".join(map(str, runtime.least_version))
        command = f"pip install -U 'clipship[{runtime.extra}]'"
        raise UsageError(f"{name} {trt.__version__} is too old, {least} or later is needed: {command}")
    return Loaded(runtime=runtime, trt=trt, logger=_logger(trt))


def _first_module(runtime: EngineRuntime) -> Any:
    for module in runtime.modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise MissingExtraError(runtime.name, runtime.extra)


def _logger(trt: Any) -> Any:
    """An ``ILogger`` that prints nothing; its errors become part of our own message."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings do not know super()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


@contextmanager
def deprecations_allowed() -> Iterator[None]:
    """Ignore deprecations: one supported version needs calls that another deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def typed_network(loaded: Loaded, builder: Any) -> Any:
    """An empty strongly typed network, which computes in the graph's types.

    TensorRT 10 and TensorRT-RTX need the flag; from 11 on every network is strongly typed, and the flag may disappear.
    """
    flag = getattr(loaded.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    with deprecations_allowed():
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        assert flag is None or network.get_flag(flag), "the network is not strongly typed"
    return network


def gpu_here() -> str | None:
    """The compute capability of this machine's first GPU, e.g. "sm89"; None where PyTorch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def buildable_gpus(loaded: Loaded) -> tuple[str, ...]:
    """What ``--gpu`` may name: all that TensorRT-RTX knows, or this machine's GPU.

    Raises:
        UsageError: the runtime builds on the GPU only, and there is none.
    """
    if loaded.runtime.builds_for_absent_gpus:
        return tuple(gpu for gpu in GPUS if gpu.upper() in loaded.trt.ComputeCapability.__members__)
    here = gpu_here()
    if here is None:
        raise UsageError(
            f"{loaded.runtime.name} builds on the GPU it builds for, and PyTorch sees none here: "
            "run this on that machine, or build a --runtime tensorrt-rtx plan, which needs no GPU"
        )
    return (here,)


def validated_gpus(loaded: Loaded, given: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs to build for, sorted and without repetition; without ``given`` ones this machine's.

    Raises:
        UsageError: a name is no compute capability, the runtime cannot build for it, or none is given and none is here.
    """
    names = [gpu_name(name) for name in given]
    accepted = buildable_gpus(loaded)
    if not names:
        here = gpu_here()
        if here is None:
            raise UsageError(f"no --gpu was given and PyTorch sees no GPU here: give one of {', '.join(accepted)}")
        names = [here]
    for name in names:
        if name not in accepted:
            version = f"{loaded.runtime.name} {loaded.version}"
            raise UsageError(f"{version} cannot build for {name} here: give {' or '.join(accepted)}")
    return tuple(sorted(set(names), key=GPUS.index))
