"""From a method to a bundle: every number in the bundle is compared with PyTorch or open_clip run separately."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from clipship.core.bundle import Bundle, read_bundle
from clipship.core.comparison import Verification, run_in_batches
from clipship.core.errors import BundleError, CheckFailed, UsageError
from clipship.core.vocabulary import Vocabulary
from clipship.export import pack
from clipship.export.fused_encoder import FusedImageEncoder
from clipship.export.pack import bundle_from_method, validate_folder
from clipship.export.reference import Picture, pixels_of
from clipship.export.verification.runners import onnx_session, session_function
from clipship.export.verification.verify import verify_bundle
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of, verify_against_method

VOCABULARY = Vocabulary(names=NAMES)


@pytest.fixture(scope="module", params=["zero-shot", "coop", "sync-clip"])
def packed(
    request: pytest.FixtureRequest, clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Bundle]:
    out = tmp_path_factory.mktemp("bundles") / request.param
    return request.param, bundle_from_method(
        method_of(clip, request.param), VOCABULARY, pictures, out, provenance={"seed": 1}
    )


def test_the_encoder_equals_open_clip_or_the_method(
    packed: tuple[str, Bundle], clip: Clip, pictures: list[Picture]
) -> None:
    """From the file's bytes: open_clip's own transform and PyTorch on one side, our pixels and ONNX on the other."""
    from open_clip import image_transform

    recipe, bundle = packed
    spec = clip.image_spec
    transform = image_transform(spec.size_px, is_train=False, mean=spec.mean, std=spec.std)
    inputs = torch.stack([transform(Image.open(io.BytesIO(one.data)).convert("RGB")) for one in pictures[:20]])
    method = method_of(clip, recipe)
    with torch.no_grad():
        expected = method.image_features(inputs).numpy()
        if recipe != "sync-clip":
            by_open_clip = clip.model.encode_image(inputs, normalize=True).numpy()
            np.testing.assert_allclose(expected, by_open_clip, atol=1e-6)
    pixels = pixels_of(pictures[:20], spec)
    given = session_function(onnx_session(bundle.image_encoder))(pixels)
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_prompts_are_in_the_graphs(clip: Clip, pictures: list[Picture]) -> None:
    pixels = torch.from_numpy(pixels_of(pictures[:4], clip.image_spec))
    with torch.no_grad():
        plain = method_of(clip, "zero-shot").image_features(clip.normalize(pixels))
        prompted = method_of(clip, "sync-clip").image_features(clip.normalize(pixels))
    assert (plain - prompted).abs().max() > 0.01


def test_text_features_equal_the_methods(packed: tuple[str, Bundle], clip: Clip) -> None:
    recipe, bundle = packed
    method = method_of(clip, recipe)
    with torch.no_grad():
        np.testing.assert_allclose(
            bundle.vocabulary_features().features, method.class_features(NAMES).numpy(), atol=1e-6
        )
    run = session_function(onnx_session(bundle.text_encoder))
    each = [
        run_in_batches(run, clip.tokenize(bundle.vocabulary.prompts(template)).numpy(), 2)
        for template in bundle.vocabulary.templates
    ]
    mean = np.mean(each, axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(mean, bundle.vocabulary_features().features, atol=1e-5)


def test_the_verification_covers_all_batches_and_over_100_images(packed: tuple[str, Bundle]) -> None:
    content = packed[1].verification()
    assert content["passed"] is True
    portable = [one for one in content["comparisons"] if one["provider"] == "CPUExecutionProvider"]
    images = [one for one in portable if one["what"] == "images"]
    golden = [one for one in portable if one["what"] == "golden samples"]
    assert [one["batch_size"] for one in (*golden, *images)] == [1, 2, 7, 64]
    assert images[0]["count"] >= 100
    assert all(one["max_abs"] <= 1e-4 and one["top1_agreement"] == 1.0 for one in (*golden, *images))
    others = {one["provider"] for one in content["comparisons"]} - {"CPUExecutionProvider"}
    assert others == ({"OpenVINO fp32"} if find_spec("openvino") else set())


def test_golden_samples_repeat(packed: tuple[str, Bundle], pictures: list[Picture]) -> None:
    bundle = packed[1]
    golden = bundle.golden()
    assert len(golden.files) == 8
    assert (bundle.path / "golden" / golden.files[0]).read_bytes() == pictures[0].data
    features = bundle.vocabulary_features()
    logits = features.logit_scale * golden.embedding.astype(np.float64) @ features.features.astype(np.float64).T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(golden.scores, np.take_along_axis(expected, golden.indices, 1), rtol=1e-3)
    assert (np.diff(golden.scores, axis=1) <= 0).all()
    assert verify_bundle(bundle)


def test_the_graphs_are_clean(packed: tuple[str, Bundle]) -> None:
    bundle = packed[1]
    for path in (bundle.image_encoder, bundle.text_encoder):
        model = onnx.load(path)
        kinds = {node.op_type for node in model.graph.node}
        assert "LayerNormalization" in kinds
        assert "Pow" not in kinds, "a LayerNorm was taken apart"
        assert (model.opset_import[0].version, model.ir_version) == (18, 8)
        text = str(model)
        assert ".py" not in text, "paths of the exporting machine"
        assert {prop.key for prop in model.metadata_props} >= {"clipship.base_model", "clipship.method"}


def test_everyone_may_read_it(packed: tuple[str, Bundle]) -> None:
    modes = {path.stat().st_mode & 0o777 for path in packed[1].path.rglob("*") if path.is_file()}
    assert len(modes) == 1, "a file with bits of its own cannot be read by the server's user"


def test_manifest(packed: tuple[str, Bundle], clip: Clip) -> None:
    recipe, bundle = packed
    manifest = bundle.manifest
    assert manifest.base_model_digest == clip.digest
    assert manifest.image_spec == clip.image_spec
    assert manifest.method == recipe
    assert bundle.vocabulary.names == NAMES
    assert (bundle.path / "labels.txt").read_text(encoding="utf-8") == "".join(f"{name}\n" for name in NAMES)
    image, embedding = manifest.inputs_outputs["image_encoder.onnx"]
    assert (image.name, image.dtype, image.shape) == ("image", "uint8", ("batch", 32, 32, 3))
    assert (embedding.name, embedding.dtype, embedding.shape) == ("embedding", "float32", ("batch", 32))


def test_any_changed_byte_is_noticed(packed: tuple[str, Bundle], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(packed[1].path, copy)
    for path in sorted(file for file in copy.rglob("*") if file.is_file()):
        whole = path.read_bytes()
        for position in (len(whole) // 3, len(whole) // 2):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            if path.name == "manifest.json" and _same_json(path, whole):
                continue  # white space: nothing changed
            with pytest.raises(BundleError, match=r"changed|not JSON|missing|malformed|format|list"):
                read_bundle(copy)
        path.write_bytes(whole)
    assert read_bundle(copy).digest == packed[1].digest
    (copy / "text_encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"text_encoder.onnx is missing"):
        read_bundle(copy)


def _same_json(path: Path, before: bytes) -> bool:
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(before))
    except ValueError:
        return False


def test_a_wrong_export_is_refused_and_nothing_is_written(
    clip: Clip, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: channels swapped on the way into the exported graph, right in PyTorch."""

    class Swapped(FusedImageEncoder):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.flip(-1))

    monkeypatch.setattr(pack, "FusedImageEncoder", Swapped)
    with pytest.raises(CheckFailed, match="FAILED images"):
        bundle_from_method(method_of(clip, "coop"), VOCABULARY, pictures, tmp_path / "bundle", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_verify_against_another_method_fails(packed: tuple[str, Bundle], clip: Clip, pictures: list[Picture]) -> None:
    recipe, bundle = packed
    assert verify_against_method(bundle, method_of(clip, recipe), pictures)
    if recipe == "sync-clip":
        other = verify_against_method(bundle, method_of(clip, "coop"), pictures)
        assert not other
        assert "FAILED" in str(other)


def test_nothing_verified_is_not_verified() -> None:
    assert not Verification(())


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    validate_folder(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UsageError, match="is no bundle"):
        validate_folder(tmp_path / "mine")
    with pytest.raises(UsageError, match="is no bundle"):
        validate_folder(tmp_path / "mine" / "thesis.txt")
    validate_folder(tmp_path / "new")


def test_a_provider_that_is_not_here_is_an_error(packed: tuple[str, Bundle]) -> None:
    with pytest.raises(CheckFailed, match="has no CUDAExecutionProvider"):
        onnx_session(packed[1].image_encoder, "CUDAExecutionProvider")
