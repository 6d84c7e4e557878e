"""The image encoder for whole images of one size, a camera's: resize and crop are in the graph, equal to Pillow's.

Pillow's antialiased bicubic filter is linear along each axis, so for a fixed size it is two products with constant
matrices. The centre crop is folded into them: rows and columns that it drops are never computed.

**Bit for bit.** Pillow sums 8-bit values times weights of 22 fractional bits in integers, then rounds half up and clips
to 0..255. A float32 holds integers up to 2^24 only, so each weight w is split into two whole numbers, w 2^22 = high
2^8 + low: both sums stay below that, hence exact in any order of summation and in any runtime that computes in float32
(not in TF32), and so is what puts them together.

Only Cast, Slice, Split, Transpose, MatMul, Mul, Add, Sub, Floor and Clip are used, which every runtime has; the cast
comes first, since TensorRT takes uint8 at an input only.

Legend: N images, H0 x W0 their size, S = side of the encoder's input in pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipship.core.bundle import EncoderVariant, VocabularyFeatures
from clipship.core.comparison import Comparison
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.images.decoding import (
    WEIGHT_BITS,
    ImageSpec,
    centred_corner,
    resampling_taps,
    resized_size,
    vertical_pass_first,
)
from clipship.core.tensors import TensorSpec, embedding_tensor, image_tensor
from clipship.core.tolerances import TOLERANCES
from clipship.export.fused_encoder import FusedImageEncoder
from clipship.export.image_input import Picture, pixels_of_sources, sources_of
from clipship.export.onnx_graph import OPSET, onnx_from_module
from clipship.export.reference import image_features
from clipship.export.verification.verify import verify_encoder

if TYPE_CHECKING:
    from clipship.export.precision.encoder_variants import Profile
    from clipship.training.methods.base import Method

LONGEST_PX = 16_384
"""Of a source's two sides."""

_LOW_BITS = 8
_HIGH_UNIT = float(1 << (WEIGHT_BITS - _LOW_BITS))
_LOW_LIMIT = float(1 << 23)  # with a remainder and a half below 2^23 added, still below 2^24

_BATCH_SIZES = (1, 2, 7)


