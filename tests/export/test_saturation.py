"""int8 where pairs of products are added with saturation: weights that cannot saturate, and the gate for others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from clipship.core.bundle import read_bundle, write_manifest_content
from clipship.core.errors import CheckFailed
from clipship.core.vocabulary import Vocabulary
from clipship.export.pack import bundle_from_method
from clipship.export.precision import quantization as quantize
from clipship.export.precision.encoder_variants import Profile
from clipship.export.precision.quantization import quantized_onnx
from clipship.export.reference import Picture, pixels_of
from clipship.export.saturation import can_saturate, emulated_int8, int8_weights, saturating_product
from clipship.export.verification.verify import verify_bundle
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, OPSETS, method_of
from tests.export.graphs import centred_cosines, features, image_encoder


def weights_of_all_steps(weight_KF: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 as version 0.5 wrote it, and as quantizers do that think of VNNI only: the largest weight is 127."""
    steps_F = np.maximum(np.abs(weight_KF).max(axis=0), 1e-30) / 127
    return np.round(weight_KF / steps_F).astype(np.int8), steps_F.astype(np.float32)


def by_hand(x_MK: NDArray[np.int8], weight_KF: NDArray[np.int8]) -> NDArray[np.int64]:
    """VPMADDUBSW as the manual writes it, and what kernels take off again for the activations' offset."""
    sums = np.zeros((len(x_MK), weight_KF.shape[1]), np.int64)
    for row, column in np.ndindex(*sums.shape):
        for pair in range(0, len(weight_KF), 2):
            inputs = range(pair, min(pair + 2, len(weight_KF)))
            exact = sum((int(x_MK[row, k]) + 128) * int(weight_KF[k, column]) for k in inputs)
            sums[row, column] += min(max(exact, -32768), 32767) - 128 * sum(int(weight_KF[k, column]) for k in inputs)
    return sums


