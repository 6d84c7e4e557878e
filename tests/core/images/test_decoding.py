"""Preprocessing: bit-equal to open_clip's own transform, and robust against every kind of image file."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core.images import decoding as images
from clipship.core.images.decoding import (
    ImageDecodeError,
    ImageSpec,
    decode_image,
    pixels_from_bytes,
    pixels_from_image,
)

SPEC = ImageSpec(size_px=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
RNG = np.random.default_rng(0)
DATA = Path(os.environ.get("CLIPSHIP_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_open_clip(image: Image.Image, size_px: int) -> NDArray[np.uint8]:
    from open_clip import image_transform
    from torchvision.transforms import Compose

    whole = image_transform(size_px, is_train=False)
    geometry = Compose([step for step in whole.transforms if type(step).__name__ in ("Resize", "CenterCrop")])
    assert len(geometry.transforms) == 2
    return np.asarray(geometry(image).convert("RGB"))


@pytest.mark.parametrize("size_px", [64, 224])
@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (1, 1), (1, 500), (500, 1), (63, 65), (375, 500), (500, 375), (100, 4999), (224, 225)],
)
def test_equals_open_clip_bit_for_bit(height: int, width: int, size_px: int) -> None:
    image = Image.fromarray(noise(height, width))
    spec = ImageSpec(size_px=size_px, mean=SPEC.mean, std=SPEC.std)
    assert np.array_equal(pixels_from_image(image, spec), by_open_clip(image, size_px))


def test_equals_open_clip_on_photographs() -> None:
    photographs = sorted((DATA / "caltech-101-mini").rglob("*.jpg"))[::9]
    if not photographs:
        pytest.skip("no photographs here")
    spec = ImageSpec(size_px=224, mean=SPEC.mean, std=SPEC.std)
    for path in photographs:
        ours = pixels_from_bytes(path.read_bytes(), spec)
        assert np.array_equal(ours, by_open_clip(Image.open(path).convert("RGB"), 224)), path.name


def test_20000_pixels_wide_takes_little_memory() -> None:
    assert pixels_from_bytes(encoded(Image.fromarray(noise(1, 20_000))), SPEC).shape == (64, 64, 3)
    assert pixels_from_bytes(encoded(Image.fromarray(noise(300, 20_000))), SPEC).shape == (64, 64, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(noise(90, 120))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))
    expected = by_open_clip(ImageOps.exif_transpose(turned), 64)
    assert np.array_equal(pixels_from_bytes(encoded(image, "PNG", exif=exif), SPEC), expected)
    if orientation in (6, 8):
        assert decode_image(encoded(image, "PNG", exif=exif)).size == (90, 120)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = pixels_from_bytes(encoded(Image.fromarray(ramp)), SPEC)
    assert pixels[0, 0, 0] == 0
    assert pixels[-1, -1, 0] == 255
    assert abs(int(pixels[32, 0, 0]) - 128) <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_modes_equal_pillows_conversion(mode: str) -> None:
    image = Image.fromarray(noise(80, 70)).convert(mode)
    assert np.array_equal(pixels_from_bytes(encoded(image), SPEC), by_open_clip(image.convert("RGB"), 64))


def test_cmyk_jpeg() -> None:
    image = Image.fromarray(noise(80, 70)).convert("CMYK")
    data = encoded(image, "JPEG")
    assert np.array_equal(pixels_from_bytes(data, SPEC), by_open_clip(Image.open(io.BytesIO(data)).convert("RGB"), 64))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert pixels_from_bytes(data, SPEC)[32, 32].argmax() == 0


def whole_jpeg() -> bytes:
    return encoded(Image.fromarray(noise(64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image in a known format"),
        (whole_jpeg()[:-900], "corrupt or truncated"),
        (b"\xff\xd8\xff" + bytes(100), "not an image|corrupt"),
    ],
)
def test_what_cannot_be_decoded_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageDecodeError, match=reason):
        decode_image(data)


def test_floating_point_and_huge_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    floating = Image.fromarray(np.zeros((8, 8), np.float32))
    with pytest.raises(ImageDecodeError, match="floating-point"):
        decode_image(encoded(floating, "TIFF"))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageDecodeError, match=r"too large: 64 x 64, at most 100 pixels: make the image smaller first"):
        decode_image(whole_jpeg())


def test_image_spec_round_trip_and_refusals() -> None:
    assert ImageSpec.from_json(SPEC.to_json()) == SPEC
    with pytest.raises(ValueError, match="bilinear"):
        ImageSpec.from_json({**SPEC.to_json(), "interpolation": "bilinear"})
    with pytest.raises(ValueError, match="not an ImageSpec"):
        ImageSpec.from_json({"size_px": 64})
    with pytest.raises(ValueError, match="size_px is 0"):
        ImageSpec(size_px=0, mean=SPEC.mean, std=SPEC.std)


def test_a_huge_image_equals_open_clip() -> None:
    """24 million pixels, as a camera gives them."""
    coarse = Image.fromarray(noise(40, 60)).resize((6000, 4000), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels_from_bytes(encoded(coarse, "JPEG", quality=60), SPEC), _decoded_by_pillow(coarse))


def _decoded_by_pillow(image: Image.Image) -> NDArray[np.uint8]:
    return by_open_clip(Image.open(io.BytesIO(encoded(image, "JPEG", quality=60))).convert("RGB"), 64)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_jpeg_as_telephones_write_it(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(90, 120)), "JPEG", exif=exif)
    expected = by_open_clip(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), 64)
    assert np.array_equal(pixels_from_bytes(data, SPEC), expected)


def test_transparency_of_a_palette_and_16_bits_a_channel() -> None:
    palette = Image.fromarray(noise(80, 70)).quantize(16)
    data = encoded(palette, "PNG", transparency=3)
    assert np.array_equal(pixels_from_bytes(data, SPEC), by_open_clip(palette.convert("RGB"), 64))
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(
            pixels_from_bytes(encoded(Image.fromarray(ramp), kind), SPEC)[..., 0],
            (ramp * 255.0 / 65535 + 0.5).astype(np.uint8),
        )


@pytest.mark.parametrize("size", [(300, 225), (225, 300), (64, 64), (100, 900), (640, 480)])
def test_the_pixels_lie_in_memory_as_they_are_sent(size: tuple[int, int]) -> None:
    assert images.pixels_from_image(Image.new("RGB", size), SPEC).flags.c_contiguous