def source_size_from_text(text: str) -> tuple[int, int]:
    """(width, height) of "1920x1080".

    Raises:
        UsageError: it is not of that form, or a side is out of range.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"source size {text!r}: give WIDTHxHEIGHT in pixels, such as 1920x1080")
    size = int(width), int(height)
    if not 1 <= min(size) <= max(size) <= LONGEST_PX:
        raise UsageError(f"source size {text}: give sides of 1 to {LONGEST_PX} pixels")
    return size


class SourceResize(nn.Module):
    """uint8 [N, H0, W0, 3] -> float32 [N, S, S, 3] with whole values 0..255: what preprocessing makes of the images.

    Raises:
        UsageError: a side so much longer than S that a sum would not be exact.
    """

    def __init__(self, source_size: tuple[int, int], spec: ImageSpec) -> None:
        super().__init__()
        (width, height), side = source_size, spec.size_px
        resized = resized_size(width, height, side)
        left, top = centred_corner(*resized, side)
        self.vertical_first = vertical_pass_first(width, height, resized[1])
        self.columns, across = _pass(width, resized[0], left, side)
        self.rows, down = _pass(height, resized[1], top, side)
        self.register_buffer("across", None if across is None else across.T.contiguous())  # [W0, 2 S]
        self.register_buffer("down", down)  # [2 S, H0]

    across: Tensor | None
    down: Tensor | None

    def forward(self, image: Tensor) -> Tensor:
        """As the class says."""
        used = image.float()[:, self.rows, self.columns]
        planes = used.permute(0, 3, 1, 2)
        for step in (self._vertical, self._horizontal) if self.vertical_first else (self._horizontal, self._vertical):
            planes = step(planes)
        return planes.permute(0, 2, 3, 1)

    def _horizontal(self, planes: Tensor) -> Tensor:
        return planes if self.across is None else _as_pillow_rounds(*(planes @ self.across).chunk(2, dim=3))

    def _vertical(self, planes: Tensor) -> Tensor:
        return planes if self.down is None else _as_pillow_rounds(*(self.down @ planes).chunk(2, dim=2))


def _as_pillow_rounds(high: Tensor, low: Tensor) -> Tensor:
    """``(high 2^8 + low) / 2^22``, rounded half up and clipped, every step in whole numbers below 2^24."""
    whole = torch.floor(high * (1 / _HIGH_UNIT))
    rest = (high - whole * _HIGH_UNIT) * (1 << _LOW_BITS) + low + (1 << (WEIGHT_BITS - 1))
    return (whole + torch.floor(rest * (1 / (1 << WEIGHT_BITS)))).clamp(0.0, 255.0)


def _pass(size: int, resized: int, first: int, count: int) -> tuple[slice, Tensor | None]:
    """Which of ``size`` rows are read, and their weights [2 count, rows read], high parts first; None: no resizing."""
    if size == resized:
        return slice(first, first + count), None
    taps, fixed = resampling_taps(size, resized, first, count)
    weights = np.zeros((count, size), np.int64)
    np.add.at(weights, (np.arange(count)[:, None], np.minimum(taps, size - 1)), fixed)
    high = (weights + (1 << (_LOW_BITS - 1))) >> _LOW_BITS
    low = weights - (high << _LOW_BITS)  # -128 to 127
    if 255 * int(np.abs(low).sum(axis=1).max()) >= _LOW_LIMIT:
        raise UsageError(f"{size} pixels of a source become {resized}: too many at once, make the images smaller first")
    read = np.flatnonzero(weights.any(axis=0))
    used = slice(int(read[0]), int(read[-1]) + 1)
    return used, torch.from_numpy(np.concatenate([high, low])[:, used]).float()


class SourceEncoder(nn.Module):
    """uint8 [N, H0, W0, 3] -> float32 features of unit length [N, D]."""

    def __init__(self, method: Method, source_size: tuple[int, int], *, opset: int = OPSET) -> None:
        super().__init__()
        self.resize = SourceResize(source_size, method.clip.image_spec)
        self.encoder = FusedImageEncoder(method, opset=opset)

    def forward(self, image: Tensor) -> Tensor:
        """As the class says."""
        features: Tensor = self.encoder(self.resize(image))
        return features


def source_tensor(source_size: tuple[int, int]) -> TensorSpec:
    """The input uint8 [N, H0, W0, 3], named as that of every other variant."""
    width, height = source_size
    plain = image_tensor(1)
    return TensorSpec(name=plain.name, dtype=plain.dtype, shape=(plain.shape[0], height, width, 3))


def write_source_variant(
    method: Method,
    source_size: tuple[int, int],
    folder: Path,
    pictures: Sequence[Picture],
    *,
    classifier: VocabularyFeatures,
    metadata: Mapping[str, str],
    profile: Profile,
) -> tuple[EncoderVariant, tuple[Comparison, ...]]:
    """Export the encoder for images of ``source_size`` into ``folder``, and compare it with Pillow and PyTorch.

    Args:
        pictures: what it is compared on, resized to ``source_size`` first.
        metadata: for the graph.

    Raises:
        CheckFailed: a pixel differs from Pillow's, or features are out of the float32 tolerance.
        DataError: a picture cannot be decoded.
    """
    width, height = source_size
    sources = sources_of(pictures, source_size)
    pixels = compare_with_pillow(sources, method.clip.image_spec)
    path = folder / f"image_encoder_{width}x{height}.onnx"
    onnx_from_module(
        SourceEncoder(method, source_size, opset=profile.opset),
        torch.zeros((2, height, width, 3), dtype=torch.uint8),
        path,
        input_spec=source_tensor(source_size),
        output_spec=embedding_tensor(method.clip.embed_dim),
        metadata={**metadata, "clipship.source_size": f"{width}x{height}"},
        opset=profile.opset,
        external_bytes=profile.external_bytes,
    )
    comparisons = verify_encoder(
        path,
        f"{width}x{height} images",
        sources,
        image_features(method, pixels),
        references=classifier,
        tolerance=TOLERANCES["fp32"],
        batch_sizes=_BATCH_SIZES,
    )
    if not all(comparisons):
        table = "\n".join(map(str, comparisons))
        raise CheckFailed(f"the variant for {width} x {height} does not equal PyTorch, nothing was written:\n{table}")
    variant = EncoderVariant(
        file=path.name, precision="fp32", runtime="onnx", opset=profile.opset, source_size=(width, height)
    )
    return variant, comparisons


def compare_with_pillow(sources: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """Pillow's pixels [N, S, S, 3] of ``sources`` [N, H0, W0, 3], after :class:`SourceResize` has been held to them.

    Raises:
        CheckFailed: a pixel differs.
    """
    height, width = sources.shape[1:3]
    resize = SourceResize((width, height), spec).eval()
    pixels = pixels_of_sources(sources, spec)
    with torch.inference_mode():
        given = np.concatenate([resize(torch.from_numpy(source[None])).numpy() for source in sources])
    steps = float(np.abs(given - pixels).max())
    if steps != 0:
        raise CheckFailed(
            f"images of {width} x {height} resized in the graph differ from Pillow's by {steps:.0f} of 255 steps, "
            "nothing was written: pack without this source size"
        )
    return pixels
