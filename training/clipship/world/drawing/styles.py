"""How the downstream data sets look: a style for each, a systematic shift from what pre-training shows.

Every style takes a `shift` from 0 (close to pre-training) to 1 (far away). The strength that a data set is frozen
with was chosen by measuring the zero-shot accuracy of `clipship-tiny` (docs: benchmarks/world.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from clipship.world.drawing.attributes import COLOURS
from clipship.world.drawing.render import (
    Spot,
    backdrop,
    blend,
    crop_of,
    mask_of,
    paste,
    photographed,
    spots_of,
    textured,
)
from clipship.world.drawing.scenes import Scene, Thing
from clipship.world.drawing.stencils import ANGLES_DEG, PICTURE_PX, TEXTURE_VARIANTS, Bytes, Floats, texture_tile

# Pictures are float32 [S, S, 3] in [0, 255], masks float32 [S, S, 1] in [0, 1], S = `frame.side_px`.


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The square that is drawn."""

    side_px: int
    inner: float
    """The part of the side, around the centre, that the things keep to."""
    shift: float
    """Strength of the style, 0 to 1."""

    @property
    def unit_px(self) -> float:
        """Return the pixels here that make one pixel once the inner square is 64 pixels wide."""
        return self.side_px * self.inner / PICTURE_PX

    def spots(self, scene: Scene, rng: np.random.Generator) -> list[Spot]:
        """Return places for the scene's things inside the inner square."""
        return [
            Spot(x=0.5 + (spot.x - 0.5) * self.inner, y=0.5 + (spot.y - 0.5) * self.inner, side=spot.side * self.inner)
            for spot in spots_of(scene, rng)
        ]


Style = Callable[[Scene, np.random.Generator, Frame], Bytes]


