"""Decodes and resizes images to the exported encoder's uint8 pixels, for training, client and server alike.

This file imports only NumPy and Pillow, because the Triton repository carries a copy of it for its ``preprocess``
model: the server runs the client's code. Where ``simplejpeg`` is installed it decodes RGB JPEG files, faster than
Pillow and to the same pixels.

There are two steps:

1. :func:`decode_image`: bytes -> upright 8-bit RGB. EXIF orientation is applied, 16-bit grey is scaled to 8 bits
   (Pillow's own conversion would clip it to white), CMYK/palette/grey become RGB by Pillow's ``convert``, alpha is
   dropped, the first frame of an animation is taken.
2. :func:`pixels_from_image`: bicubic resize of the shorter side, then the centre crop. The result equals open_clip's
   evaluation transform (torchvision ``Resize`` + ``CenterCrop``) with Pillow 13 bit for bit, whichever Pillow is
   installed. (Where an image is more than twice as high as wide, an older Pillow's own resize can be off by 1.)

**Why the second step is faster than Pillow, and equal to it.** Resizing along an axis is a product with a banded
matrix. Only the rows and columns that the crop keeps are computed, in small blocks so that the band stays narrow. The
products are float32 sums with a known error bound far below 1. Pillow sums the same numbers in integers and rounds.
Where the float32 sum is further from a half than the bound, both round alike; the few sums that are nearer (some in
ten thousand) are computed again in integers. All blocks of an axis are one call of NumPy, because threads that pass
the interpreter lock around after every small call are slower than one thread. ``benchmarks/decoding.py`` compares it
with Pillow.

Legend: H, W, S = ``size_px`` of the :class:`ImageSpec`; R, C = rows and columns read of a source; K = source rows that
a block reads; n = any number of columns.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import math
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the accepted formats. Others are refused: some start a program, such as Ghostscript."""

MAX_PIXELS = 2**27
"""Images with more pixels are refused before they are decoded: at Pillow's 4 bytes a pixel, this many take 512 MiB.

Turning an image upright or converting it from 16 bits briefly takes a second copy.
"""

Resample = Literal["exact", "fast"]
"""How an image is resized: "exact" equals open_clip bit for bit; "fast" is at most 2 of 255 off.

"fast" does not recompute the sums near a half. About 1 in 30,000 of a photograph's values is off, by 1.
"""

_WEIGHT_BITS = 22  # fractional bits that Pillow rounds the weights of its resizing to
_MAX_PRODUCT = 2**18  # multiplications of one product; OpenBLAS starts threads for more than 2^19
_TILES = {1: (4, 40), 3: (8, 240)}  # by lanes: what OpenBLAS computes at a time, and what a block costs, in products
_OVERHEAD = 36  # what a value of the result costs besides its products, in products
_MAX_KEPT = 2**22  # values of scratch memory that a thread keeps under one name
_UNSURE = 2**14  # values that are recomputed at a time, which bounds the memory
_ORIENTATION = 0x0112  # the EXIF tag


