"""Resizing equals Pillow's bit for bit, the fast way is within 1 of it, and simplejpeg changes no pixel."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core.images import decoding as images
from clipship.core.images.decoding import (
    ImageSpec,
    Resample,
    centred_corner,
    pixels_from_bytes,
    pixels_from_image,
    resized_size,
    vertical_pass_first,
)

RNG = np.random.default_rng(5)


def spec_of(size_px: int) -> ImageSpec:
    return ImageSpec(size_px=size_px, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def by_pillow(image: Image.Image, size_px: int) -> NDArray[np.uint8]:
    """The whole image resized, then cropped. Before version 13 Pillow resized the width first, always."""
    width, height = resized_size(*image.size, size_px)
    left, top = centred_corner(width, height, size_px)
    if int(PIL.__version__.split(".")[0]) < 13 and vertical_pass_first(*image.size, height):
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + size_px, top + size_px)))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def stripes(width: int, height: int) -> Image.Image:
    """Black and white lines of one pixel: halved, nearly every sum is a half, which float32 cannot decide."""
    return Image.fromarray(
        np.broadcast_to((np.indices((height, width)).sum(0) % 2 * 255)[..., None], (height, width, 3)).astype(np.uint8)
    )


def smooth(width: int, height: int) -> Image.Image:
    ramp = np.add.outer(np.linspace(0, 130, height), np.linspace(0, 125, width))
    return Image.fromarray(np.stack([ramp, 255 - ramp, ramp * 0], axis=-1).astype(np.uint8))


MAKERS = (noise, stripes, smooth)


@pytest.mark.parametrize("chunk", range(4))
def test_three_thousand_sizes_equal_pillow_bit_for_bit(chunk: int) -> None:
    random = np.random.default_rng(chunk)
    for round_ in range(750):
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(400), 2)))
        size_px = int(random.choice([1, 7, 32, 33, 64]))
        if max(width, height) / min(width, height) * size_px > 20_000:
            continue  # Pillow's side of the comparison would take gigabytes
        image = MAKERS[round_ % 3](width, height)
        found = pixels_from_image(image, spec_of(size_px))
        assert np.array_equal(found, by_pillow(image, size_px)), (width, height, size_px)


@pytest.mark.parametrize("size_px", [224, 336])
@pytest.mark.parametrize(
    "size",
    [(500, 375), (375, 500), (448, 448), (1920, 1080), (1080, 2400), (448, 900), (3000, 2000), (300, 200), (100, 99)],
)
def test_sizes_of_photographs_equal_pillow(size: tuple[int, int], size_px: int) -> None:
    for maker in MAKERS:
        image = maker(*size)
        assert np.array_equal(pixels_from_image(image, spec_of(size_px)), by_pillow(image, size_px)), maker.__name__


def test_a_window_of_a_very_long_image_is_made_without_the_rest() -> None:
    """300 x 1 becomes 67,200 x 224 in Pillow; a hundred times that would not fit into memory."""
    for size in [(300, 1), (1, 300), (4001, 150), (150, 4001)]:
        image = noise(*size)
        assert np.array_equal(pixels_from_image(image, spec_of(64)), by_pillow(image, 64)), size
    assert pixels_from_image(noise(60_000, 1), spec_of(224)).shape == (224, 224, 3)
    assert pixels_from_image(noise(1, 60_000), spec_of(224)).shape == (224, 224, 3)


def test_fast_is_at_most_two_off_and_seldom() -> None:
    random = np.random.default_rng(9)
    off = []
    for round_ in range(150):
        width, height = (int(side) for side in random.integers(8, 700, 2))
        image = MAKERS[round_ % 3](width, height)
        exact, fast = (pixels_from_image(image, spec_of(64), how).astype(int) for how in ("exact", "fast"))
        assert np.abs(exact - fast).max() <= 2, (width, height)
        off.append(np.mean(exact != fast))
    assert max(off[::3]) < 0.0005  # noise
    assert sum(off) > 0


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_bound_holds_for_the_sums(lanes: int) -> None:
    """What decides that a value need not be summed again: the float32 sums are closer to the true ones than it says."""
    axis = images._axis(1200, 224, 0, 224, lanes=lanes)
    weights = axis.weights if lanes == 1 else axis.weights.swapaxes(1, 2)
    source = np.zeros((axis.padded, 30), np.float32)
    source[axis.before : axis.before + lanes * 1200] = RNG.integers(0, 256, (lanes * 1200, 30))
    starts = range(0, len(weights) * axis.step, axis.step)
    windows = np.stack([source[start : start + weights.shape[2]] for start in starts])
    sums = (weights @ windows).reshape(len(axis.taps), 30)
    wanted = source[axis.before + axis.taps].astype(np.float64)
    true = np.einsum("ct,ctn->cn", axis.fixed.astype(np.float64), wanted) / 2**22
    assert 0 < np.abs(sums - true).max() < axis.bound < 0.02


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("size", [1, 30, 100, 223, 225, 375, 448, 1080, 4000])
def test_runs_are_the_places_of_the_result(size: int, lanes: int) -> None:
    axis = images._axis(size, 224, 0, 224, lanes=lanes)
    assert len(axis.places) == 224 * lanes == len(np.unique(axis.places))
    slots = np.concatenate([np.arange(each.start, each.stop) for each, _ in axis.runs])
    places = np.concatenate([np.arange(each.start, each.stop) for _, each in axis.runs])
    assert np.array_equal(slots, axis.places)
    assert np.array_equal(places, np.arange(224 * lanes))
    assert len(axis.runs) <= len(axis.weights)


def test_threads_get_what_one_thread_gets() -> None:
    pictures = [noise(*(int(side) for side in RNG.integers(50, 500, 2))) for _ in range(40)]
    alone = [pixels_from_image(picture, spec_of(224)) for picture in pictures]
    images._axis.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda picture: pixels_from_image(picture, spec_of(224)), pictures))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    images._simplejpeg.cache_clear()
    yield
    images._simplejpeg.cache_clear()


def jpegs() -> list[bytes]:
    """Every subsampling, quality, orientation and mode that a plain JPEG file has."""
    found = []
    for number in range(120):
        image = MAKERS[number % 3](*(int(side) for side in RNG.integers(1, 300, 2)))
        exif = Image.Exif()
        if number % 2:
            exif[0x0112] = number % 9
        if number % 10 == 3:
            image = image.convert(("L", "CMYK")[number // 10 % 2])
        buffer = io.BytesIO()
        options = {} if image.mode == "L" else {"subsampling": number % 3}
        image.save(
            buffer, "JPEG", quality=(30, 75, 95, 100)[number % 4], progressive=number % 20 == 5, exif=exif, **options
        )
        found.append(buffer.getvalue())
    damaged = [data[: int(len(data) * 0.9)] for data in found[:30]]
    return [*found, *damaged, *(_flipped(data) for data in found[30:90])]


def _flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    for place in RNG.integers(0, len(data), 3):
        changed[place] ^= 1 << int(RNG.integers(0, 8))
    return bytes(changed)


def outcome(data: bytes, resample: Resample = "exact") -> bytes | str:
    try:
        return pixels_from_bytes(data, spec_of(64), resample).tobytes()
    except images.ImageDecodeError as error:
        return str(error)


def test_simplejpeg_changes_neither_pixels_nor_refusals(request: pytest.FixtureRequest) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    files = jpegs()
    with patch.object(simplejpeg, "decode_jpeg", wraps=simplejpeg.decode_jpeg) as decoding:
        with_it = [outcome(data) for data in files]
    assert decoding.call_count > 100
    request.getfixturevalue("without_simplejpeg")
    assert [outcome(data) for data in files] == with_it
    assert sum(isinstance(each, str) for each in with_it) >= 30


@pytest.mark.usefixtures("without_simplejpeg")
def test_pillow_decodes_where_simplejpeg_is_missing() -> None:
    assert images._simplejpeg() is None
    buffer = io.BytesIO()
    noise(90, 80).save(buffer, "JPEG")
    expected = by_pillow(Image.open(io.BytesIO(buffer.getvalue())), 64)
    assert np.array_equal(pixels_from_bytes(buffer.getvalue(), spec_of(64)), expected)
