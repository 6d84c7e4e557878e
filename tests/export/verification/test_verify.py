"""Comparisons, runtimes, the verb and its page, on features made by hand and on a real bundle."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core import tensors
from clipship.core.bundle import VOCABULARY_TENSORS, Bundle, VocabularyFeatures, read_bundle, write_manifest
from clipship.core.cli.main import main
from clipship.core.comparison import (
    Answers,
    Comparison,
    Verification,
    batch_sizes_up_to,
    compare_answers,
    compare_features,
    golden_samples,
)
from clipship.core.errors import CheckFailed
from clipship.core.machine import processor
from clipship.core.machine.processor import emulates, this_processor
from clipship.core.precisions import Tolerance
from clipship.core.tolerances import TOLERANCES
from clipship.core.vocabulary import Vocabulary
from clipship.export.encoders import TextEncoder
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.pack import bundle_from_method
from clipship.export.reference import Picture, compare_prompts, verify_text
from clipship.export.verification.report import text_from_verification
from clipship.export.verification.runners import (
    NotRunnable,
    local_providers,
    nodes_by_provider,
    onnx_function,
    openvino_function,
)
from clipship.export.verification.verify import compare_classifier, verify_bundle
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of, write_checkpoint

RNG = np.random.default_rng(4)


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


FEATURES = unit(RNG.normal(size=(40, 64)))
CLASSES = unit(RNG.normal(size=(6, 64)))


def compared(given: NDArray[np.float32], tolerance: Tolerance, expected: NDArray[np.float32] = FEATURES) -> Comparison:
    return compare_features("x", "p", 1, expected, given, references=CLASSES, tolerance=tolerance)


def test_a_constant_part_hides_an_error_from_the_plain_cosine_only() -> None:
    common = 30 * unit(RNG.normal(size=(1, 64)))
    expected, given = unit(common + FEATURES), unit(common + FEATURES[::-1])
    row = compared(given, TOLERANCES["int8"], expected)
    assert row.min_cosine > 0.99
    assert row.min_centred_cosine < 0.5
    assert any("centred" in reason for reason in row.failures)


def test_a_constant_error_is_seen_after_centring() -> None:
    """Each side's own mean would take it away."""
    shift = np.zeros(64, np.float32)
    shift[0] = 0.3
    assert any("centred" in reason for reason in compared(unit(FEATURES + shift), TOLERANCES["int8"]).failures)


def test_one_image_has_no_centred_cosine() -> None:
    row = compared(FEATURES[:1].copy(), TOLERANCES["bf16"], FEATURES[:1])
    assert row
    assert math.isnan(row.min_centred_cosine)
    assert row.to_json()["min_centred_cosine"] is None
    assert not compared(FEATURES[1:2], TOLERANCES["bf16"], FEATURES[:1])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (FEATURES[:, :32], "instead of float32 [40, 64]"),
        (FEATURES.astype(np.float64), "gives float64"),
        (np.where(np.arange(40)[:, None] == 3, np.nan, FEATURES).astype(np.float32), "for 1 of 40 inputs"),
    ],
)
def test_what_cannot_be_compared_fails_and_says_why(given: NDArray[np.float32], reason: str) -> None:
    row = compared(given, TOLERANCES["int8"])
    assert not row
    assert reason in row.failures[0]
    json.dumps(row.to_json(), allow_nan=False)