class ImageDecodeError(ValueError):
    """The bytes cannot be decoded to an image; the message says why in a few words."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an image becomes the encoder's input. Read from the model and stored in the bundle, never set by a client."""

    size_px: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    """Channel means (RGB), subtracted in the graph after scaling to 0..1."""
    std: tuple[float, float, float]
    """Channel standard deviations (RGB), divided by in the graph."""
    interpolation: str = "bicubic"
    """Only Pillow's bicubic (antialiased, a = -0.5) is defined in format version 1."""
    resize_mode: str = "shortest"
    """Only open_clip's "shortest" (shorter side to ``size_px``, then the centre crop) is defined in version 1."""

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}: give a positive number of pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: give three numbers each, std positive")
        if (self.interpolation, self.resize_mode) != ("bicubic", "shortest"):
            raise ValueError(
                f"preprocessing {self.interpolation}/{self.resize_mode} is not supported: only bicubic/shortest is"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ImageSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        try:
            triples = {key: tuple(float(value) for value in content[key]) for key in ("mean", "std")}
            return cls(**{**content, **triples})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an ImageSpec: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """The image in ``data`` (one of :data:`FORMATS`), upright, 8-bit RGB.

    Raises:
        ImageDecodeError: empty, truncated, corrupt, of an unknown format, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(data) as image:
        image.load()
        return rgb_from_image(image)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open ``data`` after a check of its size; any error inside the block becomes an ImageDecodeError."""
    if not data:
        raise ImageDecodeError("empty file (0 bytes)")
    try:
        with _QUIET_PILLOW:
            image = Image.open(io.BytesIO(data), formats=_formats())
            _validate_size(image)
            yield image
    except ImageDecodeError:
        raise
    except UnidentifiedImageError as error:
        raise ImageDecodeError(f"not an image in a known format ({len(data)} bytes)") from error
    except MemoryError as error:
        raise ImageDecodeError("too large for this machine's memory") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(f"corrupt or truncated: {reason}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _QuietPillow:
    """While any thread is inside, Pillow gives no warnings and has no size limit of its own.

    Both are settings of the whole process, so the first thread in changes them and the last one out restores them.
    ``warnings.catch_warnings`` alone, used in several threads, could leave the warnings off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self._before.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = 2**62  # not None: other threads' Pillow reads it too

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._before.close()


_QUIET_PILLOW = _QuietPillow()


def _validate_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageDecodeError(
            f"too large: {image.width} x {image.height}, at most {MAX_PIXELS:,} pixels: make the image smaller first"
        )


def rgb_from_image(image: Image.Image) -> Image.Image:
    """``image`` turned upright by its EXIF orientation and converted to 8-bit RGB; itself if it is both already.

    Raises:
        ImageDecodeError: floating-point pixels, whose range nothing states.
    """
    orientation = _orientation(image)
    rgb = image
    if image.mode == "F":
        raise ImageDecodeError("floating-point pixels: save the image with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # "I;16", "I;16B", "I": 16-bit grey as PNG and TIFF hold it
        rgb = _grey_from_16_bit(image)
    if rgb.mode != "RGB":
        rgb = rgb.convert("RGB")
    if orientation != 1:
        rgb = rgb.transpose(_TURNS[orientation])
    if rgb is not image:
        rgb.info.clear()  # or a second call of this function would turn it again
    return rgb


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns an image upright."""


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8; 1 (upright) if it is absent, unknown or damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ):
        return 1
    return found if found in _TURNS else 1


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ImageDecodeError("32-bit pixels: save the image with 8 or 16 bits a channel")
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += 32767
    scaled //= 65535
    return Image.fromarray(scaled.astype(np.uint8))


def resized_size(width: int, height: int, size_px: int) -> tuple[int, int]:
    """(width, height) after the shorter side has become ``size_px``, rounded down as torchvision does."""
    if width <= height:
        return size_px, int(size_px * height / width)
    return int(size_px * width / height), size_px


def centred_corner(width: int, height: int, size_px: int) -> tuple[int, int]:
    """(left, top) of the centred square of ``size_px``, rounded half to even as torchvision does."""
    return round((width - size_px) / 2.0), round((height - size_px) / 2.0)


def vertical_pass_first(width: int, height: int, resized_height: int) -> bool:
    """Whether Pillow 13 and later resize ``width`` x ``height`` along the height before the width."""
    return height > 2 * width and resized_height < height


_Read = Callable[[slice, slice], NDArray[np.uint8]]
"""Rows and columns of a source -> its RGB pixels uint8 [R, C, 3]."""


def pixels_from_image(image: Image.Image, spec: ImageSpec, resample: Resample = "exact") -> NDArray[np.uint8]:
    """The encoder's input: uint8 [H, W, 3].

    ``resample`` is as :data:`Resample` says; open_clip's pixels are those before its ``ToTensor``.

    Raises:
        ImageDecodeError: as :func:`rgb_from_image`.
    """
    return _pixels_from_rgb(rgb_from_image(image), spec, resample)


def _pixels_from_rgb(rgb: Image.Image, spec: ImageSpec, resample: Resample) -> NDArray[np.uint8]:
    def read(rows: slice, columns: slice) -> NDArray[np.uint8]:
        box = (columns.start, rows.start, columns.stop, rows.stop)
        return np.asarray(rgb if box == (0, 0, *rgb.size) else rgb.crop(box))

    return _window(read, rgb.size, spec.size_px, resample)


def pixels_from_array(array: NDArray[np.uint8], spec: ImageSpec, resample: Resample = "exact") -> NDArray[np.uint8]:
    """:func:`pixels_from_image` of upright RGB pixels uint8 [height, width, 3] in any memory layout."""
    return _window(lambda rows, columns: array[rows, columns], (array.shape[1], array.shape[0]), spec.size_px, resample)


def _window(read: _Read, size: tuple[int, int], size_px: int, resample: Resample) -> NDArray[np.uint8]:
    """The centred square of the resized image, uint8 [S, S, 3]; only what it needs is computed."""
    resized = resized_size(*size, size_px)
    left, top = centred_corner(*resized, size_px)
    if resized == size:
        return np.ascontiguousarray(read(slice(top, top + size_px), slice(left, left + size_px)))
    across = _axis(size[0], resized[0], left, size_px, lanes=3)
    down = _axis(size[1], resized[1], top, size_px, lanes=1)
    window = _SCRATCH.floats("window", (len(down.taps), len(across.taps)))
    if vertical_pass_first(*size, resized[1]):
        source = _padded("source", read(down.read, across.read), down.before, down.padded, across)
        rows = _SCRATCH.floats("rows", (len(down.taps), source.shape[1]))
        _vertical(source, down, resample, rows)
        _horizontal(rows, across, resample, window)
    else:
        _vertical(_resized_rows(read, across, down, resample), down, resample, window)
    return _without_empty_slots(window.astype(np.uint8), down, across).reshape(size_px, size_px, 3)


def _without_empty_slots(window: NDArray[np.uint8], down: _Axis, across: _Axis) -> NDArray[np.uint8]:
    """[slots down, slots across] -> [S, S 3]; runs of columns, because NumPy's ``take`` copies values one by one."""
    rows = window.take(down.places, axis=0)
    pixels = np.empty((len(rows), len(across.places)), np.uint8)
    for slots, columns in across.runs:
        pixels[:, columns] = rows[:, slots]
    return pixels


class _Scratch(threading.local):
    """Memory that a thread reuses from image to image: page faults of fresh memory cost more than the computation."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.float32]] = {}

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An uninitialised array of ``shape``; the thread's next call with ``name`` returns the same memory."""
        size = math.prod(shape)
        found = self._kept.get(name)
        if found is None or found.size < size:
            found = np.empty(size, np.float32)
            if size <= _MAX_KEPT:
                self._kept[name] = found
        return found[:size].reshape(shape)


_SCRATCH = _Scratch()


def _padded(name: str, pixels: NDArray[np.uint8], above: int, rows: int, across: _Axis) -> NDArray[np.float32]:
    """[R, C, 3] -> [``rows``, C 3 padded] in scratch memory ``name``, ``above`` rows of zeros first."""
    padded = _SCRATCH.floats(name, (rows, across.padded))
    first, last = across.before, across.before + 3 * pixels.shape[1]
    inside = padded[above : above + len(pixels)]
    for border in (padded[:above], padded[above + len(pixels) :], inside[:, :first], inside[:, last:]):
        border.fill(0)
    if pixels.strides[1:] == (3, 1):  # rows are contiguous, but reshape would copy a part of an image
        flat = np.lib.stride_tricks.as_strided(pixels, (len(pixels), last - first), (pixels.strides[0], 1))
    else:
        flat = pixels.reshape(len(pixels), last - first)
    inside[:, first:last] = flat
    return padded


def _resized_rows(read: _Read, across: _Axis, down: _Axis, resample: Resample) -> NDArray[np.float32]:
    """The rows that ``down`` reads, resized along their length, a slab at a time: float32 [R padded, slots]."""
    count = down.read.stop - down.read.start
    resized = _SCRATCH.floats("rows", (down.padded, len(across.taps)))
    resized[: down.before].fill(0)
    resized[down.before + count :].fill(0)
    slabs = -(-count // max(_MAX_PRODUCT // across.weights[0].size, 16))
    step = -(-count // slabs)
    for first in range(0, count, step):
        last = min(first + step, count)
        pixels = read(slice(down.read.start + first, down.read.start + last), across.read)
        slab = _padded("slab", pixels, 0, last - first, across)
        _horizontal(slab, across, resample, resized[down.before + first : down.before + last])
    return resized


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Resampling along one axis, in blocks that begin every ``step`` places of the source.

    A place is a row; along a row it is one of a pixel's three values, so that no product needs to know of channels.
    A block computes the places of the result that begin in it. A block with fewer of them than others has empty slots,
    with weights of zero.
    """

    read: slice
    """Rows or columns of the source that are read."""
    before: int
    """Places of zero padding before those of the source."""
    padded: int
    """Places that the blocks read in all, with the zero padding before and after."""
    step: int
    """Places of the source from the start of a block to the next one's."""
    weights: NDArray[np.float32]
    """[blocks, slots of a block, K] for rows, [blocks, K, slots of a block] along a row."""
    places: NDArray[np.intp]
    """[count] The slot of each place of the result."""
    runs: tuple[tuple[slice, slice], ...]
    """Runs of consecutive slots, and the places of the result that they hold."""
    taps: NDArray[np.int64]
    """[slots, taps] Places of the source, counted from ``read.start``."""
    fixed: NDArray[np.int64]
    """[slots, taps] Their weights times 2^:data:`_WEIGHT_BITS`, the whole numbers that Pillow uses."""
    bound: float
    """By how much a float32 sum may differ from the true one."""


@functools.lru_cache(maxsize=256)
def _axis(size: int, resized: int, first: int, count: int, *, lanes: int) -> _Axis:
    """Rows ``first`` to ``first + count`` of ``size`` rows resized to ``resized``; ``lanes`` values of each row."""
    row_taps, row_fixed = _resampling_taps(size, resized, first, count)
    read = slice(int(row_taps[0, 0]), int(np.max(row_taps, where=row_fixed != 0, initial=0)) + 1)
    row_taps = np.minimum(row_taps, read.stop - 1) - read.start
    length = row_taps.shape[1]
    anchors = _laned((np.arange(count) * (size / resized)).astype(np.int64)[:, None], lanes)[:, 0]
    row_taps, row_fixed = _laned(row_taps, lanes), row_fixed.repeat(lanes, axis=0)
    step, slots = _blocking(anchors, lanes, size / resized, length)
    blocks = anchors // step
    inside = np.arange(len(blocks)) - np.searchsorted(blocks, blocks)  # number of each place in its block
    slots, total = max(slots, int(inside.max()) + 1), int(blocks[-1]) + 1
    places = blocks * slots + inside
    taps, fixed = np.zeros((2, total * slots, length), np.int64)
    taps[places], fixed[places] = row_taps, row_fixed
    before = int((anchors - row_taps[:, 0]).max())
    columns = row_taps + before - (blocks * step)[:, None]
    weights = _weights(row_fixed, columns, (blocks, inside), (total, slots))
    # Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: n terms in any order are off by no more than
    # n u / (1 - n u) times the sum of their magnitudes, u = 2^-24. Twice that, for what happens to be rounded besides.
    largest = 255 * float(np.abs(row_fixed).sum(axis=1).max()) / (1 << _WEIGHT_BITS)
    return _Axis(
        read=read,
        before=before,
        padded=max((total - 1) * step + weights.shape[2], before + lanes * (read.stop - read.start)),
        step=step,
        weights=weights if lanes == 1 else np.ascontiguousarray(weights.swapaxes(1, 2)),
        places=places,
        runs=_runs(places),
        taps=taps,
        fixed=fixed,
        bound=2 * (length + 1) * 2.0**-24 * largest,
    )


def _weights(
    fixed: NDArray[np.int64],
    columns: NDArray[np.int64],
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    shape: tuple[int, int],
) -> NDArray[np.float32]:
    """Float32 [blocks, slots, K] from whole weights [count, taps], their columns, and the (block, slot) of each row."""
    length = int(np.max(columns, where=fixed != 0, initial=0)) + 1
    weights = np.zeros((*shape, length + 1), np.float32)
    behind = np.where(fixed != 0, columns, length)  # a tap that is out of range lands behind what is read
    weights[places[0][:, None], places[1][:, None], behind] = fixed / float(1 << _WEIGHT_BITS)
    return weights[:, :, :length]


def _laned(rows: NDArray[np.int64], lanes: int) -> NDArray[np.int64]:
    """Row numbers [n, m] -> numbers of values [n lanes, m], where each row has ``lanes`` values side by side."""
    return (lanes * rows[:, None] + np.arange(lanes)[:, None]).reshape(-1, rows.shape[1])


def _blocking(anchors: NDArray[np.int64], lanes: int, scale: float, length: int) -> tuple[int, int]:
    """(step, slots of a block) of the least cost, estimated in products."""
    tile, overhead = _TILES[lanes]
    found = [(lanes * int(slots // lanes * scale), slots) for slots in range(tile, 5 * tile, tile)]
    fewest = int(np.bincount(anchors // lanes).max())  # where one row of the source makes more than all those slots
    step, slots = min(
        [each for each in found if each[0]] or [(lanes, fewest)],
        key=lambda each: (each[1] * (each[0] + lanes * length + _OVERHEAD) + overhead) / each[0],
    )
    for longer in range(int(slots * scale), step, -1):  # whole rows are enough, but leave slots empty
        blocks = anchors // longer
        if (blocks[1:] >= blocks[:-1]).all() and np.bincount(blocks).max() <= slots:
            return longer, slots
    return step, slots


def _runs(places: NDArray[np.intp]) -> tuple[tuple[slice, slice], ...]:
    """Runs of consecutive ``places``, and their indices."""
    edges = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return tuple(
        (slice(int(places[first]), int(places[last - 1]) + 1), slice(first, last))
        for first, last in itertools.pairwise(edges)
    )


def _horizontal(source: NDArray[np.float32], axis: _Axis, resample: Resample, out: NDArray[np.float32]) -> None:
    """[R, C 3 padded] -> ``out`` [R, slots], values 0 to 255."""
    (blocks, length, slots), rows = axis.weights.shape, len(source)
    line, value = source.strides
    windows = _strided(source, (blocks, rows, length), (axis.step * value, line, value))
    np.matmul(windows, axis.weights, out=out.reshape(rows, blocks, slots).swapaxes(0, 1))

    def exact(places: NDArray[np.intp]) -> NDArray[np.int64]:
        row, slot = np.divmod(places, out.shape[1])
        return _whole_sums(axis, slot, lambda tap: source[row[:, None], axis.before + tap])

    _settle(out, axis, resample, exact)


def _vertical(source: NDArray[np.float32], axis: _Axis, resample: Resample, out: NDArray[np.float32]) -> None:
    """[R padded, n] -> ``out`` [slots, n], values 0 to 255."""
    (blocks, slots, length), width = axis.weights.shape, source.shape[1]
    line, value = source.strides
    windows = _strided(source, (blocks, length, width), (axis.step * line, line, value))
    resized = out.reshape(blocks, slots, width)
    columns = max(_MAX_PRODUCT // (slots * length), 64)
    for left in range(0, width, columns):
        here = slice(left, left + columns)
        np.matmul(axis.weights, windows[:, :, here], out=resized[:, :, here])

    def exact(places: NDArray[np.intp]) -> NDArray[np.int64]:
        slot, column = np.divmod(places, width)
        return _whole_sums(axis, slot, lambda tap: source[axis.before + tap, column[:, None]])

    _settle(out, axis, resample, exact)


def _strided(
    array: NDArray[np.float32], shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Overlapping windows of ``array``, which is not copied."""
    return np.lib.stride_tricks.as_strided(array, shape, strides, writeable=False)


def _whole_sums(
    axis: _Axis, slots: NDArray[np.intp], source_at: Callable[[NDArray[np.int64]], NDArray[np.float32]]
) -> NDArray[np.int64]:
    """Pillow's own sums for ``slots`` of the result, rounded: 64-bit integers."""
    sums = np.einsum("ut,ut->u", axis.fixed[slots], source_at(axis.taps[slots]).astype(np.int64))
    rounded: NDArray[np.int64] = np.clip((sums + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS, 0, 255)
    return rounded


def _settle(
    sums: NDArray[np.float32],
    axis: _Axis,
    resample: Resample,
    exact: Callable[[NDArray[np.intp]], NDArray[np.int64]],
) -> None:
    """Round ``sums`` and clip them to 0..255, in place; for "exact", recompute those near a half as Pillow does."""
    if resample == "fast":
        sums += 0.5  # not rint, which rounds halves to even: where an image is halved, many sums are halves
        np.clip(np.floor(sums, out=sums), 0.0, 255.0, out=sums)
        return
    whole = np.rint(sums, out=_SCRATCH.floats("whole", sums.shape))
    np.abs(np.subtract(sums, whole, out=sums), out=sums)
    near = sums >= 0.5 - axis.bound
    unsure = np.flatnonzero(near)
    np.clip(whole, 0.0, 255.0, out=sums)
    flat = sums.reshape(-1)
    for first in range(0, unsure.size, _UNSURE):
        some = unsure[first : first + _UNSURE]
        flat[some] = exact(some)


def _resampling_taps(size: int, resized: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of ``size`` rows make the rows ``first`` to ``first + count`` of ``resized`` ones, and their weights.

    Pillow's: bicubic (a = -0.5), widened when shrinking, rounded to :data:`_WEIGHT_BITS` fractional bits. Both int64
    [count, taps]; the weight of a tap that is out of range is 0.
    """
    step = size / resized
    widening = max(step, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * step
    begins = np.maximum((centres - 2 * widening + 0.5).astype(int), 0)
    ends = np.minimum((centres + 2 * widening + 0.5).astype(int), size)
    taps = begins[:, None] + np.arange((ends - begins).max())
    weights = _bicubic((taps + 0.5 - centres[:, None]) / widening) * (taps < ends[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return taps, np.trunc(weights * (1 << _WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int64)


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def pixels_from_bytes(data: bytes, spec: ImageSpec, resample: Resample = "exact") -> NDArray[np.uint8]:
    """:func:`decode_image`, then :func:`pixels_from_image`: uint8 [H, W, 3].

    Raises:
        ImageDecodeError: as :func:`decode_image`.
    """
    with _opened(data) as image:
        array = _by_simplejpeg(data, image)
        if array is None:
            image.load()
            rgb = rgb_from_image(image)
        else:
            array = _turned(array, _orientation(image))
    return _pixels_from_rgb(rgb, spec, resample) if array is None else pixels_from_array(array, spec, resample)


def _by_simplejpeg(data: bytes, image: Image.Image) -> NDArray[np.uint8] | None:
    """The pixels uint8 [height, width, 3] of ``image``, opened from ``data``; None leaves it to Pillow.

    Damaged files are left to Pillow, which decides whether to refuse them.
    """
    turbo = _simplejpeg()
    if turbo is None or image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    try:
        array: NDArray[np.uint8] = turbo.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
    return array if array.shape == (image.height, image.width, 3) else None


@functools.cache
def _simplejpeg() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _turned(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of ``array`` [height, width, 3] turned upright from EXIF's ``orientation``."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::rows, ::columns]
