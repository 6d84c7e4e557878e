"""Zero-shot accuracy on the data sets of the built-in world: `python -m benchmarks.zero_shot [--shifts 0.3 0.5]`.

The `shift` of every data set was chosen with it. Test pictures are drawn, encoded as JPEG and decoded again: at the
frozen shift the numbers are those of the files that `write_world` writes.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipship.training.model.builtin import MODELS, TINY
from clipship.world.datasets import (
    WORLD_DATASETS,
    WORLD_VARIANTS,
    WorldDataset,
    dataset_named,
    picture_of,
)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy in per cent: all pictures over all names, and either half over its own names."""

    all: float
    base: float
    new: float


def zero_shot(dataset: WorldDataset, folder: Path, *, per_class: int | None = None) -> Accuracy:
    """Measure the model in `folder` (open_clip's local-dir format) on the test pictures of a data set.

    Args:
        dataset: the data set, whose `template` makes the prompts.
        folder: the model.
        per_class: test pictures of a class; all when None.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    count = per_class or dataset.test_per_class
    labels = torch.arange(dataset.classes).repeat_interleave(count)
    pictures = [picture_of(dataset, "test", int(label), index % count) for index, label in enumerate(labels)]
    with torch.no_grad():
        images = torch.stack([preprocess(picture) for picture in pictures])
        texts = tokenizer([dataset.template.format(name) for name in dataset.class_names])
        scores = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    return accuracy_of(scores, labels, dataset.num_base)


def accuracy_of(scores: Tensor, labels: Tensor, num_base: int) -> Accuracy:
    """Return the accuracy of scores [N, C] against int64 labels [N]; the first `num_base` classes are the base ones."""
    is_base = labels < num_base
    return Accuracy(
        all=_top1(scores, labels),
        base=_top1(scores[is_base, :num_base], labels[is_base]),
        new=_top1(scores[~is_base, num_base:], labels[~is_base] - num_base),
    )


def _top1(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).float().mean()) * 100


def _lines(datasets: Sequence[WorldDataset], shifts: Sequence[float], options: dict[str, Any]) -> None:
    sys.stdout.write(f"{'data set':15} {'shift':>5} {'all':>6} {'base':>6} {'new':>6}\n")
    for dataset in datasets:
        for shift in shifts or [dataset.shift]:
            found = zero_shot(dataclasses.replace(dataset, shift=shift), **options)
            sys.stdout.write(f"{dataset.name:15} {shift:5.2f} {found.all:6.1f} {found.base:6.1f} {found.new:6.1f}\n")
            sys.stdout.flush()


def main() -> None:
    """Run the script."""
    names = [dataset.name for dataset in (*WORLD_DATASETS, *WORLD_VARIANTS)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_shot", description=__doc__)
    parser.add_argument("--names", nargs="+", default=names, help="data sets (default: all)")
    parser.add_argument("--shifts", nargs="+", type=float, default=[], help="strengths (default: the frozen ones)")
    parser.add_argument("--per-class", type=int, help="test pictures of a class (default: all)")
    parser.add_argument("--model", type=Path, default=MODELS / TINY, help="folder (default: clipship-tiny)")
    options = parser.parse_args()
    datasets = [dataset_named(name) for name in options.names]
    _lines(datasets, options.shifts, {"folder": options.model, "per_class": options.per_class})


if __name__ == "__main__":
    main()
