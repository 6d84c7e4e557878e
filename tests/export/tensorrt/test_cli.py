"""``clipship engine`` from the command line: results, exit codes, one-line errors; and the two runtimes' seam."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from clipship.core.bundle import Bundle
from clipship.core.cli.main import main
from clipship.core.errors import MissingExtraError, UsageError
from clipship.core.tensorrt_plan import read_plan
from clipship.export.tensorrt.runtime import (
    RUNTIMES,
    Loaded,
    buildable_gpus,
    gpu_here,
    load_runtime,
    typed_network,
    validated_gpus,
)


def test_a_plan_from_the_command_line(
    bundle: Bundle, rtx: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan"
    gpus = ["--gpu", "sm80", "--gpu", "sm89"]
    command = ["engine", str(bundle.path), "--runtime", "tensorrt-rtx", *gpus, "--precision", "fp16"]
    assert main([*command, "--max-batch", "4", "--workspace-mib", "256", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    info = read_plan(out).info
    assert printed == {"plan": str(out), **json.loads((out / "plan.json").read_text())}
    assert (info.gpus, info.precision, info.workspace_mib) == (("sm80", "sm89"), "fp16", 256)
    assert (info.profile.min, info.profile.opt, info.profile.max) == (1, 4, 4)
    assert info.bundle_digest == bundle.digest
    assert main([*command, "--out", str(out)]) == 0  # an older plan is replaced
    assert (
        f"{out}: tensorrt-rtx {info.runtime_version}, fp16 for sm80, sm89, batches 1 to 64" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "8.9"], "GPU '8.9' is not a compute capability like sm89: did you mean sm89?"),
        (["--gpu", "sm90"], "cannot build for sm90 here: give sm75 or sm80 or sm86"),
        (["--gpu", "sm89", "--max-batch", "0"], "give 1 <= min <= opt <= max"),
        (["--gpu", "sm89", "--opt-batch", "65"], "batches min 1, opt 65, max 64"),
        (["--gpu", "sm89", "--optimization-level", "7"], "optimisation level 7"),
        (["--gpu", "sm89", "--timing-cache", "times"], "has no --timing-cache"),
        (["--gpu", "sm89", "--precision", "fp8"], "'fp8' is not one of"),
        (["--refit", "absent"], "no plan there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    bundle: Bundle,
    rtx: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "plan"
    assert main(["engine", str(bundle.path), "--runtime", "tensorrt-rtx", "--out", str(out), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clipship: ")
    assert message in line
    assert not out.exists()


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", str(tmp_path / "absent"), "--out", str(tmp_path / "plan")]) == 2
    assert "no such folder: give a bundle that clipship pack wrote" in capsys.readouterr().err


@pytest.mark.skipif(gpu_here() is not None, reason="says what happens without a GPU")
def test_no_gpu_given_and_none_here(rtx: Loaded) -> None:
    with pytest.raises(UsageError, match="no --gpu was given and PyTorch sees no GPU here: give one of sm75, sm80"):
        validated_gpus(rtx, ())


def test_gpus_are_sorted_and_unique(rtx: Loaded) -> None:
    assert validated_gpus(rtx, ("sm120", "sm80", "sm120")) == ("sm80", "sm120")


def module_of(version: str) -> types.ModuleType:
    """What ``import tensorrt`` would give, as far as loading it looks."""
    module = types.ModuleType("tensorrt")
    module.__dict__.update(__version__=version, ILogger=type("ILogger", (), {"__init__": lambda self: None}))
    return module


def test_a_runtime_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed: run pip install 'clipship\[tensorrt\]'"):
        load_runtime("tensorrt")


def test_a_runtime_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module_of("10.9.0.34"))
    with pytest.raises(UsageError, match=r"tensorrt 10.9.0.34 is too old, 10.12 or later is needed: pip install -U"):
        load_runtime("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module_of("11.5.0.1"))
    assert load_runtime("tensorrt").version == "11.5.0.1"


@pytest.mark.skipif(gpu_here() is not None, reason="says what happens without a GPU")
def test_tensorrt_builds_on_its_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module_of("10.14.1.48"))
    with pytest.raises(UsageError, match="builds on the GPU it builds for, and PyTorch sees none here"):
        buildable_gpus(load_runtime("tensorrt"))


def test_tensorrt_takes_the_gpu_that_is_here_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module_of("10.14.1.48"))
    monkeypatch.setattr("clipship.export.tensorrt.runtime.gpu_here", lambda: "sm90")
    loaded = load_runtime("tensorrt")
    assert validated_gpus(loaded, ()) == ("sm90",)
    assert validated_gpus(loaded, ("sm90",)) == ("sm90",)
    with pytest.raises(UsageError, match=r"tensorrt 10.14.1.48 cannot build for sm89 here: give sm90"):
        validated_gpus(loaded, ("sm89",))


def test_the_network_is_strongly_typed_with_and_without_the_flag(rtx: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 10 needs the flag; later versions may not have it any more."""
    flag = rtx.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    builder = rtx.trt.Builder(rtx.logger)
    assert typed_network(rtx, builder).get_flag(flag)
    without = types.SimpleNamespace(NetworkDefinitionCreationFlag=object())
    assert typed_network(Loaded(runtime=RUNTIMES["tensorrt"], trt=without, logger=None), builder).num_layers == 0
