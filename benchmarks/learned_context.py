"""What a learned context does to base and new classes: `python -m benchmarks.learned_context`.

CoOp on the base classes of the data sets, as `coop-tiny` learns it, but on image features that are computed once (four
crops of every training picture): a run takes a minute. `--halves` composes the classes of the data sets anew and
`--shifts` changes their looks. By default validation pictures are scored, more of them than `write_world` writes:
choices are made on them, not on test pictures.
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks.zero_shot import Accuracy, accuracy_of
from clipship.core.images.decoding import pixels_from_image
from clipship.training.config import TrainConfig
from clipship.training.inputs.batches import training_pixels
from clipship.training.loop.loop import learning_rate
from clipship.training.losses import classification_loss
from clipship.training.methods import Method, Task
from clipship.training.methods.coop import CoOp
from clipship.training.methods.zero_shot import ZeroShot
from clipship.training.model.builtin import TINY
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe
from clipship.world.datasets import WORLD_DATASETS, Halves, WorldDataset, dataset_named, picture_of

CROPS = 4
_CHUNK = 128
_CONFIG = config_from_recipe("coop-tiny")

# Shapes: N pictures, K training pictures of the base classes, C classes, D joint dimensions.


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The unit features of a data set's pictures.

    Attributes:
        crops: of the base classes' training pictures, [K, CROPS, D].
        crop_labels: int64 [K].
        images: of the pictures that are scored, [N, D].
        labels: int64 [N].
    """

    crops: Tensor
    crop_labels: Tensor
    images: Tensor
    labels: Tensor


def frozen_features(clip: Clip, dataset: WorldDataset, *, split: str = "val", per_class: int = 40) -> Frozen:
    """Draw the pictures and pass them through the image tower.

    Args:
        clip: the model.
        dataset: the data set.
        split: which pictures are scored.
        per_class: how many of them a class.
    """
    drawn = list(product(range(dataset.classes), range(per_class)))
    shown = list(product(range(dataset.num_base), range(dataset.train_per_class)))
    pixels = [pixels_from_image(picture_of(dataset, split, *one), clip.image_spec) for one in drawn]
    crops = [crop for one in shown for crop in _crops_of(dataset, *one, clip.image_spec.size_px)]
    return Frozen(
        crops=_encoded(clip, crops).reshape(len(shown), CROPS, -1),
        crop_labels=torch.tensor([label for label, _ in shown]),
        images=_encoded(clip, pixels),
        labels=torch.tensor([label for label, _ in drawn]),
    )


def _crops_of(dataset: WorldDataset, label: int, index: int, size_px: int) -> list[np.ndarray]:
    picture = picture_of(dataset, "train", label, index).convert("RGB")
    return [training_pixels(picture, size_px, _CONFIG, f"{label} {index} {crop}") for crop in range(CROPS)]


@torch.no_grad()
def _encoded(clip: Clip, pixels: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> unit features [N, D]."""
    chunks = torch.split(torch.from_numpy(np.stack(pixels)), _CHUNK)
    return torch.cat([clip.model.encode_image(clip.normalize(chunk), normalize=True) for chunk in chunks])


def learned_context(clip: Clip, task: Task, frozen: Frozen, config: TrainConfig) -> Method:
    """Learn CoOp's context on a few-shot sample of the crops."""
    method = CoOp(clip, config, task)
    names = task.class_names[: task.num_base]
    optimizer = torch.optim.SGD(
        method.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for rate, features, labels in _batches(frozen, task.num_base, config):
        optimizer.param_groups[0]["lr"] = rate
        loss = classification_loss(features, method.class_features(names), labels, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return method.eval()


def _batches(frozen: Frozen, num_base: int, config: TrainConfig) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Learning rate, features [B, D] and labels [B] of every step."""
    generator = random.Random(config.seed)
    per_class = len(frozen.crop_labels) // num_base
    shown = [
        label * per_class + index
        for label in range(num_base)
        for index in generator.sample(range(per_class), config.shots)
    ]
    for epoch in range(1, config.epochs + 1):
        generator.shuffle(shown)
        for start in range(0, len(shown) - config.batch_size + 1, config.batch_size):
            rows = torch.tensor(shown[start : start + config.batch_size])
            crops = torch.tensor([generator.randrange(CROPS) for _ in rows])
            yield learning_rate(config, epoch), frozen.crops[rows, crops], frozen.crop_labels[rows]


@torch.no_grad()
def scores_of(method: Method, frozen: Frozen) -> Accuracy:
    """Classify the pictures."""
    similarities = frozen.images @ method.class_features(method.task.class_names).T
    return accuracy_of(similarities, frozen.labels, method.task.num_base)


def _write_scores(clip: Clip, dataset: WorldDataset, options: argparse.Namespace) -> None:
    task = Task(class_names=dataset.class_names, num_base=dataset.num_base, templates=(dataset.template,))
    frozen = frozen_features(clip, dataset, split=options.split, per_class=options.per_class)
    before = scores_of(ZeroShot(clip, config_from_recipe("zero-shot-tiny"), task), frozen)
    after = []
    for seed in range(1, options.seeds + 1):
        after.append(scores_of(learned_context(clip, task, frozen, dataclasses.replace(_CONFIG, seed=seed)), frozen))
    texts = [f"{dataset.name:15} {dataset.halves:7} {dataset.shift:5.2f} {before.all:6.1f}"]
    for half in ("base", "new"):
        found = [getattr(one, half) for one in after]
        spread = stdev(found) if len(found) > 1 else 0
        texts.append(f"{getattr(before, half):8.1f} {mean(found):6.1f} ± {spread:3.1f}")
    sys.stdout.write(" ".join(texts) + "\n")
    sys.stdout.flush()


def _datasets_of(options: argparse.Namespace) -> Iterator[WorldDataset]:
    for dataset in map(dataset_named, options.names):
        for halves, shift in product(options.halves or [dataset.halves], options.shifts or [dataset.shift]):
            yield dataclasses.replace(dataset, halves=halves, shift=shift)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learned_context", description=__doc__)
    parser.add_argument("--names", nargs="+", default=[d.name for d in WORLD_DATASETS], help="data sets (default: all)")
    parser.add_argument("--halves", nargs="+", choices=get_args(Halves), help="how halves relate (default: as frozen)")
    parser.add_argument("--shifts", nargs="+", type=float, help="strengths (default: the frozen ones)")
    parser.add_argument("--split", default="val", help="which pictures are scored (default: val)")
    parser.add_argument("--per-class", type=int, default=40, help="pictures of a class that are scored (default: 40)")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of CoOp (default: 3)")
    options = parser.parse_args()
    sys.stdout.write(f"{'data set':15} {'halves':7} {'shift':>5} {'all':>6} {'base: before, after':>21} {'new':>21}\n")
    clip = load_clip(TINY)
    for dataset in _datasets_of(options):
        _write_scores(clip, dataset, options)


if __name__ == "__main__":
    main()
