"""How a pipeline is laid out on the card that is there."""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_PIXEL = 4096
"""Working memory of an image in half precision, by its pixels: an estimate, about 1 GiB at 512 x 512."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the weights lie, and how much is computed at once."""

    offload: bool = False
    """Each part comes to the card when it is its turn: slower, and only the largest part must fit."""
    slicing: bool = False
    """Attention head by head, decoder image by image: a little slower, with much less memory."""


def placement_of(*, free_bytes: int | None, weights_bytes: int, batch_size: int, size_px: int) -> Placement:
    """The quickest layout that fits.

    Args:
        free_bytes: of the card; None where there is none, and everything is done as it is.
        weights_bytes: of all parts of the pipeline, in its precision.
        batch_size: images made at once.
        size_px: side of the images.
    """
    if free_bytes is None:
        return Placement()
    image_bytes = BYTES_PER_PIXEL * size_px**2
    if weights_bytes + batch_size * image_bytes <= free_bytes:
        return Placement()
    return Placement(slicing=True, offload=weights_bytes + image_bytes > free_bytes)
