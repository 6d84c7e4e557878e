"""Features of classes that have only a name, made by a learned generator (SHIP, arXiv 2307.07397).

Shapes: G generated features, D joint dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clipship.core.errors import RecipeError
from clipship.core.files import sha256_of_text
from clipship.training.checkpoint import Checkpoint, method_from_checkpoint
from clipship.training.config import TrainConfig
from clipship.training.methods import FeatureGenerator, ImageSet, Task
from clipship.training.model.clip import Clip, digest_of_tensors


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A feature generator and the classes that it generates."""

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


def validate_generator(config: TrainConfig, task: Task, given: Path | None) -> None:
    """Validate that the run has a use and a source for a generator; ``given`` is the checkpoint of one.

    Raises:
        RecipeError: the recipe takes none, all classes have images, or it needs one of another data set.
    """
    if config.generator is None:
        if given is not None:
            raise RecipeError(f"recipe {config.recipe} takes no generator: leave --generator out, or take ship-coop")
        return
    if task.num_base == len(task.class_names):
        raise RecipeError(f"recipe {config.recipe}: all {task.num_base} classes have images: there is none to generate")
    if config.classes == "none" and given is None:
        raise RecipeError(
            f"recipe {config.recipe} learns without images, so its generator comes from another data set: "
            "give the checkpoint of one (--generator DIR), learned with the recipe " + config.generator.recipe
        )


def generation_from_checkpoint(checkpoint: Checkpoint, where: Path, clip: Clip, task: Task) -> Generation:
    """The generator in ``checkpoint`` for the classes of ``task``; ``where`` is named in errors.

    Raises:
        RecipeError: it holds another method.
        CheckpointError: it was learned on another base model.
    """
    method = method_from_checkpoint(checkpoint, clip)
    if not isinstance(method, FeatureGenerator):
        raise RecipeError(
            f"{where} holds {method.name}: give a checkpoint of a generator, such as the recipe ship learns"
        )
    return Generation(generator=method, digest=digest_of_tensors(dict(checkpoint.learned)), task=task)
