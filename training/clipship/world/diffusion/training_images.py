"""Pictures and captions for training the pipeline: picture `index` is a function of the seed and the index."""

from collections.abc import Iterator

import numpy as np

from clipship.world.drawing.captions import caption_of
from clipship.world.drawing.render import render_scene
from clipship.world.drawing.scenes import Scene, sample_scene
from clipship.world.drawing.stencils import Bytes
from clipship.world.drawing_pool import drawn_ahead

_STREAM = 7_007
_CAPTION_STREAM = 7_008
_CAPTIONS_DRAWN = 2


def scene_at(seed: int, index: int) -> Scene:
    """Return the scene of a picture; none holds a composition that is held out of pre-training."""
    return sample_scene(_generator_at(seed, index))


def picture_at(seed: int, index: int) -> Bytes:
    """Draw a picture, uint8 [64, 64, 3]."""
    rng = _generator_at(seed, index)
    return render_scene(sample_scene(rng), rng)


def caption_at(seed: int, index: int, step: int) -> str:
    """Return the caption of a picture at a step of the training.

    It is the one of a few random captions that states most: the model does not learn a word from pictures that show it
    while their captions leave it out.
    """
    rng = np.random.Generator(np.random.PCG64([_CAPTION_STREAM, seed, index, step]))
    scene = scene_at(seed, index)
    drawn = [caption_of(scene, rng) for _ in range(_CAPTIONS_DRAWN)]
    return max(drawn, key=lambda caption: len(caption.facts)).text


def draw_pictures(seed: int, first: int, count: int) -> Bytes:
    """Draw `count` pictures from index `first` on, uint8 [count, 64, 64, 3]."""
    return np.stack([picture_at(seed, index) for index in range(first, first + count)])


def pictures_ahead(seed: int, first: int, last: int, size: int, *, workers: int = 1) -> Iterator[Bytes]:
    """Return the pictures from `first` up to but not including `last`, `size` at a time, drawn in other processes."""
    starts = range(first, last, size)
    return drawn_ahead(draw_pictures, ((seed, start, min(size, last - start)) for start in starts), workers=workers)


def _generator_at(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([_STREAM, seed, index]))
