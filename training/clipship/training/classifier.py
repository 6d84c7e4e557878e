"""A trained checkpoint as a classifier, in two lines.

>>> classifier = Classifier.load("runs/prints")
>>> classifier.predict(["cat.jpg", "dog.png"])[0].label

Images become pixels as on the server; probabilities are those of the calibrated logits.
Legend: N images, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError, UsageError
from clipship.core.images.decoding import ImageDecodeError
from clipship.core.images.inputs import ImageLike, pixels_from_any
from clipship.core.vocabulary import Vocabulary
from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint
from clipship.training.evaluation.inference import distinguishable_names, features_of_pixels, logits_over
from clipship.training.evaluation.temperature import Calibration
from clipship.training.methods import Method
from clipship.training.model.clip import default_device, load_clip


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an image shows."""

    label: str
    """The most probable class."""
    probability: float
    """Its probability among all of the classifier's names."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes and their probabilities, best first."""


class Classifier:
    """A trained method and the class names it chooses from.

    Args:
        method: a trained method.
        names: what to choose from; default: the classes of its task that it can classify.
        calibration: its temperature; None: the method's own probabilities.

    Raises:
        DataError: names that are empty, repeated, too long, or unknown to the method.
    """

    def __init__(
        self, method: Method, *, names: Sequence[str] | None = None, calibration: Calibration | None = None
    ) -> None:
        self.method = method
        self.names = distinguishable_names(method) if names is None else _validated_names(names)
        self.calibration = calibration
        self._logits = logits_over(method, self.names)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        names: Sequence[str] | None = None,
        base_model: str | None = None,
        device: str | None = None,
    ) -> Classifier:
        """The classifier of the checkpoint in the folder ``path``.

        ``base_model`` is the model's folder if it was moved; ``device`` is a torch device, by default the
        GPU if there is one.

        Raises:
            CheckpointError: no checkpoint there, a damaged one, or another base model than it was trained on.
            RecipeError: the base model cannot be loaded.
            DataError: as the constructor.
        """
        checkpoint = load_checkpoint(Path(path))
        clip = load_clip(base_model or checkpoint.config.base_model)
        clip.to(device or default_device())
        calibration = None if checkpoint.calibration is None else Calibration.from_json(checkpoint.calibration)
        return cls(method_from_checkpoint(checkpoint, clip), names=names, calibration=calibration)

    def predict(self, images: Iterable[ImageLike], top_k: int = 5, batch_size: int = 32) -> list[Prediction]:
        """One prediction an image, in order; ``images`` may be mixed, and is read batch by batch.

        Raises:
            DataError: something that is no image or cannot be decoded, by position and path.
            UsageError: a number is out of range, or ``images`` is a single image.
        """
        if top_k < 1 or batch_size < 1:
            raise UsageError(f"top_k {top_k}, batch_size {batch_size}: give numbers of at least 1")
        _validate_several(images)
        with ThreadPoolExecutor() as pool:
            batches = self._batches(images, batch_size, pool)
            return [prediction for pixels in batches for prediction in self._predicted(pixels, top_k)]

    def _batches(
        self, images: Iterable[ImageLike], batch_size: int, pool: ThreadPoolExecutor
    ) -> Iterator[NDArray[np.uint8]]:
        """Pixels uint8 [N, H, W, 3] of the images, N at most ``batch_size``."""
        numbered = enumerate(images)
        while batch := list(islice(numbered, batch_size)):
            yield np.stack(list(pool.map(self._pixels, batch)))

    def _pixels(self, numbered: tuple[int, ImageLike]) -> NDArray[np.uint8]:
        position, image = numbered
        path = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
        try:
            return pixels_from_any(image, self.method.clip.image_spec)
        except (ImageDecodeError, UsageError) as error:
            raise DataError(f"image {position}{path}: {error}") from error
        except OSError as error:
            raise DataError(f"image {position}{path}: cannot be read: {error.strerror or error}") from error

    def _predicted(self, pixels: NDArray[np.uint8], top_k: int) -> Iterator[Prediction]:
        logits = self._logits(features_of_pixels(self.method, torch.from_numpy(pixels))).double()
        temperature = self.calibration.temperature if self.calibration else 1.0
        probabilities, indices = torch.softmax(logits / temperature, dim=1).topk(min(top_k, len(self.names)), dim=1)
        for values, places in zip(probabilities.tolist(), indices.tolist(), strict=True):
            top = tuple((self.names[place], value) for place, value in zip(places, values, strict=True))
            yield Prediction(label=top[0][0], probability=top[0][1], top=top)


def _validated_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise DataError(f"names is the one word {names!r}: give a list of names")
    return Vocabulary(names=tuple(names)).names


def _validate_several(images: object) -> None:
    is_one_array = isinstance(images, np.ndarray) and images.ndim < 4
    if is_one_array or isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise UsageError(f"images is a single {type(images).__name__}: give a list, [image]")
