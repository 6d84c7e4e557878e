"""From one variant of a bundle's image encoder to a plan on disk, and from a plan without weights to one with them.

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

_PERCENT = 100
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is built."""

    gpus: tuple[str, ...] = ()
    """Compute capabilities like "sm89"; empty: of the GPU that is here."""
    profile: BatchProfile = field(default_factory=BatchProfile)
    optimization_level: int = 3
    """0 to 5: how long the builder searches for fast kernels."""
    workspace_mib: int | None = None
    """Scratch memory a layer may take on the GPU, in MiB; None: all of it."""
    timing_cache: Path | None = None
    """Where measured kernel times are kept from one build to the next."""
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
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
        optimization_level=settings.optimization_level,
        workspace_mib=settings.workspace_mib,
        layers=inspection.layers,
    )
    return _written(out, data, info)


def variant_for(bundle: Bundle, precision: Precision) -> EncoderVariant:
    """The variant of ``precision`` that every ONNX runtime can read.

    Raises:
        UsageError: the bundle has none; lists what it has.
    """
    portable = [one for one in bundle.image_encoders if one.runtime == "onnx" and one.source_size is None]
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
        UsageError: it has not; says what does the same there.
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
    """Parse, inspect and build one ONNX file; returns the plan's bytes and what the inspection found.

    Args:
        specs: its input, uint8 [N, H, W, 3], and its output, float32 [N, D].
    """
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
    """Give the builder the kernel times in ``path``, or an empty cache where there is no such file.

    Raises:
        UsageError: the file is no timing cache, or of another version or GPU.
    """
    with deprecations_allowed():
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise UsageError(f"{path}: no timing cache of this runtime and GPU: give another file, or remove it")


def write_timing_cache(config: Any, path: Path) -> None:
    """Keep the kernel times that the builder knows now."""
    with deprecations_allowed():
        write_bytes_atomic(path, bytes(config.get_timing_cache().serialize()))


def _serialized(loaded: Loaded, builder: Any, network: Any, config: Any, report: Report) -> bytes:
    """Build; Ctrl-C stops the builder at its next step."""
    monitor = _monitor(loaded.trt, Steps(report))
    config.progress_monitor = monitor
    with _stopped_by_interrupt(monitor.steps):
        data = builder.build_serialized_network(network, config)
    if monitor.steps.stopped:
        raise KeyboardInterrupt
    if data is None:
        raise CheckFailed(f"{loaded.runtime.name} {loaded.version} could not build the plan: {loaded.why()}")
    return bytes(data)


def _validate_stripping(loaded: Loaded, settings: Settings) -> None:
    """Kernels that take their weights later are linked by the driver (seen with TensorRT-RTX 1.7.1)."""
    if settings.strip_weights and gpu_here() is None:
        raise UsageError(
            f"{loaded.runtime.name} strips weights on a machine with a GPU only, and PyTorch sees none here: "
            "build it there, or leave out --strip-weights"
        )


class Steps:
    """The builder's nested phases as one number from 0 to 100. Called from the builder's own threads."""

    def __init__(self, report: Report) -> None:
        self.stopped = False
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins within ``parent``."""
        with self._lock:
            self._phases[name] = (parent, max(steps, 1), 0)
            self._show(name)

    def done(self, name: str, step: int) -> bool:
        """A step is done; False stops the build."""
        with self._lock:
            if name in self._phases:
                parent, steps, _ = self._phases[name]
                self._phases[name] = (parent, steps, min(step + 1, steps))
                self._show(name)
        return not self.stopped

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def _show(self, name: str) -> None:
        self._report(int(_PERCENT * min(self._fraction(name), 1.0)), name)

    def _fraction(self, name: str) -> float:
        """How much of the whole is done when ``name`` is what runs now: a phase is one step of its parent."""
        share, current = 0.0, self._phases.get(name)
        while current is not None:
            parent, steps, done = current
            share = (done + share) / steps
            current = self._phases.get(parent) if parent else None
        return share


def _monitor(trt: Any, steps: Steps) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings do not know super()
            self.steps = steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return steps.done(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            steps.finish(phase_name)

    return Monitor()


@contextmanager
def _stopped_by_interrupt(steps: Steps) -> Iterator[None]:
    """An exception must not cross the builder's C++ frames, so Ctrl-C only asks it to stop."""
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

    Triton loads plans as they are, so this is done before a repository is written. Needs the GPU of the plan.

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
    """Refuse to put a plan in the place of anything but an older plan.

    Raises:
        UsageError: ``out`` is a file, or a folder of something else.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UsageError(f"{out}: exists and is no plan: give a new folder, or remove it first")


def _written(out: Path, data: bytes, info: PlanInfo) -> TensorRtPlan:
    with replace_folder(out) as folder:
        write_plan(folder, data, info)
    return read_plan(out)
