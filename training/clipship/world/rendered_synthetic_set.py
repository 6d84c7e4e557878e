"""A synthetic set drawn by the renderer, in place of one made by a text-to-image model.

The pictures look like those of pre-training and not like those of the data set, as generated images do not look like
the user's photographs either.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.progress import progress
from clipship.training.synthetic_set import SyntheticSet, SyntheticSetWriter, write_synthetic_set
from clipship.world.drawing.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    PLURALS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORLD_VERSION,
)
from clipship.world.drawing.render import render_scene
from clipship.world.drawing.scenes import SceneRequest, scene_from

if TYPE_CHECKING:
    from clipship.training.model.clip import Clip

Scorer = Callable[[Sequence[Image.Image], str], NDArray[np.float32]]
"""Takes images and one prompt, returns their cosine similarities, float32 [N]."""

SWATCH_NOUNS: tuple[str, ...] = ("fabric", "cloth", "pattern", "texture", "surface")
_ARTICLES = ("a", "an", "the")
_SEEDS_PER_SET = 1_000_000
_STREAM = 5_005
_SCORED_TOGETHER = 64  # pictures


def request_from(class_name: str) -> SceneRequest:
    """Read a class name of the world, such as "striped star", "fish on snow", "three rings" or "red wavy fabric".

    Raises:
        DataError: it has a word that the world cannot draw, says one thing twice, or names nothing to draw.
    """
    words, background = _split_background(" ".join(class_name.lower().replace("_", " ").split()))
    found: dict[str, Any] = {}
    for word in words.split():
        if word in _ARTICLES:
            continue
        name, value = _meaning_of(word, class_name)
        if name in found:
            raise DataError(f"the class name {class_name!r} gives two values for {name}; the world draws one")
        found[name] = value
    if not found:
        raise DataError(f"the class name {class_name!r} names nothing to draw; {_drawable()}")
    found.setdefault("swatch", "shape" not in found)
    if found["swatch"] and (background or {"shape", "count", "size"} & set(found)):
        raise DataError(f"{class_name!r} asks for a pattern and for a thing; {_drawable()}")
    return SceneRequest(background=background, **found)


def draw_candidate(class_name: str, seed: int) -> Image.Image:
    """Draw the class in the look of pre-training, 64 x 64 pixels.

    Raises:
        DataError: the world cannot draw the class.
    """
    rng = np.random.Generator(np.random.PCG64([_STREAM, seed, zlib.crc32(class_name.encode())]))
    return Image.fromarray(render_scene(scene_from(request_from(class_name), rng), rng))


def write_world_synthetic_set(
    out: Path,
    class_names: Sequence[str],
    *,
    template: str,
    candidates_per_class: int = 32,
    keep_per_class: int = 16,
    scorer: Scorer | None = None,
    seed: int = 1,
) -> SyntheticSet:
    """Draw candidates of every class, keep those with the highest score, and write them as a `SyntheticSet`.

    Args:
        class_names: names that the world can draw.
        template: the prompt whose `{}` takes a class name.
        scorer: scores pictures against the prompt (`clip_scorer`); without one the first pictures are kept.
        seed: 0 or more; another seed gives other pictures.

    Raises:
        DataError: a class name cannot be drawn, a number is out of range, or `out` is not a synthetic set.
    """
    if not 1 <= keep_per_class <= candidates_per_class <= _SEEDS_PER_SET:
        raise DataError(
            f"keep_per_class is {keep_per_class} and candidates_per_class is {candidates_per_class}; "
            f"at least 1 must be kept of at most {_SEEDS_PER_SET} candidates"
        )
    for name in class_names:
        request_from(name)
    generator = {"kind": "clipship-world", "version": WORLD_VERSION, "seed": seed, "scored": scorer is not None}
    with (
        write_synthetic_set(
            out, generator=generator, template=template, class_names=class_names, images_per_class=keep_per_class
        ) as writer,
        progress("synthetic images", len(class_names)) as report,
    ):
        for done, name in enumerate(class_names, start=1):
            seeds = range(seed * _SEEDS_PER_SET, seed * _SEEDS_PER_SET + candidates_per_class)
            _add_class(writer, name, template.format(name), seeds, keep_per_class, scorer)
            report(done, name)
    return SyntheticSet.load(out)


def clip_scorer(clip: "Clip") -> Scorer:
    """Return a scorer made of a CLIP model, which sees the pictures as at test time."""
    import torch

    from clipship.training.inputs.features import frozen_features
    from clipship.training.synthesis.candidate_filter import class_feature

    def score(images: Sequence[Image.Image], prompt: str) -> NDArray[np.float32]:
        text_D = class_feature(clip, [prompt])
        scores = []
        for start in range(0, len(images), _SCORED_TOGETHER):
            pixels = torch.stack([clip.preprocess(image) for image in images[start : start + _SCORED_TOGETHER]])
            scores.append(frozen_features(clip, pixels.to(clip.device)).cpu() @ text_D)
        return np.asarray(torch.cat(scores).numpy(), np.float32)

    return score


def _add_class(
    writer: SyntheticSetWriter, name: str, prompt: str, seeds: Sequence[int], keep: int, scorer: Scorer | None
) -> None:
    images = [draw_candidate(name, seed) for seed in seeds]
    scores = None if scorer is None else scorer(images, prompt)
    order = range(len(images)) if scores is None else np.argsort(-scores, kind="stable").tolist()
    kept = set(order[:keep])
    why_not = f"not among the first {keep}" if scores is None else f"not among the {keep} best scores"
    for index, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        score = None if scores is None else float(scores[index])
        reason = None if index in kept else why_not
        writer.add(image, class_name=name, prompt=prompt, seed=seed, score=score, reason=reason)


def _split_background(words: str) -> tuple[str, str | None]:
    for background, phrase in BACKGROUNDS.items():
        if words.endswith(f" {phrase}"):
            return words.removesuffix(phrase), background
    return words, None


def _meaning_of(word: str, class_name: str) -> tuple[str, str | int | bool]:
    if word in COUNT_WORDS:
        return "count", COUNT_WORDS.index(word) + 1
    if word in SWATCH_NOUNS:
        return "swatch", True
    for name, values in (("colour", tuple(COLOURS)), ("texture", TEXTURES), ("shape", SHAPES)):
        if word in values:
            return name, word
    for shape, plural in PLURALS.items():
        if word == plural:
            return "shape", shape
    for size, synonyms in SIZES.items():
        if word in synonyms:
            return "size", size
    raise DataError(f"the world cannot draw {word!r} of the class name {class_name!r}; {_drawable()}")


def _drawable() -> str:
    return (
        f"it draws the shapes {', '.join(SHAPES)}; the colours {', '.join(COLOURS)}; "
        f"the textures {', '.join(TEXTURES)}; {', '.join(COUNT_WORDS)} things; {', '.join(BACKGROUNDS.values())}; "
        f"and a colour or texture as {', '.join(SWATCH_NOUNS)}"
    )
