"""Drawing a scene: about a millisecond for 64 x 64 pixels, and the same pixels for the same seed."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from clipship.world.drawing.attributes import COLOURS, RELATIONS
from clipship.world.drawing.scenes import Scene, Thing
from clipship.world.drawing.stencils import (
    ANGLES_DEG,
    BACKGROUND_VARIANTS,
    PICTURE_PX,
    TEXTURE_VARIANTS,
    TILE_PX,
    Bytes,
    Floats,
    background_tile,
    inner_mask,
    shape_mask,
    texture_tile,
)

SIZE_RANGES: dict[str, tuple[float, float]] = {"small": (0.42, 0.5), "medium": (0.6, 0.72), "large": (0.8, 0.92)}
_RIM_CHANCE = 0.75
_GROUP_SIZES: dict[int, float] = {2: 0.46, 3: 0.42, 4: 0.42}
_SIZE_FACTORS: dict[str, float] = {"small": 0.8, "medium": 1.0, "large": 1.12}
_PAIR_OFFSETS: dict[str, tuple[float, float]] = dict(
    zip(RELATIONS, ((0.0, -0.24), (0.0, 0.24), (-0.24, 0.0), (0.24, 0.0)), strict=True)
)
_GROUP_LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    2: (((-0.24, 0.0), (0.24, 0.0)), ((0.0, -0.24), (0.0, 0.24)),
        ((-0.2, -0.2), (0.2, 0.2)), ((-0.2, 0.2), (0.2, -0.2))),
    3: (((0.0, -0.23), (-0.25, 0.2), (0.25, 0.2)), ((0.0, 0.23), (-0.25, -0.2), (0.25, -0.2)),
        ((-0.3, -0.3), (0.0, 0.0), (0.3, 0.3)), ((-0.3, 0.3), (0.0, 0.0), (0.3, -0.3))),
    4: (((-0.24, -0.24), (0.24, -0.24), (-0.24, 0.24), (0.24, 0.24)),
        ((0.0, -0.3), (-0.3, 0.0), (0.3, 0.0), (0.0, 0.3))),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a thing goes: centre and side as fractions of the picture, x to the right and y down."""

    x: float
    y: float
    side: float


def render_scene(scene: Scene, rng: np.random.Generator) -> Bytes:
    """Draw a scene as pre-training sees it, uint8 [64, 64, 3]."""
    if scene.kind == "swatch":
        return photographed(swatch(scene.things[0], rng), rng)
    canvas = backdrop(scene.background, rng, PICTURE_PX)
    for thing, spot in zip(scene.things, spots_of(scene, rng), strict=True):
        paste(canvas, thing, spot, rng)
    return photographed(canvas, rng)


def spots_of(scene: Scene, rng: np.random.Generator) -> list[Spot]:
    """Return a random place for every thing of the scene that fits its kind, count and relation."""
    if scene.kind == "pair":
        x, y = _PAIR_OFFSETS[str(scene.relation)]
        offsets: tuple[tuple[float, float], ...] = ((x, y), (-x, -y))
        sides = [0.46 * _SIZE_FACTORS[thing.size] for thing in scene.things]
        reach = 0.04
    elif scene.kind == "group":
        layouts = _GROUP_LAYOUTS[len(scene.things)]
        offsets = layouts[int(rng.integers(len(layouts)))]
        sides = [_GROUP_SIZES[len(offsets)] * _SIZE_FACTORS[scene.things[0].size]] * len(offsets)
        reach = 0.03
    else:
        low, high = SIZE_RANGES[scene.things[0].size]
        offsets, sides = ((0.0, 0.0),), [float(rng.uniform(low, high))]
        reach = 0.5 * (1 - sides[0]) * 0.5
    jitter = rng.uniform(-reach, reach, (len(offsets), 2))
    factors = rng.uniform(0.9, 1.08, len(offsets))
    return [
        Spot(x=0.5 + x + float(dx), y=0.5 + y + float(dy), side=side * float(factor))
        for (x, y), (dx, dy), side, factor in zip(offsets, jitter, sides, factors, strict=True)
    ]


def backdrop(background: str, rng: np.random.Generator, size_px: int) -> Floats:
    """Return a random view of a background, float32 [size_px, size_px, 3] in [0, 255]."""
    tile = background_tile(background, int(rng.integers(BACKGROUND_VARIANTS)))
    view = crop_of(tile, rng, PICTURE_PX * rng.uniform(0.8, 1.5), size_px)
    return np.array(view, np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)


def swatch(thing: Thing, rng: np.random.Generator) -> Floats:
    """Return the thing's colour and texture all over the frame, float32 [64, 64, 3] in [0, 255]."""
    return textured(thing, rng, PICTURE_PX, zoom=float(rng.uniform(0.7, 1.5)), scale=PICTURE_PX)


