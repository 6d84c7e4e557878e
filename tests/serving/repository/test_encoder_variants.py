"""Which variant of the image encoder is served, and that it really is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipship.core.bundle import Bundle, EncoderVariant, Runtime, read_bundle, write_manifest, write_manifest_content
from clipship.core.errors import UsageError
from clipship.core.images.decoding import pixels_from_bytes
from clipship.core.machine import processor
from clipship.core.machine.processor import Processor
from clipship.core.precisions import Precision
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.errors import ServerFailed
from clipship.serving.repository.config_pbtxt import config_from_text
from clipship.serving.repository.requirements import Requirements
from clipship.serving.repository.tuning import Tuning
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import start_server
from tests.serving.bundles import SPEC, image_encoder_model, reference_answers, write_bundle

OTHER = "image_encoder.int8.onnx"
PORTABLE = EncoderVariant(file="image_encoder.onnx", precision="fp32", runtime="onnx", opset=18)
SLOW = replace(PORTABLE, runtime="openvino", speed={"1": 0.5, "8": 1.1})
FAST = replace(PORTABLE, runtime="openvino", speed={"1": 0.9, "8": 1.6})
INT8 = EncoderVariant(file=OTHER, precision="int8", runtime="onnx", opset=18, speed={"1": 3.0, "8": 2.0})
INT8_FAST = replace(INT8, runtime="openvino", speed={"1": 2.5, "8": 3.5})
ROUNDED = image_encoder_model(rounding=0.02)
BF16 = replace(INT8, file="image_encoder.bf16.onnx", precision="bf16", speed={})
BF16_FAST = replace(FAST, precision="bf16")
_ONNX: tuple[Runtime, ...] = ("onnx",)
ROME = Processor(name="AMD EPYC 7B12", instruction_sets=("avx2",))
GENOA = Processor(name="AMD EPYC 9654", instruction_sets=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"))


def _bundle(folder: Path, *variants: EncoderVariant, measured_on: Processor | None = None) -> Bundle:
    """The stand-in bundle with further variants; the other file's weights are a little off, so that one sees it."""
    bundle = write_bundle(folder)
    for variant in variants:
        if variant.file != PORTABLE.file:
            (folder / variant.file).write_bytes(ROUNDED)
    write_manifest(folder, replace(bundle.manifest, image_encoders=(PORTABLE, *variants), measured_on=measured_on))
    return read_bundle(folder)


def _served(bundle: Bundle, out: Path, **settings: Any) -> tuple[str, str, bytes]:
    """Runtime, precision and file of the image encoder in a repository."""
    folder = repository_from_bundle(bundle, out, **settings) / "image_encoder"
    parameters = config_from_text((folder / "config.pbtxt").read_text(encoding="utf-8")).parameters
    runtime, precision = (parameters[name].string_value for name in ("runtime", "precision"))
    return runtime, precision, (folder / "1" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("variants", "precision", "runtime"),
    [
        ((), "fp32", "onnx"),
        ((SLOW,), "fp32", "onnx"),
        ((FAST,), "fp32", "openvino"),
        ((FAST, INT8), "int8", "onnx"),
        ((FAST, INT8, INT8_FAST), "int8", "openvino"),
        ((BF16, BF16_FAST), "bf16", "openvino"),
    ],
)
def test_the_python_backend_takes_the_fastest(
    tmp_path: Path, variants: tuple[EncoderVariant, ...], precision: str, runtime: str
) -> None:
    bundle = _bundle(tmp_path / "bundle", *variants)
    served = _served(bundle, tmp_path / "out", backend="python", precision=precision)
    model = ROUNDED if precision == "int8" else image_encoder_model()
    assert served == (runtime, precision, model)
    assert Requirements(tmp_path / "out").packages == (("openvino",) if runtime == "openvino" else ())


