"""The captioned batches of pre-training: batch `step` is a function of the seed and the step only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from clipship.world.drawing.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
)
from clipship.world.drawing.captions import caption_of
from clipship.world.drawing.render import render_scene
from clipship.world.drawing.scenes import FULL_PALETTE, Palette, Scene, facts_of, sample_palette, sample_scene
from clipship.world.drawing.stencils import PICTURE_PX, Bytes
from clipship.world.drawing_pool import drawn_ahead

FAMILY_SIZE = 64
"""Pictures of every second batch share a small palette in families of this size: a harder contrast."""
LONE_PLAIN_STEPS = range(640, 1400)
"""Every second batch has large plain things only: shapes are learned on them long before elsewhere."""
LONE_STEPS = range(1400, 2600)
"""Every second batch has large things only: textures are learned on them."""
_CALM = ("sand", "snow", "paper")
_PALETTE_STREAM = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedBatch:
    """N pictures, N captions and which caption fits which picture."""

    pixels: Bytes
    """uint8 [N, PICTURE_PX, PICTURE_PX, 3]."""
    captions: tuple[str, ...]
    fits: NDArray[np.bool_]
    """[N, N]; row = picture, column = caption."""
    words: dict[str, NDArray[np.int64]]
    """For every axis of `WORD_AXES`, int64 [N]: which of its captions is true, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class WordAxis:
    """Short captions, one for every value, of which exactly one is true of a scene of this kind."""

    kind: str
    captions: tuple[str, ...]


WORD_AXES: dict[str, WordAxis] = {
    "shape": WordAxis(kind="single", captions=tuple(f"a photo of a {word}." for word in SHAPES)),
    "texture": WordAxis(kind="single", captions=tuple(f"a photo of a {word} thing." for word in TEXTURES)),
    "colour": WordAxis(kind="single", captions=tuple(f"a photo of a {word} thing." for word in COLOURS)),
    "shapes": WordAxis(kind="group", captions=tuple(f"a photo of {PLURALS[word]}." for word in SHAPES)),
    "count": WordAxis(kind="group", captions=tuple(f"a photo of {word} things." for word in COUNT_WORDS)),
}


def make_batch(seed: int, step: int, size: int) -> CaptionedBatch:
    """Draw the pictures of one step and caption them."""
    pixels = np.empty((size, PICTURE_PX, PICTURE_PX, 3), np.uint8)
    texts, shown, stated, scenes = [], [], [], []
    for index in range(size):
        rng = np.random.Generator(np.random.PCG64([seed, step, index]))
        scene = sample_scene(rng, _palette_of(seed, step, index // FAMILY_SIZE))
        caption = caption_of(scene, rng)
        pixels[index] = render_scene(scene, rng)
        texts.append(caption.text)
        shown.append(facts_of(scene))
        stated.append(caption.facts)
        scenes.append(scene)
    return CaptionedBatch(
        pixels=pixels, captions=tuple(texts), fits=fits_matrix(shown, stated), words=true_words(scenes)
    )


def true_words(scenes: Sequence[Scene]) -> dict[str, NDArray[np.int64]]:
    """Return for every axis which caption is true of each scene, -1 where the scene is of another kind."""
    return {
        name: np.asarray([_word_index(name, scene) if scene.kind == axis.kind else -1 for scene in scenes], np.int64)
        for name, axis in WORD_AXES.items()
    }


def fits_matrix(shown: list[frozenset[str]], stated: list[frozenset[str]]) -> NDArray[np.bool_]:
    """Return bool [pictures, captions]: whether everything that the caption states is true of the picture."""
    columns = _fact_columns()
    truth, claims = (np.zeros((len(rows), len(columns)), np.float32) for rows in (shown, stated))
    for matrix, rows in ((truth, shown), (claims, stated)):
        for row, facts in enumerate(rows):
            matrix[row, [columns[fact] for fact in facts]] = 1
    return np.asarray(truth @ claims.T == claims.sum(1)[None, :])


def batches(seed: int, first_step: int, last_step: int, size: int, *, workers: int = 1) -> Iterator[CaptionedBatch]:
    """Return the batches of steps `first_step` up to but not including `last_step`, drawn ahead in other processes."""
    return drawn_ahead(make_batch, ((seed, step, size) for step in range(first_step, last_step)), workers=workers)


def _word_index(axis: str, scene: Scene) -> int:
    thing = scene.things[0]
    if axis == "count":
        return len(scene.things) - 1
    if axis in ("shape", "shapes"):
        return SHAPES.index(thing.shape)
    return TEXTURES.index(thing.texture) if axis == "texture" else list(COLOURS).index(thing.colour)


def _palette_of(seed: int, step: int, family: int) -> Palette:
    if step % 2 == 0:
        return FULL_PALETTE
    rng = np.random.Generator(np.random.PCG64([seed, step, _PALETTE_STREAM + family]))
    if step in LONE_PLAIN_STEPS or step in LONE_STEPS:
        textures = ("plain",) if step in LONE_PLAIN_STEPS else TEXTURES
        colours = sample_palette(rng, colours=3).colours
        return Palette(colours=colours, textures=textures, backgrounds=_CALM, lone=True)
    # Colours and backgrounds are learned early and soon explain most captions; with few of them, shapes must.
    return sample_palette(rng, colours=3, textures=4, backgrounds=3)


@cache
def _fact_columns() -> dict[str, int]:
    facts = [f"kind:{kind}" for kind in ("single", "group", "pair", "swatch")]
    facts += [f"count:{count + 1}" for count in range(len(COUNT_WORDS))]
    facts += [f"background:{name}" for name in BACKGROUNDS] + [f"relation:{name}" for name in RELATIONS]
    for place in ("first", "second"):
        for name, values in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES), ("size", SIZES)):
            facts += [f"{place}.{name}:{value}" for value in values]
    return {fact: column for column, fact in enumerate(facts)}
