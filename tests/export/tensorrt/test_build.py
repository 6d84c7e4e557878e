"""Real builds with TensorRT-RTX, which needs no GPU: every precision, profiles, flags, progress, Ctrl-C, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.errors import CheckFailed, PlanError, UsageError
from clipship.core.files import sha256_of
from clipship.core.precisions import Precision
from clipship.core.tensorrt_plan import BatchProfile, read_plan
from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.export.encoders import ImageEncoder
from clipship.export.onnx_graph import load_onnx, onnx_from_module, save_onnx
from clipship.export.precision.half_precision import typed_model
from clipship.export.tensorrt import build
from clipship.export.tensorrt.build import (
    Settings,
    Steps,
    plan_from_bundle,
    read_timing_cache,
    refit_plan,
    validate_switches,
    variant_for,
    write_timing_cache,
)
from clipship.export.tensorrt.run import load_plan
from clipship.export.tensorrt.runtime import RUNTIMES, Loaded, deprecations_allowed, gpu_here
from clipship.training.model.clip import Clip
from tests.export.conftest import method_of
from tests.export.tensorrt.graphs import one_node_model, with_variants

SETTINGS = Settings(gpus=("sm89",), profile=BatchProfile(min=1, opt=2, max=7))


@pytest.mark.parametrize(
    ("precision", "product"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("bf16", "BF16"), ("int8", "FLOAT")]
)
def test_every_precision_builds_and_says_what_it_is(
    bundle: Bundle, rtx: Loaded, tmp_path: Path, precision: Precision, product: str
) -> None:
    plan = plan_from_bundle(bundle, tmp_path / "plan", rtx, precision=precision, settings=SETTINGS)
    info = plan.info
    variant = variant_for(bundle, precision)
    assert (info.runtime, info.runtime_version, info.gpus) == ("tensorrt-rtx", rtx.version, ("sm89",))
    assert info.onnx_digest == sha256_of(bundle.path / variant.file)
    assert info.plan_digest == sha256_of(plan.file)
    assert info.plan_bytes == plan.file.stat().st_size > 50_000
    assert (info.input.dtype, info.output.dtype) == ("uint8", "float32")
    assert info.profile == SETTINGS.profile
    assert info.layers[f"MATRIX_MULTIPLY {product}"] >= 12  # 3 blocks of 4 products, and those of attention
    assert {kind for kind in info.layers if kind.startswith(("NORMALIZATION", "SOFTMAX"))} == {
        "NORMALIZATION FLOAT",
        "SOFTMAX FLOAT",
    }
    assert ("QUANTIZE INT8" in info.layers) == (precision == "int8")
    assert sorted(path.name for path in plan.path.iterdir()) == ["model.plan", "plan.json"]
    assert info.build_s > 0


def test_attention_as_one_node_builds_in_every_precision(clip: Clip, rtx: Loaded, tmp_path: Path) -> None:
    """Opset 23 has the operator; TensorRT builds it in float32 only when it may take it apart."""
    path = tmp_path / "opset23.onnx"
    specs = (image_tensor(32), embedding_tensor(32))
    sample = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        encoder = ImageEncoder(method_of(clip, "sync-clip"))
        onnx_from_module(encoder, sample, path, input_spec=specs[0], output_spec=specs[1], metadata={}, opset=23)
    plain = load_onnx(path)
    assert sum(node.op_type == "Attention" for node in plain.graph.node) == 3
    for precision in get_args(Precision)[1:3]:
        save_onnx(typed_model(plain, precision, frozenset()), tmp_path / f"{precision}.onnx")
    cases: list[tuple[str, Precision, str]] = [
        ("opset23", "fp32", "FLOAT"),
        ("fp16", "fp16", "HALF"),
        ("bf16", "bf16", "BF16"),
    ]
    for name, precision, dtype in cases:
        data, found = build.build_plan(rtx, tmp_path / f"{name}.onnx", specs, precision, SETTINGS)
        assert found.layers[f"ATTENTION_OUTPUT {dtype}"] == 3
        assert len(data) > 50_000


def test_one_plan_for_several_gpus(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    settings = replace(SETTINGS, gpus=("sm120", "sm80", "sm80"))
    plan = plan_from_bundle(bundle, tmp_path / "plan", rtx, precision="fp16", settings=settings)
    assert plan.info.gpus == ("sm80", "sm120")


def test_the_configuration_is_what_was_asked_for(bundle: Bundle, rtx: Loaded) -> None:
    trt = rtx.trt
    settings = replace(SETTINGS, gpus=("sm80", "sm86"), workspace_mib=64, optimization_level=1, strip_weights=True)
    builder = trt.Builder(rtx.logger)
    config = build._config(rtx, builder, bundle.manifest.inputs_outputs["image_encoder.onnx"][0], settings)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.get_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.builder_optimization_level == 1
    assert [config.get_compute_capability(slot).name for slot in range(2)] == ["SM80", "SM86"]
    assert config.num_optimization_profiles == 1


def test_the_configuration_of_tensorrt(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    """The same calls on TensorRT-RTX's module, which has all of TensorRT's names."""
    trt = rtx.trt
    loaded = Loaded(runtime=RUNTIMES["tensorrt"], trt=trt, logger=rtx.logger)
    settings = replace(SETTINGS, version_compatible=True, hardware_compatible=True, timing_cache=tmp_path / "cache")
    builder = trt.Builder(rtx.logger)
    config = build._config(loaded, builder, bundle.manifest.inputs_outputs["image_encoder.onnx"][0], settings)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert not config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.num_compute_capabilities == 0  # a plan is for the GPU it is built on
    with deprecations_allowed():
        assert config.get_timing_cache() is not None


def test_the_timing_cache_is_kept_and_another_file_refused(rtx: Loaded, tmp_path: Path) -> None:
    """The calls are those of TensorRT; TensorRT-RTX has them, but gives an empty cache and takes any bytes."""
    path = tmp_path / "cache"
    builder = rtx.trt.Builder(rtx.logger)
    config = builder.create_builder_config()
    read_timing_cache(config, path)
    write_timing_cache(config, path)
    assert path.stat().st_size > 0
    read_timing_cache(builder.create_builder_config(), path)

    class OtherGpu:
        def create_timing_cache(self, data: bytes) -> None:
            assert data == path.read_bytes()

    with pytest.raises(UsageError, match="no timing cache of this runtime"):
        read_timing_cache(OtherGpu(), path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(SETTINGS, timing_cache=Path("cache")), "tensorrt-rtx has no --timing-cache"),
        (replace(SETTINGS, version_compatible=True), "tensorrt-rtx has no --version-compatible"),
        (replace(SETTINGS, hardware_compatible=True), "give --gpu once for each GPU"),
    ],
)
def test_switches_that_a_runtime_lacks_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_switches(RUNTIMES["tensorrt-rtx"], settings)
    validate_switches(RUNTIMES["tensorrt"], settings)


def odd_bundle(bundle: Bundle, out: Path, data: bytes) -> Bundle:
    """``bundle`` with ``data`` for its float16 variant."""
    variant = EncoderVariant(file="odd.onnx", precision="fp16", runtime="onnx", opset=18)
    return with_variants(bundle, out, [(variant, data)])


def test_a_graph_that_cannot_be_built_leaves_the_old_plan(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    old = plan_from_bundle(bundle, out, rtx, precision="fp32", settings=SETTINGS)
    odd = odd_bundle(bundle, tmp_path / "odd", one_node_model("Det"))
    with pytest.raises(UsageError, match="does not support operator Det of node 'the_node'"):
        plan_from_bundle(odd, out, rtx, precision="fp16", settings=SETTINGS)
    same_types = odd_bundle(bundle, tmp_path / "same", bundle.image_encoder.read_bytes())
    with pytest.raises(CheckFailed, match="no matrix product is HALF"):
        plan_from_bundle(same_types, out, rtx, precision="fp16", settings=SETTINGS)
    assert read_plan(out).info == old.info
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_leaves_no_half_plan(
    bundle: Bundle, rtx: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipship.core.tensorrt_plan.write_json_atomic", full)
    with pytest.raises(OSError, match="No space"):
        plan_from_bundle(bundle, tmp_path / "plan", rtx, precision="fp16", settings=SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_bundle_lacks(bundle: Bundle, tmp_path: Path) -> None:
    only = with_variants(bundle, tmp_path / "only", [])
    with pytest.raises(UsageError, match="no int8 variant for TensorRT, it has fp32"):
        variant_for(only, "int8")


def test_a_folder_of_something_else_is_left_alone(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UsageError, match=r"is no plan|is a file"):
            plan_from_bundle(bundle, out, rtx, precision="fp32", settings=SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimization_level": 6}, "give 0"),
        ({"workspace_mib": 0}, "give 1 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


def test_progress_rises_through_nested_phases_to_the_end(
    bundle: Bundle, rtx: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []

    class Watched(Steps):
        def __init__(self, report: object) -> None:
            super().__init__(lambda done, note="": seen.append((done, note)))

    monkeypatch.setattr(build, "Steps", Watched)
    plan_from_bundle(bundle, tmp_path / "plan", rtx, precision="fp32", settings=SETTINGS)
    percents = [done for done, _ in seen]
    assert len({note for _, note in seen}) > 3
    assert 0 <= min(percents) < 20
    assert 80 < max(percents) <= 100


def test_a_phase_is_one_step_of_its_parent() -> None:
    seen: list[int] = []
    steps = Steps(lambda done, note="": seen.append(done))
    steps.phase_start("whole", None, 4)
    steps.step_complete("whole", 0)
    steps.phase_start("part", "whole", 2)
    steps.step_complete("part", 0)
    assert seen == [0, 25, 25, 37]


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from clipship.core.bundle import read_bundle
from clipship.export.tensorrt import build
from clipship.export.tensorrt.runtime import load_runtime
from tests.export.tensorrt.test_build import SETTINGS

class Interrupted(build.Steps):
    def phase_start(self, phase_name, parent_phase, num_steps):
        os.kill(os.getpid(), signal.SIGINT)
        super().phase_start(phase_name, parent_phase, num_steps)

build.Steps = Interrupted
before = signal.getsignal(signal.SIGINT)
bundle, rtx = read_bundle(Path(sys.argv[1])), load_runtime("tensorrt-rtx")
try:
    build.plan_from_bundle(bundle, Path(sys.argv[2]), rtx, precision="fp32", settings=SETTINGS)
except KeyboardInterrupt:
    sys.exit(7 if signal.getsignal(signal.SIGINT) is before else 8)
"""