def test_the_onnxruntime_backend_takes_the_portable_one(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", FAST, INT8, INT8_FAST)
    assert _served(bundle, tmp_path / "out", backend="onnxruntime")[:2] == ("onnx", "fp32")
    assert _served(bundle, tmp_path / "out", backend="onnxruntime", precision="int8")[:2] == ("onnx", "int8")


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            Tuning(),
            "precision bf16 on the device auto with the onnxruntime backend: .*: give --device gpu, --precision",
        ),
        (Tuning(device="cpu"), "precision bf16 on the device cpu .* a server without a GPU could not load it"),
    ],
)
def test_bfloat16_is_not_for_onnx_runtime_on_a_processor(tmp_path: Path, tuning: Tuning, message: str) -> None:
    bundle = _bundle(tmp_path / "bundle", BF16, BF16_FAST)
    with pytest.raises(UsageError, match=message):
        repository_from_bundle(bundle, tmp_path / "out", backend="onnxruntime", precision="bf16", tuning=tuning)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tuning", [Tuning(device="gpu"), Tuning(gpus=(0,))])
def test_bfloat16_is_for_gpus(tmp_path: Path, tuning: Tuning) -> None:
    bundle = _bundle(tmp_path / "bundle", BF16, BF16_FAST)
    served = _served(bundle, tmp_path / "out", backend="onnxruntime", precision="bf16", tuning=tuning)
    assert served == ("onnx", "bf16", ROUNDED)