@pytest.mark.parametrize("inputs", [1, 2, 7, 64])
def test_the_emulation_is_the_instruction(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    x = rng.integers(-128, 128, (5, inputs), dtype=np.int8)
    weight = rng.integers(-127, 128, (inputs, 6), dtype=np.int8)
    x[0], weight[:, 0], weight[:, 1] = 127, 127, -127
    np.testing.assert_array_equal(saturating_product(x, weight), by_hand(x, weight))
    saturates = (saturating_product(x, weight) != x.astype(np.int64) @ weight.astype(np.int64)).any(axis=0)
    assert saturates[:2].all() == (inputs > 1)
    assert not saturates[~can_saturate(weight).any(axis=0)].any()


def test_what_does_not_saturate_is_exact() -> None:
    """3,072 inputs, whose sums no float32 holds."""
    x = np.full((2, 3072), 127, np.int8)
    weight = np.full((3072, 1), 64, np.int8)
    assert not can_saturate(weight).any()
    assert saturating_product(x, weight).tolist() == [[3072 * 127 * 64]] * 2
    weight[-1] = 65
    assert can_saturate(weight).sum() == 1
    assert saturating_product(x, weight).tolist() == [[3072 * 127 * 64 + 127 - (255 * 129 - 32767)]] * 2


@pytest.mark.parametrize("kind", ["normal", "heavy", "equal", "opposite", "zero", "odd", "tiny"])
def test_weights_cannot_saturate_and_lose_no_more_than_half_a_step(kind: str) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((31 if kind == "odd" else 32, 9)).astype(np.float32)
    weight = {
        "heavy": rng.standard_t(2, weight.shape).astype(np.float32),
        "equal": np.ones_like(weight),
        "opposite": np.resize([1.0, -1.0], weight.shape[::-1]).T.astype(np.float32).copy(),
        "zero": np.zeros_like(weight),
        "tiny": weight * np.float32(1e-25),
    }.get(kind, weight)
    int8_KF, steps_F = int8_weights(weight)
    assert not can_saturate(int8_KF).any()
    assert (np.abs(int8_KF * steps_F - weight) <= 0.501 * steps_F).all()
    coarsest = 2 * np.abs(weight).max(axis=0) / 127
    assert (steps_F <= np.maximum(coarsest, 1e-30)).all(), "never coarser than weights of 7 bits"
    if kind == "opposite":
        assert np.abs(int8_KF).max() == 127, "weights of unlike sign may be as large as they are"


@pytest.fixture(scope="module")
def pixels(clip: Clip, pictures: list[Picture]) -> NDArray[np.uint8]:
    return pixels_of(pictures[:40], clip.image_spec)


def test_no_product_of_the_default_variant_can_saturate_and_its_emulation_is_the_variant(
    clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    source = image_encoder(method_of(clip, "zero-shot"), tmp_path / "fp32.onnx")
    quantized_onnx(source, tmp_path / "int8.onnx", pixels)
    stored = [onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    products = [one for one in stored if one.dtype == np.int8 and one.ndim == 2]
    assert len(products) == 12
    assert not any(can_saturate(one).any() for one in products)
    given = emulated_int8(tmp_path / "int8.onnx")(pixels[:8])
    np.testing.assert_allclose(given, features(tmp_path / "int8.onnx", pixels[:8]), atol=2e-3)
    assert centred_cosines(features(source, pixels[:8]), given).mean() > 0.998


@pytest.mark.parametrize("opset", OPSETS)
def test_a_variant_that_would_be_wrong_without_vnni_is_refused_on_every_processor(
    clip: Clip, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int
) -> None:
    method, vocabulary = method_of(clip, "zero-shot"), Vocabulary(names=NAMES)
    profile = Profile(precisions=("int8",), opset=opset)
    monkeypatch.setattr(quantize, "int8_weights", weights_of_all_steps)
    monkeypatch.setattr(quantize, "_compared", lambda *_: _Passes())  # as calibration on a processor with VNNI finds
    with pytest.raises(CheckFailed, match=r"int8 is not close enough to PyTorch, nothing was written:\n") as refused:
        bundle_from_method(method, vocabulary, pictures[:40], tmp_path / "bundle", provenance={}, profile=profile)
    row = next(line for line in str(refused.value).splitlines() if "int8, emulated" in line)
    assert row.startswith("FAILED images                 int8, emulated        batch 40 ")
    assert "mean_centred_cosine" in row
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    bundle = bundle_from_method(method, vocabulary, pictures[:40], tmp_path / "bundle", provenance={}, profile=profile)
    rows = [one for one in bundle.verification()["comparisons"] if one["provider"] == "int8, emulated"]
    assert [(one["count"], one["passed"]) for one in rows] == [(8, True)]


def test_verify_finds_it_in_a_bundle_that_was_packed_before(
    clip: Clip, pictures: list[Picture], pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, profile = method_of(clip, "zero-shot"), Profile(precisions=("int8",))
    folder = tmp_path / "bundle"
    bundle_from_method(method, Vocabulary(names=NAMES), pictures[:40], folder, provenance={}, profile=profile)
    assert not [one for one in verify_bundle(read_bundle(folder)).comparisons if one.provider == "int8, emulated"]
    monkeypatch.setattr(quantize, "int8_weights", weights_of_all_steps)
    monkeypatch.setattr(quantize, "_compared", lambda *_: _Passes())
    quantized_onnx(folder / "image_encoder.onnx", folder / "image_encoder.int8.onnx", pixels)
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_manifest_content(folder, content)
    (row,) = (one for one in verify_bundle(read_bundle(folder)).comparisons if one.provider == "int8, emulated")
    assert not row
    assert row.form == "image_encoder.int8.onnx"


class _Passes:
    """A comparison that is true."""

    problem = ""
    mean_centred_cosine = 1.0

    def __bool__(self) -> bool:
        return True


ON_HASWELL = """
import sys, numpy
from clipship.core.machine.runtimes import open_encoder
for file, runtime, result in zip(*[iter(sys.argv[2:])] * 3):
    numpy.save(result, open_encoder(file, runtime, "int8", 1)(numpy.load(sys.argv[1])))
"""


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no qemu-user: apt-get install qemu-user")
def test_real_kernels_without_vnni_agree_with_the_emulation(
    clip: Clip, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime and OpenVINO on an emulated Haswell, a processor with AVX2 and nothing later.

    The default variant gives the features that it gives here. Weights of all steps give others, and just those that the
    NumPy emulation gives: so the test could fail, and the gate says no for the right reason.
    """
    source = image_encoder(method_of(clip, "zero-shot"), tmp_path / "fp32.onnx")
    quantized_onnx(source, tmp_path / "safe.onnx", pixels)
    monkeypatch.setattr(quantize, "int8_weights", weights_of_all_steps)
    quantized_onnx(source, tmp_path / "unsafe.onnx", pixels)
    expected = features(source, pixels[:8])
    runtimes = ["onnx", *(["openvino"] if _has_openvino() else [])]
    there = _on_haswell(
        tmp_path, pixels[:8], [(variant, runtime) for variant in ("safe", "unsafe") for runtime in runtimes]
    )
    for (variant, runtime), given in there.items():
        emulated = emulated_int8(tmp_path / f"{variant}.onnx")(pixels[:8])
        sys.stdout.write(f"{variant}, {runtime} on Haswell: centred {centred_cosines(expected, given).mean():.5f}\n")
        assert centred_cosines(emulated, given).mean() > 0.9995, (variant, runtime)
        assert (centred_cosines(expected, given).mean() > 0.998) == (variant == "safe"), (variant, runtime)


def _has_openvino() -> bool:
    from importlib.util import find_spec

    return find_spec("openvino") is not None


def _on_haswell(
    folder: Path, pixels: NDArray[np.uint8], what: list[tuple[str, str]]
) -> dict[tuple[str, str], NDArray[np.float32]]:
    """Features of ``what``, graphs and runtimes, in a process of an emulated processor."""
    np.save(folder / "pixels.npy", pixels)
    results = {each: folder / "{}-{}.npy".format(*each) for each in what}
    asked: list[Any] = [
        part for (variant, runtime), result in results.items() for part in (folder / f"{variant}.onnx", runtime, result)
    ]
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", ON_HASWELL, folder / "pixels.npy", *asked]
    here = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    run = subprocess.run(
        list(map(str, command)),
        env={**here, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {each: np.load(result) for each, result in results.items()}
