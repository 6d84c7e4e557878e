"""Features of classes that have only a name, made by a learned generator (SHIP, arXiv 2307.07397).

Shapes: G generated features, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clipship.core.errors import RecipeError
from clipship.core.files import sha256_of_text
from clipship.training.checkpoint import Checkpoint, load_checkpoint, method_from_checkpoint
from clipship.training.config import TrainConfig
from clipship.training.methods import FeatureGenerator, ImageSet, Task
from clipship.training.model.clip import Clip, digest_of_tensors


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A feature generator, and the classes it stands in for."""

    generator: FeatureGenerator
    digest: str
    """SHA-256 over its learned tensors."""
    task: Task
    """Its last classes, from ``task.num_base`` on, have no images."""

    def features(self, count: int, key: str) -> ImageSet:
        """``count`` features of classes without images, drawn uniformly; equal keys give equal ones."""
        draw = _keyed(key)
        labels = torch.randint(self.task.num_base, len(self.task.class_names), (count,), generator=draw)
        return self._made(labels, draw)

    def per_class(self, count: int, key: str) -> ImageSet:
        """``count`` features of every class without images."""
        labels = torch.arange(self.task.num_base, len(self.task.class_names)).repeat_interleave(count)
        return self._made(labels, _keyed(key))

    def _made(self, labels: torch.Tensor, draw: torch.Generator) -> ImageSet:
        return ImageSet(images=self.generator.generate(labels, self.task.class_names, draw).cpu(), labels=labels)


def _keyed(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(sha256_of_text(key)[:15], 16))


def generation_for(
    config: TrainConfig, task: Task, clip: Clip, given: Path | None, learn: Callable[[TrainConfig], Checkpoint]
) -> Generation | None:
    """The generator of a run: the checkpoint ``given``, or the one that its recipe learns first; None without one.

    Raises:
        RecipeError: the recipe takes none, all classes have images, or ``given`` is a checkpoint of something else.
        CheckpointError: ``given`` is damaged or was learned on another base model.
    """
    if config.generator is None:
        if given is not None:
            raise RecipeError(f"recipe {config.recipe} takes no generator: leave --generator out, or take ship-coop")
        return None
    if task.num_base == len(task.class_names):
        raise RecipeError(f"recipe {config.recipe}: all {task.num_base} classes have images: there is none to generate")
    if config.classes == "none" and given is None:
        raise RecipeError(
            f"recipe {config.recipe} learns without images, so its generator comes from another data set: "
            "give the checkpoint of one (--generator DIR), learned with the recipe " + config.generator.recipe
        )
    checkpoint = load_checkpoint(given) if given is not None else learn(config.generator)
    method = method_from_checkpoint(checkpoint, clip)
    if not isinstance(method, FeatureGenerator):
        raise RecipeError(f"{given} holds {method.name}: give a checkpoint of the recipe {config.generator.recipe}")
    return Generation(generator=method, digest=digest_of_tensors(dict(checkpoint.learned)), task=task)
