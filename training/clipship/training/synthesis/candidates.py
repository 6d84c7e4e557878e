"""The candidates of a set, each with its own seed, and the batches they are made in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath

from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import MAX_TRIES, SynthesisConfig
from clipship.training.synthetic_set import IMAGE_FOLDER, folder_of

SUFFIXES = {"webp": ".webp", "jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image to make."""

    class_name: str
    place: int
    """Its number among all images of the set: class by class."""
    attempt: int
    """How many seeds were tried before this one."""
    seed: int
    prompt: str
    source: str | None
    """Path of the real image that image-to-image starts from."""

    @property
    def key(self) -> tuple[int, int]:
        """Unique in a set."""
        return self.place, self.attempt

    def file_path(self, config: SynthesisConfig) -> str:
        """Its file, below the set's folder."""
        file = f"{self.seed}{SUFFIXES[config.image_format]}"
        return str(PurePosixPath(IMAGE_FOLDER, folder_of(self.class_name), file))


def seed_of(seed: int, class_name: str, number: int, attempt: int = 0) -> int:
    """The seed of image ``number`` of a class, from 0 to 2**52, at least :data:`MAX_TRIES` from any other.

    It depends on nothing else: more candidates or classes do not change existing images. Attempts count up from it.
    """
    digest = hashlib.sha256(json.dumps([seed, class_name, number]).encode()).digest()
    return int.from_bytes(digest[:6], "big") * MAX_TRIES + attempt


def candidates_of(config: SynthesisConfig, class_prompts: ClassPrompts, attempt: int = 0) -> list[Candidate]:
    """All images of the set, class by class, each with the seed of ``attempt``."""
    found = []
    for place, (class_name, number) in enumerate(product(class_prompts.class_names, range(config.candidates))):
        prompts, sources = class_prompts.prompts[class_name], class_prompts.sources.get(class_name, ())
        found.append(
            Candidate(
                class_name=class_name,
                place=place,
                attempt=attempt,
                seed=seed_of(config.seed, class_name, number, attempt),
                prompt=prompts[number % len(prompts)],
                source=str(sources[number % len(sources)]) if sources else None,
            )
        )
    return found


def batches_of(
    candidates: Sequence[Candidate], size: int, done: Collection[tuple[int, int]]
) -> Iterator[list[Candidate]]:
    """``candidates`` in batches of ``size``, without those that are ``done``.

    The cut does not depend on what is done: the batch may change the last bit of an image, and an interrupted run
    has to give the same images. A batch is text-to-image or image-to-image, never both.
    """
    for has_source in (False, True):
        kind = [one for one in candidates if (one.source is not None) == has_source]
        for start in range(0, len(kind), size):
            batch = [one for one in kind[start : start + size] if one.key not in done]
            if batch:
                yield batch
