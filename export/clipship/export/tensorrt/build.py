"""Builds a plan from one variant of a bundle's image encoder, and puts the weights back into a stripped plan.

Shape legend: N images, H = W pixels, D features.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipship.core.bundle import IMAGE_ENCODER, Bundle, EncoderVariant
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder, sha256_of_bytes, write_bytes_atomic
from clipship.core.precisions import Precision
from clipship.core.progress import Report, log, progress
from clipship.core.tensorrt_plan import (
    PLATFORM,
    RECORD,
    BatchProfile,
    PlanInfo,
    TensorRtPlan,
    read_plan,
    validate_plan,
    variant_digest,
    variant_of,
    write_plan,
)
from clipship.core.tensors import TensorSpec
from clipship.export.tensorrt.inspect import Inspection, inspect_network, let_attention_decompose, parse, read_graph
from clipship.export.tensorrt.runtime import (
    EngineRuntime,
    Loaded,
    deprecations_allowed,
    gpu_here,
    load_runtime,
    typed_network,
    validated_gpus,
)

_RECORDED = ("version_compatible", "hardware_compatible", "optimization_level", "workspace_mib")
_PERCENT = 100
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is built."""

    gpus: tuple[str, ...] = ()
    """Compute capabilities like "sm89"; empty: this machine's GPU."""
    profile: BatchProfile = field(default_factory=BatchProfile)
    optimization_level: int = 3
    """0 to 5: how long the builder searches for fast kernels."""
    workspace_mib: int | None = None
    """Scratch memory a layer may take on the GPU, in MiB; None: no limit."""
    timing_cache: Path | None = None
    """A file that keeps measured kernel times between builds."""
    strip_weights: bool = False
    """Leave the weights out; :func:`refit_plan` puts them back."""
    version_compatible: bool = False
    """Runs on later versions of the runtime, too."""
    hardware_compatible: bool = False
    """Runs on every GPU since Ampere, more slowly."""

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(f"optimisation level {self.optimization_level}: give 0 (fast to build) to 5 (slow)")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"a workspace of {self.workspace_mib} MiB: give 1 or more, or leave it out")


def plan_from_bundle(
    bundle: Bundle, out: Path, loaded: Loaded, *, precision: Precision, settings: Settings
) -> TensorRtPlan:
    """Build the plan of ``bundle``'s image encoder in ``precision`` and write it to the folder ``out``.

    Raises:
        UsageError: no such variant, GPU, or switch of this runtime; an operator that the runtime does not have (named);
            ``out`` holds something else.
        CheckFailed: the parsed network is not what the graph says, or the runtime could not build it.
        OSError: the disk is full. In every case ``out`` is left as it was.
    """
    validate_folder(out)
    validate_switches(loaded.runtime, settings)
    variant = variant_for(bundle, precision)
    gpus = validated_gpus(loaded, settings.gpus)
    _validate_stripping(loaded, settings)
    specs = bundle.manifest.inputs_outputs[IMAGE_ENCODER]
    started = time.monotonic()
    data, inspection = build_plan(loaded, bundle.path / variant.file, specs, precision, replace(settings, gpus=gpus))
    info = PlanInfo(
        runtime=loaded.runtime.name,
        runtime_version=loaded.version,
        gpus=gpus,
        platform=PLATFORM,
        precision=precision,
        profile=settings.profile,
        input=specs[0],
        output=specs[1],
        onnx_file=variant.file,
        onnx_digest=variant_digest(bundle, variant),
        bundle_digest=bundle.digest,
        plan_digest=sha256_of_bytes(data),
        plan_bytes=len(data),
        build_s=round(time.monotonic() - started, 3),
        weights_stripped=settings.strip_weights,
        layers=inspection.layers,
        **{name: getattr(settings, name) for name in _RECORDED},
    )
    return _written(out, data, info)


