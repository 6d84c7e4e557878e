"""Inference with a trained method: features of images, logits over names.

Shapes: N images, C classes, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipship.core.progress import progress
from clipship.training.inputs.batches import evaluation_pixels
from clipship.training.inputs.features import evaluation_features
from clipship.training.methods.base import Method

_CHUNK = 64
"""Images that pass the tower, or meet the classes, at once."""


def distinguishable_names(method: Method) -> tuple[str, ...]:
    """The classes of its task that ``method`` knows: all, or the learned ones of a closed vocabulary.

    They are the first ones of the task, so labels into the task's classes are labels into these.
    """
    only_learned = method.closed_vocabulary and method.config.generator is None
    return method.task.base_names if only_learned else method.task.class_names


@torch.no_grad()
def features_of_files(method: Method, paths: Sequence[Path], *, cache: Path | None = None) -> Tensor:
    """Unit features [N, D] on the CPU of the images at ``paths``, as compared with classes.

    ``cache`` keeps features of frozen image towers, for every method on that model.

    Raises:
        DataError: an image cannot be decoded.
    """
    method.eval()
    device = method.clip.device
    if method.image_side_frozen:
        frozen = evaluation_features(method.clip, paths, cache=cache)
        return torch.cat([method.adapted(part.to(device)).cpu() for part in torch.split(frozen, _CHUNK)])
    parts = []
    with progress("encoding images", len(paths)) as report:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            parts.append(features_of_pixels(method, evaluation_pixels(chunk, method.clip.image_spec)).cpu())
            report(start + len(chunk))
    return torch.cat(parts)


@torch.no_grad()
def features_of_pixels(method: Method, pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> unit features [N, D] on the model's device."""
    return method.image_features(method.clip.normalize(pixels.to(method.clip.device)))


@torch.no_grad()
def logits_over(method: Method, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """A function from unit features [N, D] to the method's logits float32 [N, C] on the CPU.

    Raises:
        DataError: a prompt is too long for the text tower, or the method does not know a class.
    """
    method.eval()
    classify = method.classifier(names)

    @torch.no_grad()
    def logits(features: Tensor) -> Tensor:
        chunks = torch.split(features, _CHUNK)
        return torch.cat([classify(chunk.to(method.clip.device)).float().cpu() for chunk in chunks])

    return logits
