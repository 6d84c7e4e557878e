"""The vocabulary of the world, and the compositions that pre-training never shows.

Every word that a class name of the built-in data sets can contain is listed here. About a quarter of the pairs of
each kind (colour x shape, texture x shape, ...) are held out: pre-training never renders them, and the model
can know some downstream classes only by generalising.
"""

from functools import cache

import numpy as np

WORLD_VERSION = 1
"""Raised whenever the same seed would give other pixels or other captions."""

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "hexagon",
    "cross",
    "ring",
    "crescent",
    "arrow",
    "diamond",
    "drop",
    "house",
    "fish",
    "flower",
    "mushroom",
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "orange": (242, 138, 24),
    "yellow": (245, 219, 45),
    "green": (40, 160, 52),
    "teal": (24, 168, 168),
    "blue": (38, 74, 214),
    "purple": (128, 44, 170),
    "pink": (246, 130, 190),
    "brown": (122, 74, 34),
    "black": (24, 24, 26),
    "white": (244, 244, 244),
    "gray": (132, 132, 136),
}

TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered", "wavy", "ringed")

SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "tiny"), "medium": (), "large": ("large", "big")}

COUNT_WORDS: tuple[str, ...] = ("one", "two", "three", "four")

RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")

BACKGROUNDS: dict[str, str] = {
    "grass": "on grass",
    "sand": "on sand",
    "water": "on water",
    "snow": "on snow",
    "night": "in the night sky",
    "wood": "on wood",
    "brick": "on brick",
    "paper": "on paper",
}

PLURALS: dict[str, str] = {shape: f"{shape}s" for shape in SHAPES} | {"cross": "crosses", "fish": "fish"}

AXES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
    "count": COUNT_WORDS,
}

HELD_OUT_ONE_IN = 4
_HELD_OUT_SEED = 20_240_601


@cache
def held_out_pairs(first: str, second: str) -> frozenset[tuple[str, str]]:
    """Return the pairs of two axes that pre-training never renders.

    A shuffled diagonal pattern: every value of either axis loses about one partner in four, none loses all of them.
    """
    rng = np.random.Generator(np.random.PCG64([_HELD_OUT_SEED, list(AXES).index(first), list(AXES).index(second)]))
    rows, columns = rng.permutation(len(AXES[first])), rng.permutation(len(AXES[second]))
    return frozenset(
        (AXES[first][int(rows[i])], AXES[second][int(columns[j])])
        for i in range(len(rows))
        for j in range(len(columns))
        if (i + j) % HELD_OUT_ONE_IN == 0
    )