def variant_for(bundle: Bundle, precision: Precision) -> EncoderVariant:
    """The portable variant of ``precision``.

    Raises:
        UsageError: the bundle has none; lists those it has.
    """
    portable = [one for one in bundle.image_encoders if one.runtime == "onnx"]
    for variant in portable:
        if variant.precision == precision:
            return variant
    has = ", ".join(one.precision for one in portable)
    raise UsageError(
        f"{bundle.path}: no {precision} variant for TensorRT, it has {has}: pack it with {precision}, or choose"
    )


def validate_switches(runtime: EngineRuntime, settings: Settings) -> None:
    """Validate that ``runtime`` has every switch of ``settings`` that is on.

    Raises:
        UsageError: it does not; says what to do instead.
    """
    given = {
        "--timing-cache": settings.timing_cache,
        "--version-compatible": settings.version_compatible,
        "--hardware-compatible": settings.hardware_compatible,
    }
    for option, instead in runtime.lacks.items():
        if given[option]:
            raise UsageError(f"{runtime.name} has no {option}: leave it out; {instead}")


def build_plan(
    loaded: Loaded, onnx_path: Path, specs: tuple[TensorSpec, TensorSpec], precision: Precision, settings: Settings
) -> tuple[bytes, Inspection]:
    """Parse, inspect and build one ONNX file, whose input and output are ``specs``."""
    builder = loaded.trt.Builder(loaded.logger)
    network = typed_network(loaded, builder)
    parser = parse(loaded, network, onnx_path)
    let_attention_decompose(loaded, network)
    inspection = inspect_network(network, read_graph(onnx_path), specs, precision)
    inspection.validate(onnx_path.name)
    log(f"{onnx_path.name}: {network.num_layers} layers, {inspection.compared} tensors of the graph's types")
    config = _config(loaded, builder, specs[0], settings)
    with progress(f"{loaded.runtime.name} {precision}", _PERCENT) as report:
        data = _serialized(loaded, builder, network, config, report)
    del parser  # it owned the weights until here
    if settings.timing_cache:
        write_timing_cache(config, settings.timing_cache)
    return data, inspection


def _config(loaded: Loaded, builder: Any, image: TensorSpec, settings: Settings) -> Any:
    """The builder's configuration: profile, flags, GPUs, caches."""
    trt, config = loaded.trt, builder.create_builder_config()
    side = tuple(int(size) for size in image.shape[1:])
    batches = (settings.profile.min, settings.profile.opt, settings.profile.max)
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, *((batch, *side) for batch in batches))
    config.add_optimization_profile(profile)
    config.builder_optimization_level = settings.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)  # it rounds float32 products to 10 bits: no parity with PyTorch
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * _MIB)
    if settings.strip_weights:
        # "Identical": refitted with the very weights it was built with, so kernels may depend on their values.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.timing_cache:
        read_timing_cache(config, settings.timing_cache)
    if loaded.runtime.builds_for_absent_gpus:
        config.num_compute_capabilities = len(settings.gpus)
        for position, gpu in enumerate(settings.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), position)
    return config


def read_timing_cache(config: Any, path: Path) -> None:
    """Give the builder the kernel times in ``path``, if that exists.

    Raises:
        UsageError: the file is no timing cache, or of another version or GPU.
    """
    with deprecations_allowed():
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise UsageError(f"{path}: no timing cache of this runtime and GPU: give another file, or remove it")


def write_timing_cache(config: Any, path: Path) -> None:
    """Write the builder's kernel times to ``path``."""
    with deprecations_allowed():
        write_bytes_atomic(path, bytes(config.get_timing_cache().serialize()))


def _serialized(loaded: Loaded, builder: Any, network: Any, config: Any, report: Report) -> bytes:
    """Build; Ctrl-C stops the builder at its next step."""
    steps = _monitor(loaded.trt, report)
    config.progress_monitor = steps
    with _stopped_by_interrupt(steps):
        data = builder.build_serialized_network(network, config)
    if steps.stopped:
        raise KeyboardInterrupt
    if data is None:
        raise CheckFailed(f"{loaded.runtime.name} {loaded.version} could not build the plan: {loaded.why()}")
    return bytes(data)


