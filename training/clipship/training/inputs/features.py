"""Features of the frozen image tower: encoded once, kept on disk for every method that leaves the tower alone.

A file of the cache is named by what its features depend on: the model's weights, the images (path, size and time of
change), the crop. It is written whole or not at all, so any number of processes can share a folder.

Shapes: N images, D joint dimensions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipship.core.errors import DataError
from clipship.core.files import replace_file, sha256_of_text
from clipship.core.progress import log, progress
from clipship.training.config import TrainConfig
from clipship.training.inputs.batches import ImageCache, evaluation_pixels, training_view
from clipship.training.model import prompts
from clipship.training.model.autocast import autocast
from clipship.training.model.clip import Clip

_CHUNK = 64
"""Images that pass the tower at once."""


def evaluation_features(clip: Clip, paths: Sequence[Path], *, cache: Path | None = None) -> Tensor:
    """Unit features, float32 [N, D] on the CPU, of images prepared as at test time (resize and centre crop).

    Raises:
        DataError: an image cannot be decoded, or has features that are not finite.
    """

    def pixels(start: int, stop: int) -> Tensor:
        return evaluation_pixels(paths[start:stop], clip.image_spec)

    return _kept(cache, clip, paths, ["evaluation"], lambda: _encoded(clip, paths, pixels, "fp32"))


def view_features(
    clip: Clip, paths: Sequence[Path], config: TrainConfig, epoch: int, images: ImageCache, *, cache: Path | None = None
) -> Tensor:
    """Unit features, float32 [N, D] on the CPU, of the images under the crops that they have in ``epoch``.

    Raises:
        DataError: an image cannot be decoded, or has features that are not finite.
    """
    size = clip.image_spec.size_px

    def pixels(start: int, stop: int) -> Tensor:
        return torch.stack([training_view(images, path, i, size, config, epoch)
                            for i, path in enumerate(paths[start:stop], start)])  # fmt: skip

    depends = [config.seed, config.min_crop, config.flip, config.precision, epoch]
    return _kept(cache, clip, paths, depends, lambda: _encoded(clip, paths, pixels, config.precision))


def frozen_features(clip: Clip, pixels: Tensor) -> Tensor:
    """Normalised pixels [N, 3, H, W] -> unit float32 features [N, D] of the frozen tower, without gradients."""
    with torch.no_grad():
        return functional.normalize(prompts.image_features(clip, pixels).float(), dim=-1)


def _encoded(clip: Clip, paths: Sequence[Path], pixels: Callable[[int, int], Tensor], precision: str) -> Tensor:
    features = [torch.empty(0, clip.embed_dim)]
    with progress("encoding images", len(paths)) as report, autocast(precision, clip.device):
        for start in range(0, len(paths), _CHUNK):
            stop = min(start + _CHUNK, len(paths))
            features.append(frozen_features(clip, clip.normalize(pixels(start, stop).to(clip.device))).cpu())
            report(stop)
    result = torch.cat(features)
    odd = [path for path, fine in zip(paths, result.isfinite().all(dim=1).tolist(), strict=True) if not fine]
    if odd:
        raise DataError(f"{odd[0]}: its features are not finite: look at the image, or take fp32 instead of fp16")
    return result


def _kept(
    cache: Path | None, clip: Clip, paths: Sequence[Path], depends: Sequence[Any], compute: Callable[[], Tensor]
) -> Tensor:
    if cache is None or not paths:
        return compute()
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    file = cache / f"{sha256_of_text(json.dumps([clip.digest, stats, *depends]))}.safetensors"
    try:
        known: Tensor = load_file(file)["features"]
        return known
    except (OSError, SafetensorError, KeyError):
        features = compute()
    try:
        with replace_file(file) as temporary:
            temporary.write_bytes(save({"features": features}))
    except OSError as error:
        _tell_unkept(cache, error.strerror or str(error))
    return features


@functools.cache
def _tell_unkept(folder: Path, reason: str) -> None:
    log(f"{folder}: cannot cache features ({reason}): every run encodes them again")