def sketch(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Draw with coloured pencils on white paper: wobbly outlines in the colour, and hatching instead of a surface."""
    sheet = np.full((frame.side_px, frame.side_px, 3), (240, 237, 228), np.float32)
    sheet -= 10 * noise(rng, frame.side_px, 24)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        ink = _pencil_strokes(thing, spot, rng, frame)
        ink = bent(ink, rng, amount_px=(0.5 + 1.5 * frame.shift) * frame.unit_px)
        ink *= 1 - (0.2 + 0.3 * frame.shift) * noise(rng, frame.side_px, 40)
        pigment = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-16, 16, 3).astype(np.float32)
        sheet += (pigment - sheet) * np.clip(ink, 0, 1)
    return photographed(sheet, rng)


def _pencil_strokes(thing: Thing, spot: Spot, rng: np.random.Generator, frame: Frame) -> Floats:
    side_px = max(8, round(spot.side * frame.side_px))
    angle_deg = ANGLES_DEG[int(rng.integers(len(ANGLES_DEG)))]
    outer = mask_of(thing.shape, angle_deg, side_px)
    inner = mask_of(thing.shape, angle_deg, side_px, inner=True)
    lines = texture_tile("striped", int(rng.integers(TEXTURE_VARIANTS)))
    hatching = np.asarray(crop_of(lines, rng, 2 * PICTURE_PX, side_px), np.float32)[..., None] / 255
    strokes = (outer - inner) + inner * (0.25 + 0.75 * hatching) * (1 - 0.85 * frame.shift)
    ink = np.zeros((frame.side_px, frame.side_px, 1), np.float32)
    blend(ink, strokes.astype(np.float32), outer, (spot.x * frame.side_px, spot.y * frame.side_px))
    return ink


def print_photo(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Photograph a faded print: its inks are off, it lies askew, and the lens darkens the corners."""
    canvas = np.full((frame.side_px, frame.side_px, 3), 232, np.float32)
    canvas += rng.uniform(-14, 6, 3).astype(np.float32)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        paste(canvas, thing, spot, rng)
    canvas = recoloured(canvas, hue_deg=-80 * frame.shift, saturation=1 - 0.45 * frame.shift)
    canvas = canvas * np.asarray((1.0, 0.93, 0.8), np.float32) + 10
    canvas = askew(canvas, rng, amount=0.04 + 0.08 * frame.shift)
    return photographed(canvas * vignette(frame.side_px, 0.35 + 0.3 * frame.shift), rng)


def neon(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Bend the things from glowing tubes on a dark wall: white-hot in the middle, the colour is in the glow."""
    wall = backdrop(scene.background, rng, frame.side_px).mean(2, keepdims=True) * rng.uniform(0.1, 0.2)
    canvas = wall * np.asarray((0.9, 0.95, 1.2), np.float32)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        _add_tube(canvas, thing, spot, rng, frame)
    return photographed(canvas, rng)


def _add_tube(canvas: Floats, thing: Thing, spot: Spot, rng: np.random.Generator, frame: Frame) -> None:
    side_px = max(8, round(spot.side * frame.side_px))
    angle_deg = ANGLES_DEG[int(rng.integers(len(ANGLES_DEG)))]
    tube = mask_of(thing.shape, angle_deg, side_px) - mask_of(thing.shape, angle_deg, side_px, inner=True)
    light = np.zeros((frame.side_px, frame.side_px, 1), np.float32)
    blend(light, np.ones_like(tube), np.clip(tube * 1.3, 0, 1), (spot.x * frame.side_px, spot.y * frame.side_px))
    halo = blurred(light, 3.2 * frame.unit_px) * 2.2
    colour = np.asarray(COLOURS[thing.colour], np.float32)
    colour = colour + (255 - colour) * 0.12
    core = colour + (255 - colour) * frame.shift
    canvas += (core - canvas) * light
    canvas += colour * np.clip(halo, 0, 1.2) * (1 - light) * (0.9 - 0.35 * frame.shift)


def _plain(scene: Scene, rng: np.random.Generator, frame: Frame) -> Floats:
    canvas = backdrop(scene.background, rng, frame.side_px)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        paste(canvas, thing, spot, rng)
    return canvas


def painting(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Paint the thing and its background in another palette, with a broad brush."""
    canvas = _plain(scene, rng, frame)
    canvas = recoloured(canvas, hue_deg=170 * frame.shift, saturation=1 + 0.3 * frame.shift)
    canvas = bent(canvas, rng, amount_px=(0.5 + 1.5 * frame.shift) * frame.unit_px)
    side_px = frame.side_px
    strokes_px = round(side_px / ((1 + 0.6 * frame.shift) * frame.unit_px))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize((strokes_px, strokes_px))
    painted = image.filter(ImageFilter.MedianFilter(3)).resize((side_px, side_px), Image.Resampling.BILINEAR)
    return photographed(np.asarray(np.round(np.asarray(painted, np.float32) / 24) * 24, np.float32), rng)


def stamp(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Stamp the things with one ink on coloured card: patchy ink, and a second, fainter impression beside the first."""
    card = np.full((frame.side_px, frame.side_px, 3), rng.uniform(150, 245, 3), np.float32)
    card += 14 * (noise(rng, frame.side_px, 50) - 0.5)
    ink = np.zeros((frame.side_px, frame.side_px, 1), np.float32)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        side_px = max(8, round(spot.side * frame.side_px))
        mask = mask_of(thing.shape, ANGLES_DEG[int(rng.integers(len(ANGLES_DEG)))], side_px)
        blend(ink, np.ones_like(mask), mask, (spot.x * frame.side_px, spot.y * frame.side_px))
    # Always up and to the right: a systematic error, which an adapted model can learn to see through.
    by_px = round((3 + 6 * frame.shift) * frame.unit_px)
    ghost = np.roll(ink, (-by_px, by_px), (0, 1)) * (0.25 + 0.45 * frame.shift)
    coverage = 1 - (0.2 + 0.7 * frame.shift) * noise(rng, frame.side_px, 18)
    pigment = rng.uniform(10, 110, 3).astype(np.float32)
    return photographed(card + (pigment - card) * np.maximum(ink, ghost) * coverage, rng)


def fabric(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Weave the pattern into cloth: visible threads, folds, and dyes that are off."""
    thing, side_px = scene.things[0], frame.side_px
    zoom = float(rng.uniform(0.9, 1.3)) / frame.inner
    cloth = textured(thing, rng, side_px, zoom=zoom, scale=PICTURE_PX)
    cloth = bent(cloth, rng, amount_px=(1 + 4 * frame.shift) * frame.unit_px)
    cloth = recoloured(cloth, hue_deg=70 * frame.shift, saturation=1 - 0.4 * frame.shift)
    rows, columns = np.mgrid[0:side_px, 0:side_px].astype(np.float32) / np.float32(frame.unit_px)
    threads = np.sin(rows * np.pi / 1.5) * np.sin(columns * np.pi / 1.5)
    angle = rng.uniform(0, np.pi)
    folds = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) / rng.uniform(4, 7) + rng.uniform(0, 6))
    shade = 1 + 0.14 * threads + (0.1 + 0.25 * frame.shift) * folds
    return photographed(cloth * shade[..., None].astype(np.float32), rng)


def video_game(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Draw with the coarse pixels and the few, gaudy tones of an old game, on a screen whose lines show."""
    side_px = frame.side_px
    canvas = _plain(scene, rng, frame)
    canvas = recoloured(canvas, hue_deg=60 * frame.shift, saturation=1 + 0.5 * frame.shift)
    coarse_px = round(side_px / ((1.2 + 2 * frame.shift) * frame.unit_px))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize((coarse_px, coarse_px))
    step = 24 + 60 * frame.shift
    tones = np.round(np.asarray(image, np.float32) / step) * step
    screen = Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8))
    picture = np.array(screen.resize((side_px, side_px), Image.Resampling.NEAREST), np.float32)
    picture[::2] *= 1 - 0.5 * frame.shift
    return photographed(picture, rng)


def origami(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Fold the things from patterned paper: facets in different light, and a shadow to the lower right."""
    table = np.full((frame.side_px, frame.side_px, 3), rng.uniform(150, 235, 3), np.float32)
    table += 12 * (noise(rng, frame.side_px, 40) - 0.5)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        facets = _facets(max(8, round(spot.side * frame.side_px)), rng, amount=0.15 + 0.5 * frame.shift)
        _paste_lit(table, thing, spot, rng, frame, facets)
    return photographed(table, rng)


def _facets(side_px: int, rng: np.random.Generator, amount: float) -> Floats:
    """Return a factor around 1, float32 [side_px, side_px, 1], that jumps at four straight folds."""
    rows, columns = np.mgrid[-1 : 1 : side_px * 1j, -1 : 1 : side_px * 1j]
    light = np.zeros((side_px, side_px))
    for angle in rng.uniform(0, np.pi) + np.arange(4) * np.pi / 4:
        light += np.sign(rows * np.cos(angle) + columns * np.sin(angle) - rng.uniform(-0.4, 0.4))
    return np.asarray(1 + amount * light[..., None] / 4, np.float32)


def rendering(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Render the things in plastic: light from the upper left, a shadow, and a floor out of focus."""
    side_px = frame.side_px
    floor = np.clip(backdrop(scene.background, rng, side_px), 0, 255).astype(np.uint8)
    far = Image.fromarray(floor).filter(ImageFilter.GaussianBlur((0.3 + 2.5 * frame.shift) * frame.unit_px))
    canvas = recoloured(np.asarray(far, np.float32), hue_deg=0, saturation=1 - 0.6 * frame.shift)
    for thing, spot in zip(scene.things, frame.spots(scene, rng), strict=True):
        _paste_lit(canvas, thing, spot, rng, frame, _gloss(max(8, round(spot.side * side_px)), 0.2 + frame.shift))
    return photographed(canvas, rng)


def _gloss(side_px: int, amount: float) -> Floats:
    """Return a factor, float32 [side_px, side_px, 1], bright at the upper left and dark at the lower right."""
    rows, columns = np.mgrid[-1 : 1 : side_px * 1j, -1 : 1 : side_px * 1j]
    highlight = np.exp(-((rows + 0.35) ** 2 + (columns + 0.35) ** 2) / 0.08)
    return np.asarray(1 + amount * (highlight - 0.35 * (rows + columns))[..., None], np.float32)


def _paste_lit(canvas: Floats, thing: Thing, spot: Spot, rng: np.random.Generator, frame: Frame, light: Floats) -> None:
    """Draw a thing under that light, float32 [side, side, 1] for its `side` in pixels, its dark edge and its shadow."""
    side_px, size_px = light.shape[0], frame.side_px
    angle_deg = ANGLES_DEG[int(rng.integers(len(ANGLES_DEG)))]
    mask = mask_of(thing.shape, angle_deg, side_px)
    body = textured(thing, rng, side_px, zoom=float(rng.uniform(0.85, 1.2)), scale=spot.side * PICTURE_PX)
    body *= 0.35 + 0.65 * mask_of(thing.shape, angle_deg, side_px, inner=True)
    by_px = (2 + 5 * frame.shift) * frame.unit_px
    shadow = np.zeros((size_px, size_px, 1), np.float32)
    blend(shadow, np.ones_like(mask), mask, (spot.x * size_px + by_px, spot.y * size_px + by_px))
    canvas *= 1 - (0.3 + 0.4 * frame.shift) * blurred(shadow, 1.5 * frame.unit_px)
    blend(canvas, body * light, mask, (spot.x * size_px, spot.y * size_px))


def night_photo(scene: Scene, rng: np.random.Generator, frame: Frame) -> Bytes:
    """Photograph the scene at night: a lamp beside it, colours that fade, and the noise of a small sensor."""
    canvas = _plain(scene, rng, frame)
    canvas = recoloured(canvas, hue_deg=0, saturation=1 - 0.6 * frame.shift)
    lamp = np.linspace(1, 0.35, frame.side_px, dtype=np.float32)[None, :, None]
    canvas = canvas * (1 - 0.8 * frame.shift) * lamp * np.asarray((0.85, 0.95, 1.2), np.float32)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(50 * frame.shift)
    return photographed(canvas, rng)


STYLES: dict[str, Style] = {
    "sketches": sketch,
    "prints": print_photo,
    "neon": neon,
    "places": painting,
    "groups": stamp,
    "fabrics": fabric,
    "games": video_game,
    "origami": origami,
    "renders": rendering,
    "prints_night": night_photo,
    "prints_sketched": sketch,
}


# Effects.


def noise(rng: np.random.Generator, side_px: int, cells: int) -> Floats:
    """Return smooth noise, float32 [side_px, side_px, 1] in [0, 1]; `cells` blotches fit into a side."""
    coarse = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BILINEAR), np.float32)[..., None]


def bent(picture: Floats, rng: np.random.Generator, amount_px: float) -> Floats:
    """Return the picture [S, S, C] with every pixel moved smoothly by up to `amount_px`, as by an unsteady hand."""
    side = picture.shape[0]
    moves = [(noise(rng, side, 6)[..., 0] - 0.5) * 3 * amount_px for _ in range(2)]
    rows, columns = np.mgrid[0:side, 0:side]
    from_rows = np.clip(np.rint(rows + moves[0]).astype(int), 0, side - 1)
    from_columns = np.clip(np.rint(columns + moves[1]).astype(int), 0, side - 1)
    return np.asarray(picture[from_rows, from_columns], np.float32)


def blurred(mask: Floats, radius_px: float) -> Floats:
    """Return the mask [S, S, 1] after a Gaussian blur."""
    image = Image.fromarray((np.clip(mask[..., 0], 0, 1) * 255).astype(np.uint8))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px)), np.float32)
    return np.asarray(soft[..., None] / 255, np.float32)


def recoloured(picture: Floats, *, hue_deg: float, saturation: float) -> Floats:
    """Return the picture with its hues turned around the gray axis and its saturation scaled."""
    cosine, sine = np.cos(np.radians(hue_deg)), np.sin(np.radians(hue_deg))
    gray = np.full((3, 3), 1 / 3)
    cross = np.asarray(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / np.sqrt(3)
    turn = gray + (cosine * (np.eye(3) - gray) + sine * cross) * saturation
    return np.asarray(picture @ turn.T.astype(np.float32), np.float32)


def vignette(side_px: int, depth: float) -> Floats:
    """Return a factor that falls from 1 in the centre by `depth` at the corners, float32 [side_px, side_px, 1]."""
    axis = np.linspace(-1, 1, side_px, dtype=np.float32) ** 2
    return np.asarray(1 - depth * (axis[:, None, None] + axis[None, :, None]) / 2, np.float32)


def askew(picture: Floats, rng: np.random.Generator, amount: float) -> Floats:
    """Return the picture [S, S, 3] seen from a random side: its corners move by up to `amount` of the side."""
    side = picture.shape[0]
    corners = np.asarray((0, 0, 0, side, side, side, side, 0), np.float64) + rng.uniform(-amount, amount, 8) * side
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    fill = tuple(int(value) for value in picture[0, 0].clip(0, 255))
    seen = image.transform(
        (side, side), Image.Transform.QUAD, tuple(corners), Image.Resampling.BILINEAR, fillcolor=fill
    )
    return np.asarray(seen, np.float32)