def _validate_stripping(loaded: Loaded, settings: Settings) -> None:
    """The driver links kernels that get their weights later (seen with TensorRT-RTX 1.7.1), so a GPU is needed."""
    if settings.strip_weights and gpu_here() is None:
        raise UsageError(
            f"{loaded.runtime.name} strips weights on a machine with a GPU only, and PyTorch sees none here: "
            "build it there, or leave out --strip-weights"
        )


class Steps:
    """The builder's nested phases as a percentage: TensorRT's ``IProgressMonitor``, called from its own threads."""

    def __init__(self, report: Report) -> None:
        self.stopped = False
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins within its parent."""
        with self._lock:
            self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)
            self._show(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step is done; False stops the build."""
        with self._lock:
            if phase_name in self._phases:
                parent, steps, _ = self._phases[phase_name]
                self._phases[phase_name] = (parent, steps, min(step + 1, steps))
                self._show(phase_name)
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(phase_name, None)

    def _show(self, name: str) -> None:
        self._report(int(_PERCENT * min(self._fraction(name), 1.0)), name)

    def _fraction(self, name: str) -> float:
        """The share that is done while ``name`` runs: a phase is one step of its parent."""
        share, current = 0.0, self._phases.get(name)
        while current is not None:
            parent, steps, done = current
            share = (done + share) / steps
            current = self._phases.get(parent) if parent else None
        return share


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(Steps, trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings do not know super()
            Steps.__init__(self, report)

    return Monitor()


@contextmanager
def _stopped_by_interrupt(steps: Steps) -> Iterator[None]:
    """Make Ctrl-C stop ``steps``, as an exception must not cross the builder's C++ frames."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        steps.stopped = True

    before: Callable[[int, Any], Any] | int | None = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def refit_plan(plan: TensorRtPlan, bundle: Bundle, out: Path) -> TensorRtPlan:
    """Put the weights of ``bundle``'s ONNX file back into a stripped ``plan``, and write it to the folder ``out``.

    Triton does not refit plans, so this comes before a repository is written. It needs the plan's GPU.

    Raises:
        PlanError: the plan is for another GPU or runtime version, or of another bundle.
        UsageError: it has its weights, or there is no GPU here.
        CheckFailed: the runtime could not put them back.
    """
    from clipship.export.tensorrt.run import engine_from_plan, require_gpu

    validate_folder(out)
    if not plan.info.weights_stripped:
        raise UsageError(f"{plan.path}: has its weights, there is nothing to refit: use it as it is")
    loaded = load_runtime(plan.info.runtime)
    validate_plan(plan, loaded.target(puts_weights_back=True), bundle)
    validate_plan(plan, loaded.target(gpu=require_gpu(), puts_weights_back=True))
    variant = variant_of(plan.info, bundle)
    assert variant is not None, "validate_plan has looked"
    data = _refitted(loaded, engine_from_plan(loaded, plan), bundle.path / variant.file)
    info = replace(plan.info, weights_stripped=False, plan_bytes=len(data), plan_digest=sha256_of_bytes(data))
    return _written(out, data, info)


def _refitted(loaded: Loaded, engine: Any, onnx_path: Path) -> bytes:
    trt = loaded.trt
    refitter = trt.Refitter(engine, loaded.logger)
    from_onnx = trt.OnnxParserRefitter(refitter, loaded.logger)
    if not from_onnx.refit_from_file(str(onnx_path)) or not refitter.refit_cuda_engine():
        raise CheckFailed(f"{loaded.runtime.name} could not take the weights of {onnx_path}: {loaded.why()}")
    with_weights = engine.create_serialization_config()
    with_weights.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(with_weights))


def validate_folder(out: Path) -> None:
    """Validate that a plan may be written to ``out``: nothing is there, or an older plan.

    Raises:
        UsageError: it is a file, or a folder of something else.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UsageError(f"{out}: exists and is no plan: give a new folder, or remove it first")


def _written(out: Path, data: bytes, info: PlanInfo) -> TensorRtPlan:
    with replace_folder(out) as folder:
        write_plan(folder, data, info)
    return read_plan(out)
