"""Files that are damaged or meant to harm: each gives pixels or one line that says why not, and nothing else."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from clipship.core.images.decoding import ImageDecodeError, ImageSpec, Resample, decode_image, pixels_from_bytes

SPEC = ImageSpec(size_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def seeds() -> list[bytes]:
    """Small whole files of every kind, with EXIF where the kind has it, a palette, 16 bits and transparency."""
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((97, 61))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind in KINDS:
        for mode in ("RGB", "L", "P") if kind != "WEBP" else ("RGB", "RGBA"):
            image = picture.convert(mode) if kind != "JPEG" else picture.convert({"P": "CMYK"}.get(mode, mode))
            buffer = io.BytesIO()
            image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            found.append(buffer.getvalue())
    for kind, options in (
        ("JPEG", {"progressive": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    grey = io.BytesIO()
    Image.fromarray(random.integers(0, 65536, (30, 40), dtype=np.uint16)).save(grey, "PNG")
    return [*found, grey.getvalue()]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """``data`` cut off, with bits flipped, header bytes overwritten, a piece lost or added, or its end random."""
    kind = random.integers(0, 6)
    changed = bytearray(data)
    if kind == 0:
        return bytes(changed[: random.integers(0, len(data))])
    if kind == 1:
        for place in random.integers(0, len(data), random.integers(1, 20)):
            changed[place] ^= 1 << int(random.integers(0, 8))
    elif kind == 2:
        for place in random.integers(0, min(len(data), 200), random.integers(1, 8)):
            changed[place] = int(random.choice([0, 1, 127, 128, 255]))
    elif kind == 3:
        first, length = int(random.integers(0, len(data))), int(random.integers(1, 200))
        del changed[first : first + length]
    elif kind == 4:
        place = int(random.integers(0, len(data)))
        changed[place:place] = random.bytes(int(random.integers(1, 300)))
    else:
        changed = bytearray(data[: len(data) // 2] + random.bytes(len(data) // 2))
    return bytes(changed)


def outcome(data: bytes, resample: Resample = "exact") -> str:
    """ "pixels", or the one line that says why there are none. Anything else fails the test."""
    try:
        pixels = pixels_from_bytes(data, SPEC, resample)
    except ImageDecodeError as error:
        line = str(error)
        assert line
        assert "\n" not in line
        return line
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    return "pixels"


def mutants(count: int) -> list[bytes]:
    random = np.random.default_rng(2)
    whole = seeds()
    return [damaged(whole[number % len(whole)], random) for number in range(count)]


def test_six_thousand_damaged_files() -> None:
    outcomes = [outcome(data) for data in mutants(6000)]
    assert 1000 < outcomes.count("pixels") < 5000
    assert sum(line.startswith("not an image") for line in outcomes) > 100
    assert sum(line.startswith("corrupt or truncated: ") for line in outcomes) > 1000


def test_threads_with_damaged_files_leave_the_process_as_it_was() -> None:
    files, filters, limit = mutants(1500), list(warnings.filters), Image.MAX_IMAGE_PIXELS
    alone = [outcome(data, "fast") for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda data: outcome(data, "fast"), files)) == alone
    assert list(warnings.filters) == filters
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"RIFF",
        b"II*\0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        bytes(5000),
        b"\xff\xd8" * 2000,
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    assert outcome(data) != "pixels"


def test_postscript_is_not_opened_for_it_starts_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "EPS")
    with pytest.raises(ImageDecodeError, match="not an image in a known format"):
        decode_image(buffer.getvalue())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of that size and holds a few bytes of zeros."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )


def resized_header(kind: str, width: int, height: int) -> bytes:
    """A small file of ``kind`` whose header says another size."""
    buffer = io.BytesIO()
    Image.new("L" if kind == "JPEG" else "RGB", (16, 16)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    else:
        data[6:10] = struct.pack("<HH", width, height)  # GIF
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_header(14_143, 14_143),  # 200 megapixels
        png_header(2**31 - 1, 2**31 - 1),
        resized_header("JPEG", 16_320, 12_240),  # 200 megapixels, as telephones have them
        resized_header("GIF", 65_535, 65_535),
        resized_header("BMP", 20_000, 10_000),
    ],
)
def test_200_megapixels_are_refused_by_their_size_before_they_are_decoded(data: bytes) -> None:
    decode_image(png_header(16, 16))  # the formats are loaded
    tracemalloc.start()
    try:
        with pytest.raises(
            ImageDecodeError, match=r"^too large: \d+ x \d+, at most 134,217,728 pixels: make the image"
        ):
            pixels_from_bytes(data, SPEC)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_below_the_limit_takes_the_memory_that_is_stated() -> None:
    """11,000 x 11,000 of one colour is a small file; it is decoded a byte a channel and never copied whole."""
    buffer = io.BytesIO()
    Image.new("1", (11_000, 11_000), 1).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 200_000
    assert outcome(buffer.getvalue()) == "pixels"


def test_a_reason_with_line_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("first\n  second")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ImageDecodeError, match=r"^corrupt or truncated: first second$"):
        decode_image(b"something")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(kind: str) -> None:
    picture, whole, broken = Image.linear_gradient("L").convert("RGB"), io.BytesIO(), io.BytesIO()
    picture.save(whole, kind, quality=90)
    picture.save(broken, kind, quality=90, exif=b"Exif\0\0MM\0\1\0\0\0\x08\0\x03garbage")
    found, expected = (pixels_from_bytes(data.getvalue(), SPEC) for data in (broken, whole))
    assert len(broken.getvalue()) > len(whole.getvalue())
    assert np.array_equal(found, expected)
