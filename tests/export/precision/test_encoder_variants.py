"""Reduced precisions in the bundle: what is kept, what is refused, and what is said about their speed."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clipship.core.bundle import EncoderVariant, VocabularyFeatures, read_bundle
from clipship.core.cli.main import main
from clipship.core.comparison import VerificationSamples
from clipship.core.errors import CheckFailed, DataError, UsageError
from clipship.core.machine.processor import this_processor
from clipship.core.tolerances import TOLERANCES
from clipship.core.vocabulary import Vocabulary
from clipship.export.pack import _golden_first, bundle_from_method
from clipship.export.precision import encoder_variants as variants
from clipship.export.precision.encoder_variants import Profile, speed_line, speed_ratio
from clipship.export.reference import Picture
from clipship.export.verification import runners, verify
from clipship.export.verification.runners import Run
from clipship.export.verification.verify import verify_bundle
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of, verify_against_method, write_checkpoint

VOCABULARY = Vocabulary(names=NAMES)


def test_pack_keeps_the_variants_that_were_asked_for_and_says_what_they_gain(
    clip: Clip,
    pictures: list[Picture],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tell_way: Callable[[str], None],
) -> None:
    write_checkpoint(tmp_path / "run", method_of(clip, "coop"))
    (tmp_path / "images").mkdir()
    for picture in pictures[:40]:
        (tmp_path / "images" / picture.name).write_bytes(picture.data)
    places = [str(tmp_path / "run"), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "bundle")]
    precisions = ["--precision", "bf16", "--precision", "int8", "--precision", "int8"]
    assert main(["pack", *places, *precisions, "--opset", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("image_encoder.bf16.onnx: bf16; ONNX Runtime's CPU provider cannot run it")
    assert "x at batch 1" in lines[2]
    assert "x at batch 8" in lines[2]
    bundle = read_bundle(tmp_path / "bundle")
    variants_of = {
        runtime: [(one.file, one.precision, one.opset) for one in bundle.image_encoders if one.runtime == runtime]
        for runtime in ("onnx", "openvino")
    }
    assert variants_of["onnx"] == [
        ("image_encoder.onnx", "fp32", 20),
        ("image_encoder.bf16.onnx", "bf16", 20),
        ("image_encoder.int8.onnx", "int8", 20),
    ]
    if importlib.util.find_spec("openvino"):  # no files of its own; whether it has bfloat16 depends on the processor
        tell_way(f"OpenVINO has {', '.join(precision for _, precision, _ in variants_of['openvino'])}")
        assert variants_of["openvino"][0] == ("image_encoder.onnx", "fp32", 20)
        assert variants_of["openvino"][-1] == ("image_encoder.int8.onnx", "int8", 20)
        assert all(set(one.speed) == {"1", "8"} for one in bundle.image_encoders if one.runtime == "openvino")
    assert bundle.image_encoders[1].speed == {}
    assert set(bundle.image_encoders[2].speed) == {"1", "8"}
    assert {path.name for path in bundle.path.glob("*.onnx*")} == {
        *(one.file for one in bundle.image_encoders),
        "text_encoder.onnx",
    }
    compared = {(one["form"], one["provider"]) for one in bundle.verification()["comparisons"]}
    assert ("image_encoder.bf16.onnx", "bf16, emulated") in compared
    assert ("image_encoder.int8.onnx", "CPUExecutionProvider") in compared
    later = verify_bundle(bundle)
    assert later, str(later)
    assert {"image_encoder.onnx", "image_encoder.int8.onnx"} <= {one.form for one in later.comparisons}


def test_a_precision_that_fails_its_gate_is_not_kept_and_nothing_is_written(
    clip: Clip, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = replace(TOLERANCES["fp16"], min_centred_cosine=1.0)
    monkeypatch.setitem(TOLERANCES, "fp16", impossible)
    with pytest.raises(CheckFailed, match=r"fp16 is not close enough to PyTorch, nothing was written:\n.*centred"):
        bundle_from_method(
            method_of(clip, "zero-shot"),
            VOCABULARY,
            pictures[:40],
            tmp_path / "bundle",
            provenance={},
            profile=Profile(precisions=("fp16",)),
        )
    assert list(tmp_path.iterdir()) == []


def test_verify_passes_without_the_variant_that_pack_left_out_and_names_it(
    clip: Clip, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor where OpenVINO's int8 adds with saturation and ONNX Runtime's does not."""
    pytest.importorskip("openvino")
    by_openvino = runners.openvino_function

    def saturated(path: Path, precision: str) -> Run:
        run = by_openvino(path, precision)
        return run if precision == "fp32" else lambda rows: run(255 - rows)

    monkeypatch.setattr(variants, "openvino_function", saturated)
    monkeypatch.setattr(verify, "openvino_function", saturated)
    profile = Profile(precisions=("int8",))
    method = method_of(clip, "zero-shot")
    bundle = bundle_from_method(method, VOCABULARY, pictures, tmp_path / "b", provenance={}, profile=profile)
    assert [(variant.precision, variant.runtime) for variant in bundle.image_encoders] == [
        ("fp32", "onnx"),
        ("int8", "onnx"),
        ("fp32", "openvino"),
    ]
    later = verify_against_method(bundle, method, pictures)
    assert later, str(later)
    (reason,) = later.skipped
    assert reason.startswith("the bundle does not offer image_encoder.int8.onnx: int8 by OpenVINO, not close enough to")
    assert str(this_processor()) in reason
    assert "min_centred_cosine" in reason
    assert bundle.manifest.measured_on == this_processor()


