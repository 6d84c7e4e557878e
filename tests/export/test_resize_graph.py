"""Resizing in the graph: against Pillow and open_clip's transform on the very images, and through a packed bundle."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import PIL
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from clipship.core.bundle import Bundle, EncoderVariant, read_bundle, write_manifest
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.images.decoding import ImageSpec, pixels_from_image
from clipship.core.vocabulary import Vocabulary
from clipship.export import resize_graph as resize
from clipship.export.image_input import SAMPLES, sources_of
from clipship.export.pack import bundle_from_method
from clipship.export.precision.encoder_variants import Profile
from clipship.export.reference import Picture, image_features
from clipship.export.resize_graph import SourceResize, compare_with_pillow, source_size_from_text
from clipship.export.verification.runners import onnx_session, session_function
from clipship.export.verification.verify import verify_bundle
from clipship.training.model.clip import Clip
from tests.core.images.test_resampling import by_pillow
from tests.export.conftest import NAMES, method_of

DATA = Path(os.environ.get("CLIPSHIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SIZES = [(640, 480), (1280, 720), (480, 640), (200, 150), (224, 224), (448, 448), (112, 112), (333, 1000), (900, 77)]
CAMERA, PORTRAIT = (96, 54), (40, 100)


def spec_of(size_px: int) -> ImageSpec:
    return ImageSpec(size_px=size_px, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def resized(source: NDArray[np.uint8], size_px: int) -> NDArray[np.float32]:
    height, width = source.shape[:2]
    with torch.inference_mode():
        pixels: NDArray[np.float32] = SourceResize((width, height), spec_of(size_px))(torch.from_numpy(source[None]))[
            0
        ].numpy()
    return pixels


def by_open_clip(source: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    from open_clip import image_transform
    from torchvision.transforms import Compose

    steps = [one for one in image_transform(size_px, is_train=False).transforms if type(one).__name__ != "ToTensor"]
    geometry = Compose([one for one in steps if type(one).__name__ in ("Resize", "CenterCrop")])
    if int(PIL.__version__.split(".")[0]) < 13 and source.shape[0] > 2 * source.shape[1]:
        return by_pillow(Image.fromarray(source), size_px)  # in the order of passes that Pillow has from 13 on
    return np.asarray(geometry(Image.fromarray(source)))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_photographs_equal_open_clip_bit_for_bit(size: tuple[int, int]) -> None:
    photographs = sorted((DATA / "caltech-101-mini").rglob("*.jpg"))[::150]
    if not photographs:
        pytest.skip("no photographs here")
    for path in photographs:
        source = np.array(Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR))
        assert np.array_equal(resized(source, 224), by_open_clip(source, 224)), path.name


@pytest.mark.parametrize("size_px", [32, 77])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 300), (300, 1), (31, 33), (64, 64), (32, 32), (77, 154), (500, 41), (41, 500)], ids=str
)
def test_extremes_of_shape_and_contrast(size: tuple[int, int], size_px: int) -> None:
    """Black beside white, so that the filter overshoots and both passes must clip as Pillow does."""
    rng = np.random.default_rng(1)
    source = (255 * rng.integers(0, 2, (size[1], size[0], 3))).astype(np.uint8)
    expected = pixels_from_image(Image.fromarray(source), spec_of(size_px))
    assert np.array_equal(resized(source, size_px), expected)


def test_rounding_is_half_up_as_in_pillow() -> None:
    """At twice the size, weights are 128ths and halves are common: rounding them to even would be seen."""
    source = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = pixels_from_image(Image.fromarray(source), spec_of(128))
    assert np.array_equal(resized(source, 128), expected)


def test_a_source_too_large_to_be_summed_exactly_is_refused() -> None:
    source = np.random.default_rng(4).integers(0, 256, (3, 16_384, 3), dtype=np.uint8)
    assert np.array_equal(resized(source, 2), pixels_from_image(Image.fromarray(source), spec_of(2)))
    with pytest.raises(UsageError, match="16384 pixels of a source become 2"):
        SourceResize((16_384, 16_384), spec_of(2))


def test_a_wrong_resize_is_refused(monkeypatch: pytest.MonkeyPatch, pictures: list[Picture]) -> None:
    sources = sources_of(pictures, CAMERA)
    compare_with_pillow(sources, spec_of(32))
    with monkeypatch.context() as patch:
        patch.setattr(resize, "centred_corner", lambda width, height, side: ((width - side) // 2 + 1, 0))
        with pytest.raises(
            CheckFailed, match=r"images of 96 x 54 resized in the graph differ from Pillow's by \d+ of 255"
        ):
            compare_with_pillow(sources, spec_of(32))


@pytest.fixture(scope="module")
def bundle(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    profile = Profile(source_sizes=(CAMERA, PORTRAIT))
    out = tmp_path_factory.mktemp("bundles") / "sync"
    vocabulary = Vocabulary(names=NAMES)
    return bundle_from_method(method_of(clip, "sync-clip"), vocabulary, pictures, out, provenance={}, profile=profile)


@pytest.mark.parametrize("size", [CAMERA, PORTRAIT], ids=str)
def test_the_packed_variant_equals_pillow_then_pytorch(bundle: Bundle, size: tuple[int, int], clip: Clip) -> None:
    variant = next(one for one in read_bundle(bundle.path).image_encoders if one.source_size == size)
    assert variant.file == f"image_encoder_{size[0]}x{size[1]}.onnx"
    rng = np.random.default_rng(3)
    sources = np.stack(
        [np.asarray(Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size)) for _ in range(9)]
    )
    pixels = np.stack([pixels_from_image(Image.fromarray(source), clip.image_spec) for source in sources])
    expected = image_features(method_of(clip, "sync-clip"), pixels)
    run = session_function(onnx_session(bundle.path / variant.file))
    for batch in (1, 2, 9):
        np.testing.assert_allclose(run(sources[:batch]), expected[:batch], atol=1e-4)
    assert np.abs(expected - expected[0]).max() > 0.01


def test_the_graph_uses_what_every_runtime_has(bundle: Bundle) -> None:
    plain = {node.op_type for node in onnx.load(bundle.image_encoder).graph.node}
    model = onnx.load(bundle.path / "image_encoder_96x54.onnx")
    assert {node.op_type for node in model.graph.node} - plain <= {
        "Slice",
        "Split",
        "MatMul",
        "Mul",
        "Sub",
        "Floor",
        "Clip",
    }
    consumers = {node.op_type for node in model.graph.node if "image" in node.input}
    assert consumers - {"Shape"} == {"Cast"}, "TensorRT takes uint8 at an input only"
    assert "Resize" not in {node.op_type for node in model.graph.node}


def test_pack_has_compared_it_and_verify_does_again(bundle: Bundle) -> None:
    compared = [one for one in bundle.verification()["comparisons"] if one["what"] == "96x54 images"]
    assert [one["batch_size"] for one in compared] == [1, 2, 7]
    assert compared[-1]["count"] == SAMPLES
    assert all(one["passed"] for one in compared)
    again = verify_bundle(bundle, batch_sizes=(1, 2, 64), providers=("CPUExecutionProvider",))
    assert again, str(again)
    sized = [one for one in again.comparisons if one.what == "golden samples, 96 x 54"]
    assert {one.batch_size for one in sized} == {1, 2}
    assert {one.reference for one in sized} == {"Pillow and image_encoder.onnx"}


def test_verify_finds_a_shifted_crop(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    path = folder / "image_encoder_96x54.onnx"
    model = onnx.load(path)
    (across,) = (weight for weight in model.graph.initializer if weight.name == "resize.across")
    across.raw_data = np.roll(numpy_helper.to_array(across), 3, axis=0).tobytes()
    onnx.save(model, path)
    write_manifest(folder, bundle.manifest)
    again = verify_bundle(read_bundle(folder), batch_sizes=(1,))
    assert {one.form for one in again.comparisons if not one} == {"image_encoder_96x54.onnx"}


def test_the_variant_in_json_is_old_where_there_is_no_size() -> None:
    plain = EncoderVariant(file="a.onnx", precision="fp32", runtime="onnx", opset=18)
    assert "source_size" not in plain.to_json()
    sized = replace(plain, source_size=(640, 480))
    assert sized.to_json()["source_size"] == [640, 480]
    assert [EncoderVariant.from_json(one.to_json()) for one in (plain, sized)] == [plain, sized]


@pytest.mark.parametrize("text", ["640", "640x", "x480", "640x480x3", "0x480", "-1x4", "640X480", "20000x10", "wide"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"source size .*: give"):
        source_size_from_text(text)


def test_a_size_is_width_then_height() -> None:
    assert source_size_from_text("1920x1080") == (1920, 1080)
    with pytest.raises(UsageError, match="give each once"):
        Profile(source_sizes=((4, 4), (4, 4)))