def test_ctrl_c_stops_the_builder(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    """In a process of its own: with OpenVINO's threads beside it, a builder that is stopped crashes now and then."""
    command = [sys.executable, "-c", INTERRUPTED, str(bundle.path), str(tmp_path / "plan")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_in_another_thread(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    arguments = {"precision": "fp32", "settings": SETTINGS}
    thread = threading.Thread(target=plan_from_bundle, args=(bundle, tmp_path / "plan", rtx), kwargs=arguments)
    thread.start()
    thread.join()
    assert read_plan(tmp_path / "plan").info.precision == "fp32"


@pytest.mark.skipif(gpu_here() is not None, reason="says what happens without a GPU")
def test_without_a_gpu_loading_running_and_refitting_say_so(bundle: Bundle, rtx: Loaded, tmp_path: Path) -> None:
    plan = plan_from_bundle(bundle, tmp_path / "plan", rtx, precision="fp32", settings=SETTINGS)
    with pytest.raises(UsageError, match="runs on a GPU, and PyTorch sees none here"):
        load_plan(plan, bundle)
    with pytest.raises(UsageError, match="has its weights"):
        refit_plan(plan, bundle, tmp_path / "new")
    stripped = replace(plan, info=replace(plan.info, weights_stripped=True))
    with pytest.raises(PlanError, match="weights are stripped: put them back"):
        load_plan(stripped)
    with pytest.raises(UsageError, match="runs on a GPU"):
        refit_plan(stripped, bundle, tmp_path / "new")
    strip = replace(SETTINGS, strip_weights=True)
    with pytest.raises(UsageError, match="strips weights on a machine with a GPU only"):
        plan_from_bundle(bundle, tmp_path / "s", rtx, precision="fp32", settings=strip)
    specs = (plan.info.input, plan.info.output)
    with pytest.raises(CheckFailed, match=r"tensorrt-rtx .* could not build the plan: .*CUDA"):  # what it would say
        build.build_plan(rtx, bundle.image_encoder, specs, "fp32", strip)
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(gpu_here() is None, reason="runs a plan, which needs a GPU")
@pytest.mark.parametrize("strip", [False, True])
def test_with_a_gpu_the_plan_gives_pytorchs_features(bundle: Bundle, rtx: Loaded, tmp_path: Path, strip: bool) -> None:
    settings = Settings(gpus=(str(gpu_here()),), profile=BatchProfile(min=1, opt=2, max=3), strip_weights=strip)
    plan = plan_from_bundle(bundle, tmp_path / "plan", rtx, precision="fp32", settings=settings)
    if strip:
        plan = refit_plan(plan, bundle, tmp_path / "refitted")
    golden = bundle.golden()
    found = load_plan(plan, bundle).features(golden.pixels)
    assert abs(found - golden.embedding).max() <= 1e-4
