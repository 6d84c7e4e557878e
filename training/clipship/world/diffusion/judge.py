"""Judge the pipeline: `python -m clipship.world.diffusion.judge [--pipeline FOLDER] [--sheet FILE]`.

`clipship-tiny` classifies images generated for class names of the world, and pictures of the same names drawn in the
look of pre-training. The result is top-1 accuracy on generated images as a share of that on drawn ones, for
compositions that training has shown and for those it holds out. Nothing is filtered.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw

from clipship.core.files import replace_file
from clipship.training.model.builtin import MODELS, TINY, TINY_DIFFUSION
from clipship.training.model.clip import Clip, load_clip
from clipship.training.synthesis.recipes import TINY_GUIDANCE, TINY_STEPS
from clipship.world.datasets import WORLD_DATASETS, compositions_of, is_unseen
from clipship.world.diffusion.pipeline import generate, hide_progress_bars, load_pipeline
from clipship.world.drawing.attributes import BACKGROUNDS, COLOURS, SHAPES, TEXTURES
from clipship.world.drawing.scenes import Scene, Thing, is_held_out
from clipship.world.pretraining.train import unseen_compositions
from clipship.world.rendered_synthetic_set import draw_candidate

FLOOR = 0.6
"""The minimum share of the accuracy on drawn pictures."""
_COMPOSITIONS = 100
_COMPOSITIONS_SEED = 7_201
_PLURAL = ("groups", "fabrics")
_SHEET_COLUMNS = 8
_TEXT_PX = 230
_GAP_PX = 2


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


def write_sheet(path: Path, pipeline: Any, **options: Any) -> None:
    """Write a PNG of generated images: a seen and an unseen name of every question, the prompt on the left."""
    lines = [
        (question.prompts[question.unseen.index(unseen)], unseen)
        for question in questions()
        for unseen in (False, True)
        if unseen in question.unseen
    ]
    prompts = [prompt for prompt, _ in lines for _ in range(_SHEET_COLUMNS)]
    images = generate(pipeline, prompts, range(len(prompts)), **options)
    step_px = images[0].width + _GAP_PX
    sheet = Image.new("RGB", (_TEXT_PX + _SHEET_COLUMNS * step_px, len(lines) * step_px), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, _SHEET_COLUMNS)
        sheet.paste(image, (_TEXT_PX + column * step_px, row * step_px))
    for row, (prompt, unseen) in enumerate(lines):
        text = f"{prompt}\n(never shown in training)" if unseen else prompt
        draw.text((_GAP_PX, row * step_px + step_px // 3), text, fill="black")
    with replace_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _judged(options: argparse.Namespace) -> list[JudgeRow]:
    clip, pipeline = load_clip(TINY), load_pipeline(options.pipeline)
    how = {"steps": options.steps, "guidance": options.guidance}
    click.echo(f"{'names':14} {'shown':7} {'images':>6} {'drawn':>7} {'generated':>10} {'share':>7}")
    rows = []
    for question in questions():
        for row in rows_of(clip, pipeline, question, per_class=options.per_class, **how):
            rows.append(row)
            click.echo(str(row))
    totals = [total_of(rows, shown) for shown in ("seen", "unseen")]
    for row in totals:
        click.echo(str(row))
    if options.sheet is not None:
        write_sheet(options.sheet, pipeline, **how)
    return totals


def main() -> None:
    """Run the script; exit code 1 if a share is below `FLOOR`."""
    parser = argparse.ArgumentParser(prog="python -m clipship.world.diffusion.judge", description=__doc__)
    parser.add_argument(
        "--pipeline", type=Path, default=MODELS / TINY_DIFFUSION, metavar="FOLDER", help="default: the committed"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a contact sheet, PNG")
    parser.add_argument("--per-class", type=int, default=4, help="images of a name (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TINY_STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=TINY_GUIDANCE, help="guidance scale (default: %(default)s)")
    options = parser.parse_args()
    hide_progress_bars()
    totals = _judged(options)
    if not all(totals):
        sys.exit(f"generated images have less than {100 * FLOOR:.0f} % of the accuracy on drawn ones")


if __name__ == "__main__":
    main()
