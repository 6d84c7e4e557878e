"""Whoever is about to answer wrongly says so instead: this process, the models inside Triton, and ``serve``."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clipship.core.bundle import DEFAULT_ENCODER, Bundle, EncoderVariant
from clipship.core.cli.main import main
from clipship.core.errors import CheckFailed
from clipship.core.images.decoding import ImageDecodeError, pixels_from_bytes
from clipship.core.machine.processor import this_processor
from clipship.core.machine.runtimes import OnnxRuntimeEncoder
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.errors import RepositoryError, ServerFailed
from clipship.serving.repository.classifier_graph import classifier_graph
from clipship.serving.repository.golden_check import validate_answers
from clipship.serving.repository.golden_samples import (
    SAMPLES,
    Truth,
    read_samples,
    read_truth,
    truth_from_bundle,
    write_truth,
)
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.server.selfcheck import HttpModels
from tests.serving.bundles import jpeg_bytes
from tests.serving.processes import clipship
from tests.serving.publish.vocabularies import write_variant
from tests.serving.sabotage import MISTAKES, Mistake, replace_in, sabotaged_bundle, sabotaged_encoder

INT8 = EncoderVariant(file="image_encoder.int8.onnx", precision="int8", runtime="onnx", opset=18, speed={"1": 2.0})
DIFFERS = {"scale": "max_norm_error 0.05, limit 0.001", "direction": "centred_cosine"}


@pytest.mark.parametrize(
    ("mistake", "variant"), [("scale", DEFAULT_ENCODER), ("direction", DEFAULT_ENCODER), ("scale", INT8)]
)
def test_this_process_refuses_features_that_are_five_per_cent_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake, variant: EncoderVariant
) -> None:
    bundle = sabotaged_bundle(tmp_path / "bundle", mistake, variant)
    (tmp_path / "photo.jpg").write_bytes(jpeg_bytes(0))
    command = ["classify", str(tmp_path / "photo.jpg"), "--bundle", str(bundle.path), "--precision", variant.precision]
    assert main(command) == 1
    out, said = capsys.readouterr()
    assert out == ""
    assert len(said.splitlines()) == 1
    assert f"{bundle.path / variant.file} ({variant.precision}) by ONNX Runtime 1." in said
    assert f" on {this_processor()} answers wrongly: golden features are not PyTorch's" in said
    assert DIFFERS[mistake] in said
    assert "pack the bundle again on this machine" in said
    assert ("choose --precision fp32" in said) == (variant.precision != "fp32")


def test_this_process_answers_no_batch_that_its_runtime_gets_wrong(
    bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime may be right in large batches only, or in small ones: each is checked before the first is answered."""
    right = OnnxRuntimeEncoder.__call__

    def one_is_wrong(self: OnnxRuntimeEncoder, rows: NDArray[Any]) -> NDArray[np.float32]:
        return right(self, rows) * np.float32(1.05 if len(rows) == 1 else 1)

    def many_are_wrong(self: OnnxRuntimeEncoder, rows: NDArray[Any]) -> NDArray[np.float32]:
        return right(self, rows) * np.float32(1.05 if len(rows) > 1 else 1)

    monkeypatch.setattr("clipship.serving.client.in_process.available_cores", lambda: 2)
    monkeypatch.setattr(OnnxRuntimeEncoder, "__call__", one_is_wrong)
    paths = sorted(photos.glob("*.jpg"))
    with Classifier(LocalTransport(bundle)) as classifier:
        assert all(result.error is None for result in classifier.classify(paths))
        with pytest.raises(CheckFailed, match=r"\(a batch of 1\): pack the bundle again"):
            classifier.classify(paths[:1])
    monkeypatch.setattr(OnnxRuntimeEncoder, "__call__", many_are_wrong)
    with pytest.raises(CheckFailed, match=r"\(a batch of 3\)"):
        LocalTransport(bundle)


