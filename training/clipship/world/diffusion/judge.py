"""How good a pipeline's images are, as `clipship-tiny` sees them; `python -m benchmarks.generated_images` prints it.

`clipship-tiny` classifies images generated for class names of the world, and pictures of the same names drawn in the
look of pre-training. The result is top-1 accuracy on generated images as a share of that on drawn ones, for
compositions that training has shown and for those it holds out. Nothing is filtered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipship.training.model.clip import Clip
from clipship.world.datasets import WORLD_DATASETS, compositions_of, is_unseen
from clipship.world.diffusion.pipeline import generate
from clipship.world.drawing.attributes import BACKGROUNDS, COLOURS, SHAPES, TEXTURES
from clipship.world.drawing.scenes import Scene, Thing, is_held_out
from clipship.world.pretraining.train import unseen_compositions
from clipship.world.rendered_synthetic_set import draw_candidate

FLOOR = 0.6
"""The minimum share of the accuracy on drawn pictures."""
_COMPOSITIONS = 100
_COMPOSITIONS_SEED = 7_201
_PLURAL = ("groups", "fabrics")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A set of class names among which images are classified."""

    name: str
    class_names: tuple[str, ...]
    unseen: tuple[bool, ...]
    """For every name, whether pre-training holds the composition out."""
    template: str = "a photo of a {}."
    """The prompt whose `{}` takes a class name, for generating and for judging."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts in the order of the names."""
        return tuple(self.template.format(name) for name in self.class_names)


@dataclass(frozen=True, kw_only=True)
class JudgeRow:
    """Top-1 accuracy in percent on drawn and on generated images of the same names; true from `FLOOR` on."""

    name: str
    shown: str
    """"seen" or "unseen" in composition."""
    images: int
    """Of either kind."""
    drawn: float
    generated: float

    @property
    def share(self) -> float:
        """Return the accuracy on generated images as a share of that on drawn ones."""
        return self.generated / self.drawn if self.drawn else 0.0

    def __bool__(self) -> bool:
        return self.share >= FLOOR

    def __str__(self) -> str:
        left = f"{self.name:14} {self.shown:7} {self.images:6d}"
        return f"{left} {self.drawn:7.1f} {self.generated:10.1f} {100 * self.share:7.1f}"


@cache
def questions() -> tuple[Question, ...]:
    """Return the names of the nine data sets, 100 seen and 100 unseen compositions of three words."""
    asked = [
        Question(
            name=dataset.name,
            class_names=dataset.class_names,
            unseen=tuple(is_unseen(dataset.axes, composition) for composition in compositions_of(dataset)),
            template="a photo of {}." if dataset.name in _PLURAL else "a photo of a {}.",
        )
        for dataset in WORLD_DATASETS
    ]
    prompts = unseen_compositions(classes=_COMPOSITIONS, per_class=1).prompts
    unseen = tuple(prompt.removeprefix("a photo of a ").removesuffix(".") for prompt in prompts)
    for names, is_new in ((_seen_compositions(), False), (unseen, True)):
        asked.append(Question(name="three words", class_names=names, unseen=(is_new,) * len(names)))
    return tuple(asked)


def _seen_compositions() -> tuple[str, ...]:
    things = [
        Thing(shape=shape, colour=colour, texture=texture)
        for colour, texture, shape in product(COLOURS, TEXTURES[1:], SHAPES)
    ]
    shown = [thing for thing in things if not all(map(is_held_out, _scenes_of(thing)))]
    rng = np.random.Generator(np.random.PCG64(_COMPOSITIONS_SEED))
    chosen = [shown[int(index)] for index in rng.permutation(len(shown))[:_COMPOSITIONS]]
    return tuple(f"{thing.colour} {thing.texture} {thing.shape}" for thing in chosen)


def _scenes_of(thing: Thing) -> list[Scene]:
    return [Scene(kind="single", things=(thing,), background=background) for background in BACKGROUNDS]


@torch.no_grad()
def is_correct(clip: Clip, images: Sequence[Image.Image], labels: Sequence[int], question: Question) -> Any:
    """Return for every image whether `clip` classifies it as its label, bool [N]."""
    pixels = torch.stack([clip.preprocess(image) for image in images])
    texts = clip.model.encode_text(clip.tokenize(question.prompts), normalize=True)
    nearest = (clip.model.encode_image(pixels, normalize=True) @ texts.T).argmax(1)
    return np.asarray(nearest.numpy() == np.asarray(labels))


def rows_of(clip: Clip, pipeline: Any, question: Question, *, per_class: int, **options: Any) -> list[JudgeRow]:
    """Judge `per_class` images of each name (seeds 0, 1, ...); return a row for seen and one for unseen names."""
    labels = [label for label in range(len(question.class_names)) for _ in range(per_class)]
    seeds = list(range(per_class)) * len(question.class_names)
    drawn = [draw_candidate(question.class_names[label], seed) for label, seed in zip(labels, seeds, strict=True)]
    prompts = [question.prompts[label] for label in labels]
    made = generate(pipeline, prompts, seeds, **options)
    right = [is_correct(clip, images, labels, question) for images in (drawn, made)]
    unseen = np.asarray([question.unseen[label] for label in labels])
    return [
        JudgeRow(
            name=question.name,
            shown=shown,
            images=int(of_these.sum()),
            drawn=100 * float(right[0][of_these].mean()),
            generated=100 * float(right[1][of_these].mean()),
        )
        for shown, of_these in (("seen", ~unseen), ("unseen", unseen))
        if of_these.any()
    ]


def total_of(rows: Sequence[JudgeRow], shown: str) -> JudgeRow:
    """Return the row of all images of the rows that are "seen" or "unseen"."""
    chosen = [row for row in rows if row.shown == shown]
    images = [row.images for row in chosen]
    return JudgeRow(
        name="all",
        shown=shown,
        images=sum(images),
        drawn=float(np.average([row.drawn for row in chosen], weights=images)),
        generated=float(np.average([row.generated for row in chosen], weights=images)),
    )
