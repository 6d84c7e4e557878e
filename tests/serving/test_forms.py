"""Which form of the image encoder is served, and that it really is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipship.core.bundle import Bundle, EncoderForm, read_bundle, write_manifest
from clipship.core.errors import UsageError
from clipship.core.images import pixels_from_bytes
from clipship.serving.check import packages_of
from clipship.serving.client import Classifier
from clipship.serving.config import config_from_text
from clipship.serving.local import LocalTransport
from clipship.serving.repository import repository_from_bundle
from clipship.serving.server import start_server
from tests.serving.bundles import SPEC, image_encoder_model, reference_answers, write_bundle

OTHER = "image_encoder.int8.onnx"
PORTABLE = EncoderForm(file="image_encoder.onnx", precision="fp32", runtime="onnx", opset=18)
SLOW = replace(PORTABLE, runtime="openvino", speed={"1": 0.5, "8": 1.1})
FAST = replace(PORTABLE, runtime="openvino", speed={"1": 0.9, "8": 1.6})
INT8 = EncoderForm(file=OTHER, precision="int8", runtime="onnx", opset=18, speed={"1": 3.0, "8": 2.0})
INT8_FAST = replace(INT8, runtime="openvino", speed={"1": 2.5, "8": 3.5})
ROUNDED = image_encoder_model(rounding=0.02)
BF16 = replace(INT8, file="image_encoder.bf16.onnx", precision="bf16", speed={})


def _bundle(folder: Path, *forms: EncoderForm) -> Bundle:
    """The stand-in bundle with further forms; the other file has weights that are a little off, so that one sees it."""
    bundle = write_bundle(folder)
    for form in forms:
        if form.file != PORTABLE.file:
            (folder / form.file).write_bytes(ROUNDED)
    write_manifest(folder, replace(bundle.manifest, image_encoders=(PORTABLE, *forms)))
    return read_bundle(folder)


def _served(bundle: Bundle, out: Path, **settings: str) -> tuple[str, str, bytes]:
    """Runtime, precision and file of the image encoder in a repository."""
    folder = repository_from_bundle(bundle, out, **settings) / "image_encoder"  # type: ignore[arg-type]
    parameters = config_from_text((folder / "config.pbtxt").read_text(encoding="utf-8")).parameters
    runtime, precision = (parameters[name].string_value for name in ("runtime", "precision"))
    return runtime, precision, (folder / "1" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("forms", "precision", "runtime"),
    [
        ((), "fp32", "onnx"),
        ((SLOW,), "fp32", "onnx"),
        ((FAST,), "fp32", "openvino"),
        ((FAST, INT8), "int8", "onnx"),
        ((FAST, INT8, INT8_FAST), "int8", "openvino"),
        ((BF16,), "bf16", "onnx"),
    ],
)
def test_the_python_backend_takes_the_fastest(
    tmp_path: Path, forms: tuple[EncoderForm, ...], precision: str, runtime: str
) -> None:
    bundle = _bundle(tmp_path / "bundle", *forms)
    served = _served(bundle, tmp_path / "out", backend="python", precision=precision)
    model = image_encoder_model() if precision == "fp32" else ROUNDED
    assert served == (runtime, precision, model)
    assert packages_of(tmp_path / "out") == (("openvino",) if runtime == "openvino" else ())


def test_the_onnxruntime_backend_takes_the_portable_one(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", FAST, INT8, INT8_FAST)
    assert _served(bundle, tmp_path / "out", backend="onnxruntime")[:2] == ("onnx", "fp32")
    assert _served(bundle, tmp_path / "out", backend="onnxruntime", precision="int8")[:2] == ("onnx", "int8")


def test_a_precision_that_the_bundle_lacks(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", FAST, INT8)
    with pytest.raises(UsageError, match=r"no bf16 form .*give one of fp32, int8, or pack .*--precision bf16"):
        repository_from_bundle(bundle, tmp_path / "out", backend="python", precision="bf16")
    assert not (tmp_path / "out").exists()


def test_a_form_for_whole_images_is_never_taken(tmp_path: Path) -> None:
    whole = replace(FAST, file="image_encoder_640x480.onnx", speed={"1": 9.0}, source_size=(640, 480))
    assert _served(_bundle(tmp_path / "bundle", whole), tmp_path / "out", backend="python")[0] == "onnx"


@pytest.mark.parametrize("forms", [(FAST,), (INT8, INT8_FAST)])
def test_the_twin_runs_it(tmp_path: Path, photos: Path, forms: tuple[EncoderForm, ...]) -> None:
    pytest.importorskip("openvino")
    bundle = _bundle(tmp_path / "bundle", *forms)
    transport = LocalTransport(bundle, precision=forms[0].precision)
    _assert_answers(Classifier(transport), photos, image_encoder_model() if forms[0] is FAST else ROUNDED)


def test_the_rounded_weights_can_be_told_apart(photos: Path) -> None:
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), SPEC) for path in sorted(photos.rglob("*.jpg"))])
    plain, rounded = (reference_answers(pixels, model, k=5)[1] for model in (image_encoder_model(), ROUNDED))
    assert np.abs(plain - rounded).max() > 1e-3, "far above the tolerance of these tests"


@pytest.mark.triton
def test_triton_runs_it_by_openvino(tmp_path: Path, photos: Path) -> None:
    pytest.importorskip("openvino")
    bundle = _bundle(tmp_path / "bundle", INT8, INT8_FAST)
    repository = repository_from_bundle(bundle, tmp_path / "triton", backend="python", precision="int8")
    with start_server(repository) as server:
        _assert_answers(Classifier(server.endpoints.url), photos, ROUNDED)


def _assert_answers(classifier: Classifier, photos: Path, encoder: bytes) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), SPEC) for path in paths])
    _, scores, indices = reference_answers(pixels, encoder, k=5)
    with classifier:
        results = classifier.classify(paths)
    assert [result.indices for result in results] == [tuple(row) for row in indices.tolist()]
    np.testing.assert_allclose([result.scores for result in results], scores, atol=1e-4)