def test_this_process_refuses_wrong_names_and_pixels(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(vocabulary: Any, features: Any, top_k: int) -> bytes:
        names = vocabulary.names
        return classifier_graph(type(vocabulary)(names=(*names[1:], names[0])), features, top_k)

    with monkeypatch.context() as patched:
        patched.setattr("clipship.serving.client.in_process.classifier_graph", shifted)
        with pytest.raises(CheckFailed, match="classify: labels are not the vocabulary's names at the indices"):
            LocalTransport(bundle)
    blue = bundle.golden().pixels[..., ::-1]
    monkeypatch.setattr("clipship.serving.client.in_process.pixels_from_bytes", lambda data, spec: blue[0])
    wrong = r"Pillow .* decodes its golden images wrongly: "
    with pytest.raises(CheckFailed, match=rf"{wrong}golden pixels differ by \d+ of 255, limit 2"):
        LocalTransport(bundle)

    def undecodable(data: bytes, spec: Any) -> None:
        raise ImageDecodeError("no such format")

    monkeypatch.setattr("clipship.serving.client.in_process.pixels_from_bytes", undecodable)
    with pytest.raises(CheckFailed, match=f"{wrong}no such format: install the Pillow"):
        LocalTransport(bundle)


def test_names_with_other_line_ends_are_read_as_they_were_written(tmp_path: Path) -> None:
    truth = Truth(
        names=("a\rb", "c\x85", "d"), embedding=np.ones((2, 3), np.float32), scores=np.ones((2, 3), np.float32)
    )
    write_truth(tmp_path, truth)
    found = read_truth(tmp_path)
    assert found is not None
    assert found.names == truth.names


def refused(repository: Path) -> str:
    """The one line that ``clipship serve`` says before it ends."""
    done = clipship("serve", repository, "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A repository of the python backend to break."""
    return Path(shutil.copytree(repository, tmp_path / "copy"))


@pytest.mark.triton
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_encoder_inside_triton_refuses_to_load(copy: Path, mistake: Mistake) -> None:
    model = copy / "image_encoder/1/model.onnx"
    model.write_bytes(sabotaged_encoder(model, mistake))
    said = refused(copy)
    assert f"failed to load 'image_encoder' version 1: Internal: TritonModelException: {model} (fp32) by ONNX R" in said
    assert f" on {this_processor()} answers wrongly: golden features are not PyTorch's: " in said
    assert DIFFERS[mistake] in said
    assert said.rstrip().endswith("pack the bundle again on this machine, or take another version of the runtime")


@pytest.mark.triton
def test_the_classifier_and_the_decoder_inside_triton_refuse_to_load(bundle: Bundle, copy: Path) -> None:
    names = bundle.vocabulary.names
    other = type(bundle.vocabulary)(names=(*names[1:], names[0]))
    (copy / "classifier/1/model.onnx").write_bytes(classifier_graph(other, bundle.vocabulary_features(), 5))
    blue = "\n_right = pixels_from_bytes\npixels_from_bytes = lambda data, spec: _right(data, spec)[..., ::-1]\n"
    with (copy / "preprocess/1/clipship_images.py").open("a", encoding="utf-8") as source:
        source.write(blue)
    with pytest.raises(ServerFailed) as error:
        start_server(copy)
    assert "failed to load 'classifier' version 1: Internal: TritonModelException: " in str(error.value)
    assert "labels are not the vocabulary's names at the indices: publish the vocabulary again" in str(error.value)
    assert "failed to load 'preprocess' version 1: Internal: TritonModelException: " in str(error.value)
    assert "golden pixels differ by" in str(error.value)


ENCODED = "self.encode(batch)"
MOVED = f"({ENCODED} + 0.0125 * np.random.default_rng(5).choice([-1, 1], 16)).astype(np.float32)"
"""In a random direction, by 5 % of the features' length: 16 steps of 0.0125."""

BY_TRITON = "image_encoder (fp32) by the python backend (onnx) of Triton 2.51.0 on "
FEATURES = "golden features are not PyTorch's: max_abs 0.0"
BROKEN = [
    ("image_encoder", ENCODED, f"{ENCODED} * np.float32(1.05)", BY_TRITON, f"embed: {FEATURES}"),
    (
        "image_encoder",
        ENCODED,
        f"(lambda e: e / np.linalg.norm(e, axis=1, keepdims=True))({MOVED})",
        BY_TRITON,
        f"embed: {FEATURES}",
    ),
    (
        "classifier",
        "[name.encode() for name in labels.flat]",
        "[name.encode() for name in np.roll(labels, 1).flat]",
        "classifier by the python backend",
        "classifier: labels are not the vocabulary's names at the indices: publish its vocabulary again",
    ),
    (
        "preprocess",
        "np.stack([image for image, _ in images])",
        "np.stack([image for image, _ in images])[..., ::-1].copy()",
        "preprocess by Pillow in Triton's Python",
        "preprocess: golden pixels differ by ",
    ),
]


@pytest.mark.triton
@pytest.mark.parametrize(("model", "right", "wrong", "who", "problem"), BROKEN)
def test_serve_is_not_ready_where_the_ensembles_answer_wrongly(
    copy: Path, model: str, right: str, wrong: str, who: str, problem: str
) -> None:
    """The models' own checks pass here: what is wrong comes behind them."""
    replace_in(copy / model / "1/model.py", right, wrong)
    said = refused(copy)
    assert said.startswith(f"clipship: {copy}/{who}")
    assert f" answers wrongly: {problem}" in said
    if model == "image_encoder":
        assert f" on {this_processor()} answers" in said
        assert "pack the bundle again on this machine" in said


@pytest.mark.triton
def test_a_decoder_that_rounds_otherwise_is_served(copy: Path) -> None:
    """By one step of 255, as another JPEG library may: float32's tolerance of the features is far smaller."""
    right = "np.stack([image for image, _ in images])"
    replace_in(copy / "preprocess/1/model.py", right, f"np.maximum({right}, 1) - 1")
    with start_server(copy) as server:
        assert server.running


@pytest.mark.triton
def test_a_repository_without_golden_samples_is_served_and_said_to_be_unchecked(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples in copy.glob("**/golden.npz"):
        samples.unlink()
    with start_server(copy) as server:
        assert server.log().count("golden.npz is missing, so nothing was checked") == 3
    assert capsys.readouterr().err.splitlines() == [
        f"{copy} has no golden samples, so its answers were not checked: write it with clipship repository"
    ]


@pytest.mark.triton
def test_models_are_asked_over_http_in_batches_that_they_take(server: Server, bundle: Bundle) -> None:
    models = HttpModels(server.endpoints.http_host, server.endpoints.http_port, 60)
    golden = bundle.golden()
    rows = golden.pixels[np.arange(20) % 3]
    given = models.answers("classify", "image", rows, ["labels", "embedding", "indices"])
    assert list(given["embedding"].shape) == [20, golden.embedding.shape[1]]
    np.testing.assert_allclose(given["embedding"], golden.embedding[np.arange(20) % 3], atol=1e-5)
    names = [bundle.vocabulary.names[index].encode() for index in given["indices"].ravel()]
    assert given["labels"].ravel().tolist() == names
    with pytest.raises(
        ServerFailed, match=r"answers /v2/models/classify/infer with 400: .*unexpected inference output"
    ):
        models.answers("classify", "image", rows, ["logits"])
    with pytest.raises(ServerFailed, match="does not answer /v2"):
        HttpModels("127.0.0.1", 1, 60).version()


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_the_samples_are_the_bundles(bundle: Bundle, tmp_path: Path, backend: Any) -> None:
    birds = write_variant(tmp_path / "birds", 1)
    out = repository_from_bundle(bundle, tmp_path / "r", backend=backend, others={"birds": birds})
    golden, samples = bundle.golden(), read_samples(out)
    assert samples is not None
    assert (samples.pixels == golden.pixels).all()
    assert (samples.embedding == golden.embedding).all()
    assert samples.files.ravel().tolist() == [jpeg_bytes(0), jpeg_bytes(1)]
    np.testing.assert_array_equal(pixels_from_bytes(samples.files[0, 0], bundle.image_spec), golden.pixels[0])
    for each, folder in ((bundle, "classifier"), (birds, "classifier-birds")):
        truth = read_truth(out / folder / "1")
        assert truth is not None
        assert truth.names == each.vocabulary.names
        assert (truth.scores == truth_from_bundle(each).scores).all()
    (out / "image_encoder" / SAMPLES).write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(
        RepositoryError, match=r"golden\.npz: cannot be read \(.*\): write it again with clipship repos"
    ):
        read_samples(out)


def test_a_vocabulary_of_other_images_is_held_to_its_names(bundle: Bundle) -> None:
    """Its own golden answers are of other images, which its classifier alone is asked for."""
    golden, features = bundle.golden(), bundle.vocabulary_features()
    other = np.ascontiguousarray(golden.embedding[::-1])
    truth = Truth(names=bundle.vocabulary.names, embedding=other, scores=features.probabilities(other))
    labels = np.array(bundle.vocabulary.names, np.object_)[golden.indices]

    def ask(model: str, name: str, rows: Any, outputs: Any) -> dict[str, NDArray[Any]]:
        answer: dict[str, NDArray[Any]] = {
            "scores": golden.scores,
            "indices": golden.indices,
            "embedding": golden.embedding,
            "labels": labels,
        }
        return {output: answer[output] for output in outputs}

    validate_answers(ask, "classify", "image", golden.pixels, golden.embedding, truth, "fp32")
    same = replace(truth, embedding=golden.embedding)
    with pytest.raises(CheckFailed, match="classify: scores differ from the golden ones by"):
        validate_answers(ask, "classify", "image", golden.pixels, golden.embedding, same, "fp32")
    labels = np.roll(labels, 1)
    with pytest.raises(CheckFailed, match="labels are not"):
        validate_answers(ask, "classify", "image", golden.pixels, golden.embedding, truth, "fp32")
