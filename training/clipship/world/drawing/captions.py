"""Captions of scenes: several templates, words left out at random, and the facts that the remaining words state."""

from dataclasses import dataclass

import numpy as np

from clipship.world.drawing.attributes import BACKGROUNDS, COUNT_WORDS, PLURALS, SIZES
from clipship.world.drawing.scenes import Scene, Thing, pick

SINGLE_TEMPLATES: tuple[str, ...] = (
    "a photo of {a} {}.",
    "{a} {}.",
    "a photo of {a} {}, a type of shape.",
    "a picture of {a} {}.",
    "itap of {a} {}.",
    "a bad photo of the {}.",
    "a good photo of the {}.",
    "a origami {}.",
    "{a} {} in a video game.",
    "art of the {}.",
    "a drawing of {a} {}.",
    "a sketch of {a} {}.",
    "a print of {a} {}.",
    "a painting of {a} {}.",
    "a neon sign of {a} {}.",
    "a rendering of {a} {}.",
    "a centered photo of {a} {}.",
    "{}",
)
MANY_TEMPLATES: tuple[str, ...] = (
    "a photo of {}.",
    "{}.",
    "a picture of {}.",
    "a bad photo of {}.",
    "a drawing of {}.",
    "a stamp of {}.",
    "a print of {}.",
    "a painting of {}.",
    "itap of {}.",
    "{}",
)
SWATCH_TEMPLATES: tuple[str, ...] = (
    "{a} {} pattern.",
    "{} texture.",
    "a photo of {a} {} pattern.",
    "a photo of {a} {} texture.",
    "a photo of {} fabric.",
    "{} cloth.",
    "a {} surface.",
)
ANY_SHAPE = ("thing", "object", "shape")
_KEEP_COLOUR, _KEEP_TEXTURE, _KEEP_SHAPE, _KEEP_SIZE, _KEEP_BACKGROUND, _KEEP_RELATION = 0.75, 0.7, 0.93, 0.4, 0.5, 0.85


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text and the facts (`scenes.facts_of`) that it states."""

    text: str
    facts: frozenset[str]


def caption_of(scene: Scene, rng: np.random.Generator) -> Caption:
    """Return a random caption that is true of the scene."""
    if scene.kind == "swatch":
        return _caption_of_swatch(scene.things[0], rng)
    words, facts = _subject_of(scene, rng)
    facts |= {f"kind:{scene.kind}", f"count:{len(scene.things)}"}
    if rng.random() < _KEEP_BACKGROUND:
        words = f"{words} {BACKGROUNDS[scene.background]}"
        facts.add(f"background:{scene.background}")
    if scene.kind == "single":
        return Caption(text=fill(pick(rng, SINGLE_TEMPLATES), words, rng), facts=frozenset(facts))
    return Caption(text=fill(pick(rng, MANY_TEMPLATES), words, rng), facts=frozenset(facts))


def fill(template: str, words: str, rng: np.random.Generator) -> str:
    """Return the template with the words in it; half of the time `an` is written where grammar wants it.

    Prompt templates of the literature always write `a {}`, so the text tower has to know both.
    """
    return template.replace("{a}", _article(words, rng)).replace("{}", words)


def _subject_of(scene: Scene, rng: np.random.Generator) -> tuple[str, set[str]]:
    first, facts = _noun_phrase(scene.things[0], "first", rng, plural=scene.kind == "group")
    if scene.kind == "group":
        return f"{COUNT_WORDS[len(scene.things) - 1]} {first}", facts
    if scene.kind == "single":
        return first, facts
    second, more = _noun_phrase(scene.things[1], "second", rng, plural=False)
    link = "and"
    if rng.random() < _KEEP_RELATION:
        link = str(scene.relation)
        more.add(f"relation:{scene.relation}")
    return f"{_article(first, rng)} {first} {link} {_article(second, rng)} {second}", facts | more


def _noun_phrase(thing: Thing, place: str, rng: np.random.Generator, *, plural: bool) -> tuple[str, set[str]]:
    adjectives, facts = _adjectives(thing, place, rng)
    if rng.random() < _KEEP_SHAPE:
        noun = PLURALS[thing.shape] if plural else thing.shape
        facts.add(f"{place}.shape:{thing.shape}")
    else:
        noun = pick(rng, ANY_SHAPE) + ("s" if plural else "")
    return " ".join([*adjectives, noun]), facts


def _adjectives(thing: Thing, place: str, rng: np.random.Generator) -> tuple[list[str], set[str]]:
    words, facts = [], set()
    if rng.random() < _KEEP_COLOUR:
        words.append(thing.colour)
        facts.add(f"{place}.colour:{thing.colour}")
    # People rarely say "plain".
    if rng.random() < (_KEEP_TEXTURE if thing.texture != "plain" else _KEEP_TEXTURE / 2):
        words.insert(int(rng.random() < 0.7) * len(words), thing.texture)
        facts.add(f"{place}.texture:{thing.texture}")
    if SIZES[thing.size] and rng.random() < _KEEP_SIZE:
        words.insert(0, pick(rng, SIZES[thing.size]))
        facts.add(f"{place}.size:{thing.size}")
    return words, facts


def _caption_of_swatch(thing: Thing, rng: np.random.Generator) -> Caption:
    keep_colour, keep_texture = ((True, True), (True, True), (True, False), (False, True))[int(rng.integers(4))]
    words, facts = [], {"kind:swatch"}
    if keep_colour:
        words.append(thing.colour)
        facts.add(f"first.colour:{thing.colour}")
    if keep_texture:
        words.insert(int(rng.random() < 0.7) * len(words), thing.texture)
        facts.add(f"first.texture:{thing.texture}")
    return Caption(text=fill(pick(rng, SWATCH_TEMPLATES), " ".join(words), rng), facts=frozenset(facts))


def _article(words: str, rng: np.random.Generator) -> str:
    return "an" if words[0] in "aeiou" and rng.random() < 0.5 else "a"