def near_tie(gap: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """200 images, the last between classes 0 and 1, ``gap`` apart in cosine; given with their order turned."""
    middle = CLASSES[0] + CLASSES[1]
    away = (CLASSES[0] - CLASSES[1]) / (2 - 2 * CLASSES[0] @ CLASSES[1])
    rows = [unit((middle + sign * gap * np.linalg.norm(middle) * away / 2)[None]) for sign in (1, -1)]
    many = unit(RNG.normal(size=(199, 64)))
    return np.concatenate([many, rows[0]]), np.concatenate([many, rows[1]])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_near_tie_is_excused_and_shown(precision: str) -> None:
    expected, given = near_tie(1e-6)
    row = compared(given, TOLERANCES[precision], expected)
    assert row, row.failures
    assert row.top1_agreement == pytest.approx(199 / 200)
    assert row.top1_excused == pytest.approx(1 / 200)
    assert "ties" in text_from_verification(Verification((row,)))


@pytest.mark.parametrize(("precision", "gap"), [("fp32", 1e-3), ("fp16", 1e-2)])
def test_a_change_between_classes_that_are_apart_counts(precision: str, gap: float) -> None:
    """For fp16 all cosines are fine, and only top-1 says no."""
    expected, given = near_tie(gap)
    row = compared(given, TOLERANCES[precision], expected)
    assert row.top1_excused == 0
    assert any("top-1" in reason for reason in row.failures)
    if precision == "fp16":
        assert len(row.failures) == 1


def test_of_two_names_that_are_one_word_either_may_win() -> None:
    twins = np.repeat(CLASSES[:2], 2, axis=0)
    twins[1, 0] += 1e-7
    expected = unit(RNG.normal(size=(300, 64)) + 3 * CLASSES[0])
    given = expected + 1e-7 * RNG.choice([-1, 1], expected.shape).astype(np.float32)
    row = compare_features("x", "p", 1, expected, given, references=twins, tolerance=TOLERANCES["fp32"])
    assert row, row.failures
    assert 0 < row.top1_excused == pytest.approx(1 - row.top1_agreement)


def test_batch_sizes() -> None:
    assert batch_sizes_up_to(64) == (1, 2, 7, 64)
    assert batch_sizes_up_to(7) == (1, 2, 7)
    assert batch_sizes_up_to(1) == (1,)


BLANK = Answers(what="x", model="classify", provider="p", batch_size=1, count=4, tolerance=TOLERANCES["fp32"])
SCORES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4004, 0.4, 0.1996]], np.float32)
LABELS = ("a", "b", "c")


def answered(indices: NDArray[np.int64], labels: list[list[str]] | None = None) -> Answers:
    scores = np.take_along_axis(SCORES, indices, 1)
    return compare_answers(BLANK, SCORES, LABELS, scores, indices, labels or [[LABELS[i] for i in r] for r in indices])


def test_answers() -> None:
    best = np.argsort(-SCORES, axis=1)
    assert answered(best)
    turned = best.copy()
    turned[3, :2] = turned[3, 1::-1]
    row = answered(turned)
    assert row
    assert (row.top1_agreement, row.top1_excused) == (0.75, 0.25)
    turned[0, :2] = turned[0, 1::-1]
    assert any("top-1" in reason for reason in answered(turned).failures)
    right = [[LABELS[place] for place in line] for line in best]
    swapped = [[{"a": "b", "b": "a"}.get(label, label) for label in line] for line in right]
    row = answered(best, swapped)
    assert row.mislabelled == 8
    assert any("score difference" in reason for reason in row.failures)
    assert "not in the vocabulary" in answered(best, [["z", "a", "b"]] * 4).failures[0]