def test_bfloat16_needs_a_variant_by_openvino_on_a_processor(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", BF16)
    message = (
        r"no bf16 variant of the image encoder runs there \(image_encoder.bf16.onnx by ONNX Runtime: it has bfloat16 "
        r"kernels for GPUs only\): give one of fp32$"
    )
    with pytest.raises(UsageError, match=message):
        repository_from_bundle(bundle, tmp_path / "out", backend="python", precision="bf16")
    with pytest.raises(UsageError, match=message):
        LocalTransport(bundle, precision="bf16")


def test_on_another_processor_the_portable_variant_is_taken_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _bundle(tmp_path / "bundle", FAST, INT8, INT8_FAST, measured_on=GENOA)
    both: tuple[Runtime, ...] = ("onnx", "openvino")
    assert bundle.fastest_encoder("int8", both, processor=GENOA) == INT8_FAST
    assert bundle.fastest_encoder("int8", both) == INT8_FAST
    assert capsys.readouterr().err == ""
    assert bundle.fastest_encoder("int8", both, processor=ROME) == INT8
    assert capsys.readouterr().err == (
        f"{bundle.path}: ONNX Runtime runs {OTHER}, not OpenVINO: its speed was measured with avx512f, avx512_vnni, "
        "which AMD EPYC 7B12 lacks\n"
    )


def test_bfloat16_is_refused_on_a_processor_that_emulates_it(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", BF16, BF16_FAST, INT8)  # packed before the processor was kept
    assert bundle.fastest_encoder("bf16", ("onnx", "openvino"), processor=GENOA) == BF16_FAST
    with pytest.raises(UsageError, match=r"by OpenVINO: AMD EPYC 7B12 has neither .*\): give one of fp32, int8$"):
        bundle.fastest_encoder("bf16", ("onnx", "openvino"), processor=ROME)
    with pytest.raises(
        UsageError, match=r"give one of fp32, int8, or pip install 'clipship\[openvino\]', which runs it"
    ):
        bundle.fastest_encoder("bf16", _ONNX, processor=GENOA)


def test_whoever_writes_a_repository_for_another_processor_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name\t: AMD EPYC 7B12\nflags\t\t: avx2\n", encoding="utf-8")
    bundle = _bundle(tmp_path / "bundle", BF16_FAST)
    assert _served(bundle, tmp_path / "out", backend="python", precision="bf16")[:2] == ("openvino", "bf16")
    assert (
        "this machine's processor could not load the model, make sure that the server's can" in capsys.readouterr().err
    )


def test_the_manifest_says_where_its_speeds_are_from_and_readers_of_the_key_are_not_needed(tmp_path: Path) -> None:
    plain, told = _bundle(tmp_path / "plain", FAST), _bundle(tmp_path / "told", FAST, measured_on=ROME)
    assert read_bundle(told.path).manifest.measured_on == ROME
    content = told.manifest.to_json()
    assert content.pop("measured_on") == {"name": "AMD EPYC 7B12", "instruction_sets": ["avx2"]}
    assert content == plain.manifest.to_json(), "all else is as readers of 0.5 know it"


def test_a_precision_that_the_bundle_lacks(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", FAST, INT8)
    with pytest.raises(UsageError, match=r"no bf16 variant .*give one of fp32, int8, or pack .*--precision bf16"):
        repository_from_bundle(bundle, tmp_path / "out", backend="python", precision="bf16")
    assert not (tmp_path / "out").exists()


def test_a_variant_for_whole_images_of_an_older_bundle_is_ignored(tmp_path: Path) -> None:
    """Up to 0.5, ``pack --source-size`` wrote them."""
    content = _bundle(tmp_path / "bundle", INT8).manifest.to_json()
    whole = {**FAST.to_json(), "file": "image_encoder_640x480.onnx", "speed": {"1": 9.0}, "source_size": [640, 480]}
    (tmp_path / "bundle" / "image_encoder_640x480.onnx").write_bytes(b"a graph")
    content["image_encoders"].insert(1, whole)
    write_manifest_content(tmp_path / "bundle", content)
    bundle = read_bundle(tmp_path / "bundle")
    assert "image_encoder_640x480.onnx" in bundle.files
    assert bundle.image_encoders == (PORTABLE, INT8)
    assert _served(bundle, tmp_path / "out", backend="python")[0] == "onnx"


@pytest.mark.parametrize("variants", [(FAST,), (INT8, INT8_FAST)])
def test_the_twin_runs_it(tmp_path: Path, photos: Path, variants: tuple[EncoderVariant, ...]) -> None:
    pytest.importorskip("openvino")
    bundle = _bundle(tmp_path / "bundle", *variants)
    transport = LocalTransport(bundle, precision=variants[0].precision)
    _assert_answers(Classifier(transport), photos, image_encoder_model() if variants[0] is FAST else ROUNDED)


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


@pytest.mark.triton
def test_a_server_with_another_processor_takes_the_portable_variant_or_refuses(tmp_path: Path, photos: Path) -> None:
    """The list of the processor's abilities is exchanged, nothing else."""
    pytest.importorskip("openvino")
    bundle = _bundle(tmp_path / "bundle", INT8, INT8_FAST, BF16_FAST, measured_on=GENOA)
    (tmp_path / "cpuinfo").write_text("model name\t: AMD EPYC 7B12\nflags\t\t: avx2\n", encoding="utf-8")

    def elsewhere(precision: Precision) -> Path:
        out = repository_from_bundle(bundle, tmp_path / precision, backend="python", precision=precision)
        copy = out / "image_encoder" / "1" / "clipship_processor.py"
        copy.write_text(copy.read_text(encoding="utf-8").replace("/proc/cpuinfo", str(tmp_path / "cpuinfo")), "utf-8")
        return out

    with start_server(elsewhere("int8"), log_file=tmp_path / "log") as server:
        _assert_answers(Classifier(server.endpoints.url), photos, ROUNDED)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "ONNX Runtime runs it, not OpenVINO: its speed was measured with avx512f, avx512_vnni, which AMD EPYC" in log
    with pytest.raises(ServerFailed, match=r"bf16: AMD EPYC 7B12 has neither avx512_bf16 nor amx_bf16, so it would"):
        start_server(elsewhere("bf16"))


def _assert_answers(classifier: Classifier, photos: Path, encoder: bytes) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), SPEC) for path in paths])
    _, scores, indices = reference_answers(pixels, encoder, k=5)
    with classifier:
        results = classifier.classify(paths)
    assert [result.indices for result in results] == [tuple(row) for row in indices.tolist()]
    np.testing.assert_allclose([result.scores for result in results], scores, atol=1e-4)
