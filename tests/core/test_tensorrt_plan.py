"""The record beside a plan: what it says, what it refuses, and every mismatch with what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.errors import PlanError, UsageError
from clipship.core.files import sha256_of_bytes
from clipship.core.tensorrt_plan import (
    BatchProfile,
    PlanInfo,
    Target,
    TensorRtPlan,
    capability_of,
    gpu_name,
    mismatches,
    read_plan,
    validate_plan,
    variant_digest,
    variant_of,
    write_plan,
)
from clipship.core.tensors import embedding_tensor, image_tensor

DATA = b"machine code"
INFO = PlanInfo(
    runtime="tensorrt",
    runtime_version="10.14.1.48",
    gpus=("sm89",),
    platform="linux",
    precision="fp16",
    profile=BatchProfile(),
    input=image_tensor(224),
    output=embedding_tensor(512),
    onnx_file="image_encoder.fp16.onnx",
    onnx_digest="a" * 64,
    bundle_digest="b" * 64,
    plan_digest=sha256_of_bytes(DATA),
    plan_bytes=len(DATA),
    build_s=1.5,
    layers={"MATRIX_MULTIPLY HALF": 25},
)
HERE = Target(runtime="tensorrt", version="10.14.1.48", gpu="sm89", platform="linux")


@dataclass(frozen=True)
class OnlyVariants:
    """The part of a bundle that a plan is compared with."""

    digest_of_fp16: str
    path: Path = Path("bundle")
    image_encoders: tuple[EncoderVariant, ...] = (
        EncoderVariant(file="image_encoder.onnx", precision="fp32", runtime="onnx", opset=18),
        EncoderVariant(file="image_encoder.fp16.onnx", precision="fp16", runtime="onnx", opset=18),
    )
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files.update({"image_encoder.onnx": "0" * 64, "image_encoder.fp16.onnx": self.digest_of_fp16})


def bundle_with(digest: str) -> Bundle:
    return cast(Bundle, OnlyVariants(digest))


def test_written_and_read_again(tmp_path: Path) -> None:
    write_plan(tmp_path, DATA, INFO)
    plan = read_plan(tmp_path)
    assert plan.info == INFO
    assert plan.data == DATA


def test_unknown_keys_are_ignored_and_missing_ones_refused() -> None:
    content = json.loads(json.dumps(INFO.to_json()))
    assert content["profile"] == {"least": 1, "best": 8, "most": 64}
    assert PlanInfo.from_json({**content, "colour": "blue"}) == INFO
    for key in ("gpus", "profile", "input", "onnx_digest", "layers"):
        with pytest.raises(PlanError, match="malformed"):
            PlanInfo.from_json({name: value for name, value in content.items() if name != key})
    with pytest.raises(PlanError, match="runtime 'torch' is not one of tensorrt, tensorrt-rtx"):
        PlanInfo.from_json({**content, "runtime": "torch"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "plan.json").unlink(), "no plan there"),
        (lambda folder: (folder / "model.plan").unlink(), "model.plan is missing"),
        (lambda folder: (folder / "model.plan").write_bytes(b"other code"), "not the plan that plan.json describes"),
        (lambda folder: (folder / "plan.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "plan.json").write_text('{"format": "x"}'), "format 'x' version None is not"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    write_plan(tmp_path, DATA, INFO)
    break_it(tmp_path)
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({"runtime": "tensorrt-rtx"}, {}, "TensorRT, and so Triton, cannot load: build it again .* --runtime tensorrt"),
        ({}, {"runtime": "tensorrt-rtx"}, "which TensorRT-RTX cannot load"),
        ({}, {"gpu": "sm80"}, "it is for sm89 and would run on sm80: build it again .* --gpu sm80"),
        ({"hardware_compatible": True}, {"gpu": "sm75"}, "would run on sm75"),
        ({}, {"version": "10.13.0.35"}, "10.14.1.48 and would run on 10.13.0.35: .*--version-compatible"),
        ({}, {"version": "11.0"}, "would run on 11.0"),
        ({"version_compatible": True}, {"version": "10.13"}, "version-compatible, of tensorrt 10.14.1.48"),
        ({}, {"platform": "win32"}, "built on linux and would run on win32"),
        ({"weights_stripped": True}, {}, "weights are stripped: put them back with clipship engine"),
    ],
)
def test_each_mismatch_says_what_to_do(changes: dict[str, Any], target: dict[str, Any], message: str) -> None:
    plan = TensorRtPlan(path=Path("plans/prints"), info=replace(INFO, **changes))
    with pytest.raises(PlanError, match=message):
        validate_plan(plan, replace(HERE, **target))
    assert len(tuple(mismatches(plan.info, replace(HERE, **target)))) == 1


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({}, {}),
        ({}, {"version": None, "gpu": None, "platform": None}),
        ({}, {"version": "10.14"}),
        ({"gpus": ("sm80", "sm89")}, {}),
        ({"hardware_compatible": True}, {"gpu": "sm120"}),
        ({"version_compatible": True}, {"version": "10.15.0.1"}),
        ({"version_compatible": True}, {"version": "11.1"}),
        ({"weights_stripped": True}, {"puts_weights_back": True}),
    ],
)
def test_what_fits_is_not_refused(changes: dict[str, Any], target: dict[str, Any]) -> None:
    assert tuple(mismatches(replace(INFO, **changes), replace(HERE, **target))) == ()


def test_several_mismatches_are_all_named() -> None:
    target = Target(runtime="tensorrt", version="9.0", gpu="sm75", platform="win32")
    assert len(tuple(mismatches(INFO, target, bundle_with("c" * 64)))) == 4


def test_weights_in_a_file_of_their_own_count() -> None:
    bundle = bundle_with("a" * 64)
    variant = bundle.image_encoders[1]
    alone = variant_digest(bundle, variant)
    assert alone == "a" * 64
    both = cast(Bundle, OnlyVariants("a" * 64, files={"image_encoder.fp16.onnx.data": "d" * 64}))
    other = cast(Bundle, OnlyVariants("a" * 64, files={"image_encoder.fp16.onnx.data": "e" * 64}))
    assert len({alone, variant_digest(both, variant), variant_digest(other, variant)}) == 3
    assert variant_of(INFO, both) is None


def test_the_encoders_bytes_decide_whose_plan_it_is() -> None:
    variant = variant_of(INFO, bundle_with("a" * 64))
    assert variant is not None
    assert variant.precision == "fp16"
    assert tuple(mismatches(INFO, HERE, bundle_with("a" * 64))) == ()
    (reason,) = mismatches(INFO, HERE, bundle_with("c" * 64))
    assert "image_encoder.fp16.onnx (aaaaaaaaaaaaaaaa) that bundle does not have" in reason


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("8.9", "did you mean sm89?"),
        ("SM_89", "did you mean sm89?"),
        ("L4", "did you mean sm89?"),
        ("NVIDIA GeForce RTX 4090", "did you mean sm89?"),
        ("5090", "did you mean sm120?"),
        ("h100", "did you mean sm90?"),
        ("sm98", "did you mean sm90 or sm89 or sm87?"),
        ("cpu", "accepted: sm100, sm103"),
    ],
)
def test_a_gpu_that_is_no_compute_capability(given: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        gpu_name(given)
    assert f"GPU {given!r} is not a compute capability like sm89: " in str(caught.value)
    assert hint in str(caught.value)


def test_compute_capabilities() -> None:
    assert [capability_of(gpu_name(gpu)) for gpu in ("sm75", "sm89", "sm120")] == ["7.5", "8.9", "12.0"]


@pytest.mark.parametrize(("smallest", "best", "largest"), [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_profiles_that_contradict_themselves(smallest: int, best: int, largest: int) -> None:
    with pytest.raises(UsageError, match="give 1 <= min <= opt <= max"):
        BatchProfile(min=smallest, opt=best, max=largest)


def test_a_batch_outside_the_profile() -> None:
    profile = BatchProfile(min=2, opt=2, max=4)
    profile.validate(2)
    profile.validate(4)
    for batch in (1, 5):
        with pytest.raises(UsageError, match=rf"a batch of {batch} images is outside the plan's profile \(2 to 4\)"):
            profile.validate(batch)