def textured(thing: Thing, rng: np.random.Generator, side_px: int, *, zoom: float, scale: float) -> Floats:
    """Return a square of the thing's colour and texture, float32 [side_px, side_px, 3] in [0, 255].

    A `zoom` above 1 makes the pattern finer; `scale` is the side of the square in pixels of a 64-pixel picture.
    """
    first, second = tones_of(thing.colour, rng)
    tile = texture_tile(thing.texture, int(rng.integers(TEXTURE_VARIANTS)))
    crop_px = min(scale * zoom, TILE_PX)
    view = centre_of(tile, crop_px, side_px) if thing.texture == "ringed" else crop_of(tile, rng, crop_px, side_px)
    pattern = np.asarray(view, np.float32)[..., None] / 255
    return np.asarray(first + (second - first) * pattern, np.float32)


def tones_of(colour: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the two RGB tones of a textured colour: the colour itself, jittered, and a much lighter or darker one."""
    first = np.asarray(COLOURS[colour], np.float32) + rng.uniform(-16, 16, 3).astype(np.float32)
    lighter = rng.random() < 0.5 if 50 < float(first.mean()) < 190 else float(first.mean()) < 120
    goal, amount = (255.0, 0.55) if lighter else (0.0, 0.5)
    return first, first + (goal - first) * amount


def crop_of(tile: Image.Image, rng: np.random.Generator, crop_px: float, side_px: int) -> Image.Image:
    """Return a random square crop of the tile, `crop_px` wide, resized to `side_px`."""
    left, top = rng.uniform(0, TILE_PX - crop_px, 2) if crop_px < TILE_PX else (0.0, 0.0)
    box = (float(left), float(top), float(left) + crop_px, float(top) + crop_px)
    return tile.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box)


def centre_of(tile: Image.Image, crop_px: float, side_px: int) -> Image.Image:
    """Return the central square of the tile, `crop_px` wide, resized to `side_px`."""
    low, high = (TILE_PX - crop_px) / 2, (TILE_PX + crop_px) / 2
    return tile.resize((side_px, side_px), Image.Resampling.BILINEAR, box=(low, low, high, high))


def mask_of(shape: str, angle_deg: int, side_px: int, *, inner: bool = False) -> Floats:
    """Return the shape's mask, or the mask without the rim, float32 [side_px, side_px, 1] in [0, 1]."""
    mask = inner_mask(shape, angle_deg) if inner else shape_mask(shape, angle_deg)
    resized = mask.resize((side_px, side_px), Image.Resampling.BILINEAR)
    return np.asarray(np.asarray(resized, np.float32)[..., None] / 255, np.float32)


def paste(canvas: Floats, thing: Thing, spot: Spot, rng: np.random.Generator) -> None:
    """Draw a thing, mostly with a dark or light rim, onto float32 [H, H, 3] in place; what sticks out is cut off."""
    size_px = canvas.shape[0]
    side_px = max(8, round(spot.side * size_px))
    angle_deg = ANGLES_DEG[int(rng.integers(len(ANGLES_DEG)))]
    scale = spot.side * PICTURE_PX
    body = textured(thing, rng, side_px, zoom=float(rng.uniform(0.85, 1.2)), scale=scale)
    if rng.random() < _RIM_CHANCE:
        rim = np.float32(30.0 if float(body.mean()) > 75 else 225.0)
        body = rim + (body - rim) * mask_of(thing.shape, angle_deg, side_px, inner=True)
    blend(canvas, body, mask_of(thing.shape, angle_deg, side_px), (spot.x * size_px, spot.y * size_px))


def blend(canvas: Floats, patch: Floats, alpha: Floats, centre: tuple[float, float]) -> None:
    """Blend a square patch into the canvas, in place, centred at (x, y) pixels."""
    side, (height, width) = patch.shape[0], canvas.shape[:2]
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if x0 >= x1 or y0 >= y1:
        return
    inside = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    target = canvas[y0:y1, x0:x1]
    target += (patch[inside] - target) * alpha[inside]


def photographed(canvas: Floats, rng: np.random.Generator) -> Bytes:
    """Return the canvas with random exposure, uneven light, a tint, noise and sometimes a blur, uint8 [H, W, 3]."""
    height, width = canvas.shape[:2]
    slope = rng.uniform(-0.22, 0.22, 2).astype(np.float32)
    light = np.float32(rng.uniform(0.72, 1.18)) + (
        slope[0] * np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
        + slope[1] * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    )
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    grain = rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(1, 11))
    exposed = np.asarray(np.clip(canvas * light * tint + grain, 0, 255), np.uint8)
    if rng.random() >= 0.2:
        return exposed
    blurred = Image.fromarray(exposed).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1) * width / PICTURE_PX))
    return np.asarray(blurred)