@pytest.fixture(scope="module")
def bundle(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "coop"
    method = method_of(clip, "coop")
    return bundle_from_method(method, Vocabulary(names=NAMES), pictures[:16], out, provenance={})


@pytest.fixture(scope="module")
def checkpoint(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "coop", method_of(clip, "coop"))


def test_a_runtime_that_falls_back_silently_is_found(bundle: Bundle) -> None:
    """ONNX Runtime lists Azure first among the session's providers, and then computes on the CPU."""
    import onnxruntime

    sample = golden_samples(bundle).pixels[:1]
    ran = nodes_by_provider(bundle.image_encoder, "CPUExecutionProvider", sample)
    assert set(ran) == {"CPUExecutionProvider"}
    assert any("MatMul" in kind or "Gemm" in kind for kind in ran["CPUExecutionProvider"])
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider that falls back")
    assert "AzureExecutionProvider" not in local_providers()
    with pytest.raises(CheckFailed, match=r"asked for AzureExecutionProvider.*on CPUExecutionProvider"):
        onnx_function(bundle.image_encoder, "AzureExecutionProvider", sample)


def openvino_can(precision: str) -> bool:
    """By what OpenVINO says it is able to, a source of its own."""
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"bf16": "BF16", "fp16": "FP16"}[precision] in able


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_openvino_computes_in_the_precision_it_was_asked_for(
    bundle: Bundle, precision: str, tell_way: Callable[[str], None]
) -> None:
    pytest.importorskip("openvino")
    samples = golden_samples(bundle)
    can = precision == "fp32" or (not emulates("openvino", precision, this_processor()) and openvino_can(precision))
    tell_way(f"OpenVINO {'computes in' if can else 'refuses'} {precision}")
    if not can:
        with pytest.raises(NotRunnable, match=r"was asked for|would emulate bf16"):
            openvino_function(bundle.image_encoder, precision)
        return
    run = openvino_function(bundle.image_encoder, precision)
    given = run(samples.pixels)
    row = compare_features(
        "x",
        "OpenVINO",
        8,
        samples.expected,
        given,
        references=bundle.vocabulary_features(),
        tolerance=TOLERANCES[precision],
    )
    assert row.min_cosine > 0.999
    assert bool(np.abs(given - samples.expected).max() < 1e-5) == (precision == "fp32"), "it computed in another type"