def test_a_bundle_packed_without_openvino_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    features = np.eye(2, 4, dtype=np.float32)
    classifier = VocabularyFeatures(features=features, logit_scale=1.0)
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    samples = VerificationSamples(
        what="images", names=(), files=(), pixels=pixels, expected=features, reference="PyTorch"
    )
    offered, verification = variants.openvino_variants(tmp_path, [], samples, classifier)
    assert offered == []
    assert verification.skipped == (
        "the bundle offers no variant by OpenVINO, which was not installed where it was packed",
    )
    assert capsys.readouterr().err == "", "who has not installed it does not miss it"


def test_golden_samples_differ_in_a_folder_that_is_sorted() -> None:
    classes = np.eye(9, 4, dtype=np.float32)[np.repeat(np.arange(4), 10)]
    order = _golden_first(classes)
    assert [place // 10 for place in order[:4]] == [0, 1, 2, 3]
    assert sorted(order) == list(range(40))
    assert _golden_first(classes[:3]) == [0, 1, 2]


def test_too_few_images_are_refused_before_the_export(
    clip: Clip, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipship.export import pack

    monkeypatch.delattr(pack, "onnx_from_module")
    with pytest.raises(DataError, match=r"calibration on 31 images: .* needs 32 or more: give --images a larger"):
        bundle_from_method(
            method_of(clip, "zero-shot"),
            VOCABULARY,
            pictures[:31],
            tmp_path / "bundle",
            provenance={},
            profile=Profile(precisions=("int8",)),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precisions": ("fp8",)}, "precisions fp8: give some of fp16, bf16, int8, once"),
        ({"precisions": ("int8", "int8")}, "precisions int8, int8: give some of"),
        ({"opset": 19}, "opset 19 is no profile: give one of 18, 20, 23"),
    ],
)
def test_a_profile_checks_itself(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Profile(**given)


def test_speed_is_a_ratio_of_medians() -> None:
    def sleeping(seconds: float) -> Any:
        def run(rows: NDArray[Any]) -> NDArray[np.float32]:
            time.sleep(seconds)
            return np.zeros((len(rows), 2), np.float32)

        return run

    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    assert speed_ratio(sleeping(0.2), sleeping(0.02), pixels) > 2
    assert speed_ratio(sleeping(0.02), sleeping(0.2), pixels) < 0.5


@pytest.mark.parametrize(
    ("speed", "kept", "expected"),
    [
        ({"1": 1.5, "8": 0.9}, ("a", "b"), "f.onnx: int8, 2 nodes kept in float32; 1.50x at batch 1, 0.90x at batch 8"),
        ({"1": 1.04, "8": 0.9}, (), "f.onnx: int8; gains nothing here: 1.04x at batch 1, 0.90x at batch 8"),
    ],
)
def test_what_is_said_about_speed(speed: dict[str, float], kept: tuple[str, ...], expected: str) -> None:
    variant = EncoderVariant(file="f.onnx", precision="int8", runtime="onnx", opset=18, kept_fp32=kept, speed=speed)
    assert speed_line(variant).startswith(expected)
    assert json.loads(json.dumps(variant.to_json()))["speed"] == speed
