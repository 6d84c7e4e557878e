"""The cached building blocks of every picture: shape masks, texture tiles and background tiles.

They are made once per process from fixed seeds: drawing a picture is a few crops and a blend.
Masks and tiles are in [0, 1]; colours and backgrounds are in [0, 255].
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from clipship.world.drawing.attributes import BACKGROUNDS, SHAPES, TEXTURES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MASK_PX = 96
TILE_PX = 160
"""Side of a texture or background tile; a 64 px picture shows a crop of 64 px, more or less."""
PICTURE_PX = 64
ANGLES_DEG: tuple[int, ...] = (-12, -9, -6, -3, 0, 3, 6, 9, 12)
TEXTURE_VARIANTS = 6
BACKGROUND_VARIANTS = 5
_SUPERSAMPLE = 3
_SEED = 7_001


@cache
def shape_mask(shape: str, angle_deg: int = 0) -> Image.Image:
    """Return the filled shape, an `L` image of `MASK_PX` pixels a side, turned anticlockwise."""
    side = MASK_PX * _SUPERSAMPLE
    canvas = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(canvas), shape, side)
    turned = canvas.rotate(angle_deg, resample=Image.Resampling.BILINEAR)
    return turned.resize((MASK_PX, MASK_PX), Image.Resampling.BOX)


@cache
def inner_mask(shape: str, angle_deg: int = 0) -> Image.Image:
    """Return the shape without its rim: what is left when the rim is 1/19 of the side wide."""
    return shape_mask(shape, angle_deg).filter(ImageFilter.MinFilter(9))


@cache
def texture_tile(texture: str, variant: int) -> Image.Image:
    """Return one of the tiles of a texture, `L`, 0 where the first colour goes and 255 where the second goes."""
    rng = np.random.Generator(np.random.PCG64([_SEED, TEXTURES.index(texture), variant]))
    pattern = _TEXTURE_PATTERNS[texture](rng)
    return Image.fromarray((np.clip(pattern, 0, 1) * 255).astype(np.uint8))


@cache
def background_tile(background: str, variant: int) -> Image.Image:
    """Return one of the tiles of a background, `RGB`."""
    rng = np.random.Generator(np.random.PCG64([_SEED, 100 + list(BACKGROUNDS).index(background), variant]))
    return Image.fromarray(np.clip(_BACKGROUND_PATTERNS[background](rng), 0, 255).astype(np.uint8))


# Shapes, in a unit square with the origin at the top left.


def _points_on_circle(count: int, radius: float, start_deg: float = -90.0) -> list[tuple[float, float]]:
    angles = np.radians(start_deg + np.arange(count) * 360.0 / count)
    return [(0.5 + radius * float(np.cos(a)), 0.5 + radius * float(np.sin(a))) for a in angles]


def _star_points() -> list[tuple[float, float]]:
    outer, inner = _points_on_circle(5, 0.48), _points_on_circle(5, 0.2, -54.0)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart_points() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(0.5 + float(a) / 36, 0.46 - float(b) / 36) for a, b in zip(x, y, strict=True)]


def _drop_points() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    return [(0.5 + 0.36 * float(np.sin(a) * np.sin(a / 2) ** 1.6), 0.5 - 0.46 * float(np.cos(a))) for a in t]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.12, 0.12), (0.88, 0.12), (0.88, 0.88), (0.12, 0.88)],
    "triangle": [(0.5, 0.06), (0.95, 0.88), (0.05, 0.88)],
    "star": _star_points(),
    "heart": _heart_points(),
    "hexagon": _points_on_circle(6, 0.47, 0.0),
    "cross": [
        (0.36, 0.06), (0.64, 0.06), (0.64, 0.36), (0.94, 0.36), (0.94, 0.64), (0.64, 0.64),
        (0.64, 0.94), (0.36, 0.94), (0.36, 0.64), (0.06, 0.64), (0.06, 0.36), (0.36, 0.36),
    ],
    "arrow": [(0.04, 0.38), (0.52, 0.38), (0.52, 0.12), (0.97, 0.5), (0.52, 0.88), (0.52, 0.62), (0.04, 0.62)],
    "fish": [(0.62, 0.5), (0.98, 0.2), (0.9, 0.5), (0.98, 0.8)],
    "diamond": [(0.5, 0.03), (0.82, 0.5), (0.5, 0.97), (0.18, 0.5)],
    "drop": _drop_points(),
    "house": [(0.5, 0.04), (0.95, 0.44), (0.82, 0.44), (0.82, 0.94), (0.18, 0.94), (0.18, 0.44), (0.05, 0.44)],
}  # fmt: skip


_ELLIPSES: dict[str, list[tuple[tuple[float, float, float, float], int]]] = {
    "circle": [((0.06, 0.06, 0.94, 0.94), 255)],
    "ring": [((0.06, 0.06, 0.94, 0.94), 255), ((0.29, 0.29, 0.71, 0.71), 0)],
    "crescent": [((0.1, 0.05, 0.98, 0.95), 255), ((0.4, 0.02, 1.14, 0.8), 0)],
    "fish": [((0.02, 0.24, 0.74, 0.76), 255), ((0.13, 0.38, 0.23, 0.48), 0)],
    "flower": [
        *(((x - 0.165, y - 0.165, x + 0.165, y + 0.165), 255) for x, y in _points_on_circle(6, 0.31)),
        ((0.28, 0.28, 0.72, 0.72), 255),
        ((0.39, 0.39, 0.61, 0.61), 0),
    ],
}
"""Bounding boxes, and whether each fills or clears; drawn in this order."""
assert {*_POLYGONS, *_ELLIPSES, "mushroom"} == set(SHAPES)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, side: int) -> None:
    if shape in _POLYGONS:
        draw.polygon([(x * side, y * side) for x, y in _POLYGONS[shape]], fill=255)
    for box, fill in _ELLIPSES.get(shape, ()):
        draw.ellipse([value * side for value in box], fill=fill)
    if shape == "mushroom":
        draw.pieslice([0.04 * side, 0.06 * side, 0.96 * side, 0.98 * side], 180, 360, fill=255)
        draw.rounded_rectangle([0.36 * side, 0.5 * side, 0.64 * side, 0.96 * side], radius=0.08 * side, fill=255)


# Textures: functions of a generator that return a [TILE_PX, TILE_PX] pattern in [0, 1].


def _grid() -> tuple[Floats, Floats]:
    rows, columns = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(np.float32)
    return rows, columns


def _soft_step(values: Floats, sharpness: float = 2.5) -> Floats:
    return np.asarray(np.clip(values * sharpness + 0.5, 0, 1), np.float32)


def _plain(rng: np.random.Generator) -> Floats:
    return np.zeros((TILE_PX, TILE_PX), np.float32)


def _striped(rng: np.random.Generator) -> Floats:
    rows, columns = _grid()
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(7.0, 10.5)
    return _soft_step(np.sin((columns * np.cos(angle) + rows * np.sin(angle)) * 2 * np.pi / period))


def _turned_grid(rng: np.random.Generator, reach: float) -> tuple[Floats, Floats]:
    rows, columns = _grid()
    angle = rng.uniform(-reach, reach)
    turned = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
    return turned[0].astype(np.float32), turned[1].astype(np.float32)


def _dotted(rng: np.random.Generator) -> Floats:
    x, y = _turned_grid(rng, 0.5)
    period = rng.uniform(8.0, 10.5)
    shifted = x + period / 2 * (np.floor(y / period) % 2)
    distance = np.hypot(shifted % period - period / 2, y % period - period / 2)
    return _soft_step((period * 0.29 - distance) / 2)


def _checkered(rng: np.random.Generator) -> Floats:
    x, y = _turned_grid(rng, 0.3)
    cell = rng.uniform(5.5, 8.0)
    return _soft_step(np.sin(x * np.pi / cell) * np.sin(y * np.pi / cell), 4.0)


def _wavy(rng: np.random.Generator) -> Floats:
    x, y = _turned_grid(rng, 0.35)
    period = rng.uniform(8.0, 10.5)
    bend = period * 0.42 * np.sin(x * 2 * np.pi / rng.uniform(13.0, 17.0))
    return _soft_step(np.sin((y + bend) * 2 * np.pi / period))


def _ringed(rng: np.random.Generator) -> Floats:
    rows, columns = _grid()
    centre = TILE_PX / 2 + rng.uniform(-2, 2, 2)
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return _soft_step(np.sin(distance * 2 * np.pi / rng.uniform(7.5, 10.0) + rng.uniform(0, 6)))


_TEXTURE_PATTERNS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "wavy": _wavy,
    "ringed": _ringed,
}


# Backgrounds: functions of a generator that return a [TILE_PX, TILE_PX, 3] picture in [0, 255].


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """Return smooth noise, about -1 to 1, whose blotches are TILE_PX/rows by TILE_PX/columns pixels."""
    coarse = rng.normal(0, 0.5, (rows, columns)).astype(np.float32)
    fine = Image.fromarray(coarse).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    return np.asarray(fine, np.float32)


def _tinted(base: tuple[float, float, float], *layers: tuple[Floats, tuple[float, float, float]]) -> Floats:
    picture = np.full((TILE_PX, TILE_PX, 3), base, np.float32)
    for amount, tint in layers:
        picture += amount[..., None] * np.asarray(tint, np.float32)
    return picture


def _grass(rng: np.random.Generator) -> Floats:
    return _tinted(
        (88, 138, 58), (_noise(rng, 24, 110), (34, 42, 22)), (_noise(rng, 6, 6), (18, 14, 8)),
        (np.maximum(_noise(rng, 30, 150), 0), (-40, -40, -28)),
    )  # fmt: skip


def _sand(rng: np.random.Generator) -> Floats:
    rows, _ = _grid()
    dunes = np.sin((rows + 9 * _noise(rng, 6, 6)) * 2 * np.pi / rng.uniform(26, 36))
    return _tinted((216, 186, 134), (dunes, (10, 10, 10)), (_noise(rng, 150, 150), (18, 18, 16)))


def _water(rng: np.random.Generator) -> Floats:
    rows, _ = _grid()
    ripples = np.sin((rows + 6 * _noise(rng, 12, 12)) * 2 * np.pi / rng.uniform(10, 14))
    glints = np.maximum(ripples + _noise(rng, 40, 16) - 0.9, 0)
    return _tinted((54, 116, 168), (ripples, (16, 22, 22)), (glints, (150, 130, 90)))


def _snow(rng: np.random.Generator) -> Floats:
    drifts = _noise(rng, 7, 5)
    return _tinted((228, 234, 244), (drifts, (22, 17, 8)), (_noise(rng, 160, 160), (8, 8, 6)))


def _night(rng: np.random.Generator) -> Floats:
    stars = np.zeros((TILE_PX, TILE_PX), np.float32)
    for row, column in rng.integers(1, TILE_PX - 1, (110, 2)):
        glow = rng.uniform(0.5, 1.0)
        stars[row, column] = glow
        stars[row, column + 1] = stars[row + 1, column] = glow * 0.6
    return _tinted((20, 22, 56), (_noise(rng, 4, 4), (10, 10, 22)), (stars, (220, 220, 190)))


def _wood(rng: np.random.Generator) -> Floats:
    rows, _ = _grid()
    grain = np.sin((rows + 14 * _noise(rng, 5, 2)) * 2 * np.pi / rng.uniform(7, 10))
    seams = (np.mod(rows, 40) < 1.5).astype(np.float32)
    layers = (grain, (16, 13, 9)), (_noise(rng, 120, 14), (16, 12, 8)), (seams, (-60, -45, -30))
    return _tinted((164, 118, 72), *layers)


def _brick(rng: np.random.Generator) -> Floats:
    rows, columns = _grid()
    high, wide = 13.0, 27.0
    shifted = columns + wide / 2 * (np.floor(rows / high) % 2)
    mortar = ((rows % high < 2.2) | (shifted % wide < 2.2)).astype(np.float32)
    tone = rng.normal(0, 0.5, (32, 32)).astype(np.float32)
    bricks = tone[(rows // high).astype(int), (shifted // wide).astype(int)]
    layers = (bricks, (24, 14, 10)), (_noise(rng, 150, 150), (10, 10, 10)), (mortar, (50, 92, 92))
    return _tinted((152, 78, 58), *layers)


def _paper(rng: np.random.Generator) -> Floats:
    rows, columns = _grid()
    lines = (np.mod(rows, 11) < 1.2).astype(np.float32)
    margin = (np.abs(columns - rng.uniform(40, 120)) < 1.0).astype(np.float32)
    layers = (lines, (-75, -50, -20)), (margin, (-10, -110, -100)), (_noise(rng, 60, 60), (5, 5, 6))
    return _tinted((240, 236, 220), *layers)


_BACKGROUND_PATTERNS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "snow": _snow,
    "night": _night,
    "wood": _wood,
    "brick": _brick,
    "paper": _paper,
}