def test_bfloat16_by_openvino_is_not_compared_where_it_is_emulated(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name\t: AMD EPYC 7B12\nflags\t\t: avx2\n", encoding="utf-8")
    with pytest.raises(
        NotRunnable, match=r"image_encoder\.onnx: bf16 by OpenVINO: AMD EPYC 7B12 has neither avx512_bf16"
    ):
        openvino_function(bundle.image_encoder, "bf16")


def resigned(bundle: Bundle, folder: Path) -> Path:
    """A copy whose manifest will be written anew, as a tool with a mistake would."""
    shutil.copytree(bundle.path, folder)
    return folder


def test_swapped_classes_fail_with_and_without_pytorch(bundle: Bundle, clip: Clip, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    assert compare_classifier(bundle)
    assert verify_text(bundle, method_of(clip, "coop"))
    folder = resigned(bundle, tmp_path / "swapped")
    right = bundle.vocabulary_features()
    order = [1, 0, *range(2, len(NAMES))]
    wrong = VocabularyFeatures(features=right.features[order], logit_scale=right.logit_scale)
    save_file(wrong.tensors(), folder / VOCABULARY_TENSORS)
    write_manifest(folder, bundle.manifest)
    swapped = read_bundle(folder)
    assert "score difference" in compare_classifier(swapped).failures[0]
    assert not verify_bundle(swapped, batch_sizes=(1,))
    assert [row.what for row in verify_text(swapped, method_of(clip, "coop")).comparisons if not row] == ["vocabulary"]


def test_swapped_labels_fail(bundle: Bundle, tmp_path: Path) -> None:
    folder = resigned(bundle, tmp_path / "swapped")
    lines = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    (folder / "labels.txt").write_text("".join(f"{line}\n" for line in [lines[1], lines[0], *lines[2:]]), "utf-8")
    write_manifest(folder, bundle.manifest)
    assert "are not their indices' names" in compare_classifier(read_bundle(folder)).failures[0]


def test_every_variant_is_compared_and_what_cannot_run_is_named(bundle: Bundle, tmp_path: Path) -> None:
    folder = resigned(bundle, tmp_path / "variants")
    shutil.copyfile(bundle.image_encoder, folder / "image_encoder.fp16.onnx")
    (folder / "image_encoder.broken.onnx").write_bytes(b"no model")
    first = bundle.image_encoders[0]
    variants = (
        first,
        replace(first, file="image_encoder.fp16.onnx", precision="fp16"),
        replace(first, file="image_encoder.broken.onnx"),
    )
    write_manifest(folder, replace(bundle.manifest, image_encoders=variants))
    verification = verify_bundle(read_bundle(folder), batch_sizes=(1, 3))
    by_variant = {row.form: row for row in verification.comparisons}
    assert by_variant["image_encoder.fp16.onnx"].tolerance == TOLERANCES["fp16"]
    problems = [row.problem for row in verification.comparisons if row.form == "image_encoder.broken.onnx"]
    assert any("ONNX Runtime cannot load it" in problem for problem in problems)
    assert not verification
    text = text_from_verification(verification)
    assert "FAILED golden samples, image_encoder.broken.onnx" in text


def test_a_variant_is_compared_by_the_runtime_that_serves_it(bundle: Bundle, tmp_path: Path) -> None:
    """As 0.5 left it: without OpenVINO's variant, and without the reason."""
    folder = resigned(bundle, tmp_path / "old")
    (folder / "verification.json").write_text(json.dumps({**bundle.verification(), "skipped": []}), encoding="utf-8")
    write_manifest(folder, replace(bundle.manifest, image_encoders=bundle.image_encoders[:1], measured_on=None))
    verification = verify_bundle(read_bundle(folder), batch_sizes=(1,), providers=["CPUExecutionProvider"])
    assert [row.provider for row in verification.comparisons] == ["CPUExecutionProvider"]
    assert verification.skipped == ("image_encoder.onnx: the bundle does not offer fp32 by OpenVINO",)


@pytest.fixture
def images(pictures: list[Picture], tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for picture in pictures[:10]:
        (folder / f"<b>&{picture.name}").write_bytes(picture.data)
    return folder


def test_the_verb_without_pytorch_says_what_it_compared_with(
    bundle: Bundle, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["verify", str(bundle.path), "--images", str(images), "--max-batch", "9", "--report", str(page)]) == 0
    out = capsys.readouterr().out
    assert "images are compared with image_encoder.onnx, one by one, not with PyTorch" in out
    assert "\x1b" not in out, "no colours where nobody sees them"
    html = page.read_text(encoding="utf-8")
    assert "are within tolerance" in html
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert "http" not in html, "the page needs nothing else"
    first = html.split("data:image/png;base64,")[1].split('"')[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert shown.shape == (32, 32, 3)


def test_the_verb_with_a_checkpoint(
    bundle: Bundle, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--images", str(images), "--max-batch", "2", "--json"]
    assert main(["verify", str(bundle.path), *arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    compared = {row["what"] for row in content["comparisons"]}
    assert compared == {"golden samples", "images", "prompts", "padded prompts", "vocabulary"}
    assert {row["reference"] for row in content["comparisons"]} == {"PyTorch"}
    assert all(row["passed"] for row in (*content["comparisons"], *content["answers"]))
    assert len(content["comparisons"][0]["worst"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--images", "{empty}"], 2, "no images in it"),
        (["--images", "{broken}"], 2, "broken.png: not an image in a known format"),
        (["--url", "127.0.0.1:9"], 1, "no Triton answers at 127.0.0.1:9"),
        (["--provider", "CUDAExecutionProvider"], 1, "has no CUDAExecutionProvider here"),
        (["--plan", "{empty}"], 2, "no plan there"),
        (["--max-batch", "0"], 2, "0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Bundle, tmp_path: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"this is no image")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    assert main(["verify", str(bundle.path), *[one.format(**places) for one in arguments]]) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_text_encoder_that_takes_all_tokens_only(clip: Clip, tmp_path: Path) -> None:
    """As clipship 0.2 packed it: padding is not cut for it."""
    method = method_of(clip, "coop")
    onnx_from_module(
        TextEncoder(method),
        clip.tokenize(["X X X X a.", "X X X X b."]),
        tmp_path / "text_encoder.onnx",
        input_spec=tensors.tokens_tensor(clip.context_length),
        output_spec=tensors.embedding_tensor(clip.embed_dim, tensors.CLASSES),
        metadata={},
    )
    rows = compare_prompts(method, Vocabulary(names=NAMES), tmp_path)
    assert all(rows), [str(row) for row in rows]
    assert {row.what for row in rows} == {"prompts"}
