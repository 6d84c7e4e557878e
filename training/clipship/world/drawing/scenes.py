"""What a picture shows, before it is drawn: scenes, how they are sampled, and the facts that are true of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipship.world.drawing.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    held_out_pairs,
)

SceneKind = Literal["single", "group", "pair", "swatch"]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: words of `attributes`."""

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "medium"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture to draw.

    A `single` thing, a `group` of equal things, a `pair` (`things[0]` is `relation` `things[1]`), or a `swatch`: a
    pattern that fills the frame, whose shape and background do not matter.
    """

    kind: SceneKind
    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The values a sampled scene may use; smaller palettes make captions harder to distinguish.

    With `lone`, every scene is a single large thing.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    lone: bool = False


FULL_PALETTE = Palette()
_KINDS: tuple[SceneKind, ...] = ("single", "group", "pair", "swatch")
_KIND_WEIGHTS = (0.6, 0.2, 0.12, 0.08)
_SIZE_WEIGHTS = (0.15, 0.5, 0.35)


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """Return one of the values, all equally likely."""
    return values[int(rng.integers(len(values)))]


def sample_palette(
    rng: np.random.Generator,
    *,
    colours: int = len(COLOURS),
    textures: int = len(TEXTURES),
    backgrounds: int = len(BACKGROUNDS),
) -> Palette:
    """Return a random palette of all shapes and that many values of each other kind."""

    def some(values: Sequence[str], count: int) -> tuple[str, ...]:
        return tuple(values[int(i)] for i in rng.permutation(len(values))[:count])

    return Palette(
        shapes=some(SHAPES, len(SHAPES)),
        colours=some(tuple(COLOURS), colours),
        textures=some(TEXTURES, textures),
        backgrounds=some(tuple(BACKGROUNDS), backgrounds),
    )


def sample_scene(rng: np.random.Generator, palette: Palette = FULL_PALETTE) -> Scene:
    """Return a random scene that contains no held-out composition."""
    while True:
        scene = _sample_any_scene(rng, palette)
        if not is_held_out(scene):
            return scene


@dataclass(frozen=True, kw_only=True)
class SceneRequest:
    """What a scene has to show; None leaves the choice open."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    background: str | None = None
    count: int = 1
    swatch: bool = False


def scene_from(request: SceneRequest, rng: np.random.Generator) -> Scene:
    """Return a random scene that shows what is requested."""
    thing = Thing(
        shape=request.shape or pick(rng, SHAPES),
        colour=request.colour or pick(rng, tuple(COLOURS)),
        texture=request.texture or pick(rng, TEXTURES),
        size=request.size or tuple(SIZES)[1 + int(rng.integers(2))],
    )
    kind: SceneKind = "swatch" if request.swatch else "group" if request.count > 1 else "single"
    background = request.background or pick(rng, tuple(BACKGROUNDS))
    return Scene(kind=kind, things=(thing,) * request.count, background=background)


def is_held_out(scene: Scene) -> bool:
    """Return whether the scene contains a pair of attributes that pre-training must not show."""
    if scene.kind == "swatch":
        return (scene.things[0].colour, scene.things[0].texture) in held_out_pairs("colour", "texture")
    count = COUNT_WORDS[len(scene.things) - 1] if scene.kind == "group" else COUNT_WORDS[0]
    return any(
        (thing.colour, thing.shape) in held_out_pairs("colour", "shape")
        or (thing.texture, thing.shape) in held_out_pairs("texture", "shape")
        or (scene.background, thing.shape) in held_out_pairs("background", "shape")
        or (scene.kind == "group" and (count, thing.shape) in held_out_pairs("count", "shape"))
        for thing in scene.things
    )


def facts_of(scene: Scene) -> frozenset[str]:
    """Return everything true of a scene, as words like `first.colour:red`.

    A caption carries the facts it states, so a caption fits a picture exactly when its facts are a subset of these.
    """
    facts = {f"kind:{scene.kind}", f"count:{len(scene.things)}", f"background:{scene.background}"}
    if scene.relation is not None:
        facts.add(f"relation:{scene.relation}")
    for place, thing in zip(("first", "second"), scene.things, strict=False):
        facts |= {f"{place}.{name}:{value}" for name, value in vars(thing).items()}
    return frozenset(facts)


def _sample_any_scene(rng: np.random.Generator, palette: Palette) -> Scene:
    kind = "single" if palette.lone else _KINDS[int(rng.choice(len(_KINDS), p=_KIND_WEIGHTS))]
    background = pick(rng, palette.backgrounds)
    thing = _sample_thing(rng, palette)
    if kind == "pair":
        others = (thing, _sample_thing(rng, palette))
        return Scene(kind=kind, things=others, background=background, relation=pick(rng, RELATIONS))
    count = int(rng.integers(2, len(COUNT_WORDS) + 1)) if kind == "group" else 1
    return Scene(kind=kind, things=(thing,) * count, background=background)


def _sample_thing(rng: np.random.Generator, palette: Palette) -> Thing:
    return Thing(
        shape=pick(rng, palette.shapes),
        colour=pick(rng, palette.colours),
        texture=pick(rng, palette.textures),
        size="large" if palette.lone else tuple(SIZES)[int(rng.choice(len(SIZES), p=_SIZE_WEIGHTS))],
    )
