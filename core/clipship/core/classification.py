"""The classification rule, in NumPy: what every classifier graph, server and PyTorch method must equal.

Shapes: N images, C classes, D joint dimensions, K keys of a cache, W words (names before synonyms become one class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import BundleError, UsageError

BIAS = "bias"
CACHE = "cache"
PARTS = (BIAS, CACHE)
"""The optional parts of a classifier."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Few-shot features that vote for their classes, ``alpha exp(-beta (1 - f F^T)) L``: Tip-Adapter, arXiv 2207.09519.

    Keys learned on (Tip-Adapter-F) need not have unit length.
    """

    keys: NDArray[np.float32]
    """F [K, D]."""
    labels: NDArray[np.int64]
    """[K], the class that each key votes for: L is their one-hot matrix."""
    alpha: float
    beta: float

    def votes(self, embedding: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
        """[N, C] of unit ``embedding`` [N, D]; classes without keys get 0."""
        affinity_KN = np.exp(np.float32(self.beta) * (self.keys @ embedding.T - 1)) * np.float32(self.alpha)
        votes_CN = np.zeros((classes, len(embedding)), np.float32)
        np.add.at(votes_CN, self.labels, affinity_KN)
        return votes_CN.T


@dataclass(frozen=True, kw_only=True)
class VocabularyFeatures:
    """The classifier of an embedding f: ``softmax(logit_scale (f W^T + bias) + votes of the cache)``.

    :meth:`merged` and :meth:`extended` add, remove and reorder classes together with their bias and cache;
    ``replace(features=...)`` would not.

    Raises:
        BundleError: shapes that do not belong together, a key's label that is no class, or a number that is not finite.
    """

    features: NDArray[np.float32]
    """W [C, D] in the order of the vocabulary: rows of unit length, or with ``bias`` the weights of a linear probe."""
    logit_scale: float
    """The factor before the softmax (100 for OpenAI's CLIP), already exponentiated and divided by the temperature."""
    bias: NDArray[np.float32] | None = None
    """[C] of a linear probe, which then knows no class but these; None: class features of names."""
    cache: Cache | None = None
    """Votes beside the features; None: none."""

    def __post_init__(self) -> None:
        numbers = [self.logit_scale, *((self.cache.alpha, self.cache.beta) if self.cache else ())]
        if self.features.ndim != 2 or not np.isfinite(numbers).all():
            raise BundleError(f"classifier with features {list(self.features.shape)}, or a scale that is no number")
        classes, dim = self.features.shape
        if self.bias is not None and self.bias.shape != (classes,):
            raise BundleError(f"bias {list(self.bias.shape)} for {classes} classes: pack the bundle again")
        if self.cache is None:
            return
        keys, labels = self.cache.keys.shape, self.cache.labels
        if keys != (len(labels), dim) or labels.ndim != 1:
            raise BundleError(f"cache with keys {list(keys)}, labels {list(labels.shape)} for {dim} dimensions")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise BundleError(f"cache with labels {labels.min()} to {labels.max()} for {classes} classes")

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of :data:`PARTS` it has."""
        return tuple(part for part in PARTS if getattr(self, part) is not None)

    def logits(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [N, C] of unit ``embedding`` [N, D], before the softmax."""
        cosines = embedding @ self.features.T
        logits: NDArray[np.float32] = np.float32(self.logit_scale) * (
            cosines if self.bias is None else cosines + self.bias
        )
        return logits if self.cache is None else logits + self.cache.votes(embedding, len(self.features))

    def probabilities(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [N, C] of unit ``embedding`` [N, D], rows that sum to 1."""
        logits = self.logits(embedding)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return scores

    def best(self, embedding: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Probabilities and places [N, k] of the best k classes of unit ``embedding`` [N, D]; ties go to the first."""
        scores = self.probabilities(embedding)
        indices: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, indices, axis=1), indices

    def tempered(self, temperature: float) -> VocabularyFeatures:
        """All logits divided by ``temperature``, the cache's votes among them."""
        cache = self.cache and replace(self.cache, alpha=self.cache.alpha / temperature)
        return replace(self, logit_scale=self.logit_scale / temperature, cache=cache)

    def merged(self, groups: Sequence[Sequence[int]]) -> VocabularyFeatures:
        """One class a group of rows, in the order of ``groups``; rows in no group go, and their keys with them.

        The features of a class are its row, or the normalised mean of its rows; all their keys vote for it.

        Raises:
            UsageError: several rows become one class of a linear probe, whose weights are no features of names.
        """
        if self.bias is not None and any(len(group) != 1 for group in groups):
            raise UsageError(
                "a linear probe has one weight a class: give every class one name, one that it has learned"
            )
        rows = [self.features[group[0]] if len(group) == 1 else _mean(self.features[list(group)]) for group in groups]
        return VocabularyFeatures(
            features=np.stack(rows),
            logit_scale=self.logit_scale,
            bias=None if self.bias is None else self.bias[[group[0] for group in groups]],
            cache=self.cache and _with_labels(self.cache, groups, len(self.features)),
        )

    def extended(self, features: NDArray[np.float32]) -> VocabularyFeatures:
        """More classes at the end, by the unit ``features`` [C', D] of their names; they get no votes.

        Raises:
            UsageError: a linear probe, which knows the classes that it was trained on only.
        """
        if self.bias is not None:
            raise UsageError("a linear probe knows the classes it was trained on only: train it with the new ones")
        return replace(self, features=np.concatenate([self.features, features.astype(np.float32)]))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of ``vocabulary.safetensors``."""
        tensors: dict[str, NDArray[Any]] = {
            "features": self.features.astype(np.float32),
            "logit_scale": np.array([self.logit_scale], np.float32),
        }
        if self.bias is not None:
            tensors["bias"] = self.bias.astype(np.float32)
        if self.cache is not None:
            tensors["cache_keys"] = self.cache.keys.astype(np.float32)
            tensors["cache_labels"] = self.cache.labels.astype(np.int64)
            tensors["cache_alpha"] = np.array([self.cache.alpha], np.float32)
            tensors["cache_beta"] = np.array([self.cache.beta], np.float32)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> VocabularyFeatures:
        """The inverse of :meth:`tensors`.

        Raises:
            BundleError: a tensor is missing, or as the constructor.
        """
        try:
            cache = None
            if "cache_keys" in tensors:
                cache = Cache(
                    keys=tensors["cache_keys"],
                    labels=tensors["cache_labels"],
                    alpha=float(tensors["cache_alpha"][0]),
                    beta=float(tensors["cache_beta"][0]),
                )
            scale = float(tensors["logit_scale"][0])
            return cls(features=tensors["features"], logit_scale=scale, bias=tensors.get("bias"), cache=cache)
        except (KeyError, IndexError) as error:
            raise BundleError(f"the classifier's tensor {error} is missing: pack the bundle again") from error


def _mean(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[W, D] -> unit [D]."""
    mean: NDArray[np.float32] = rows.mean(axis=0)
    return mean / np.linalg.norm(mean)


def _with_labels(cache: Cache, groups: Sequence[Sequence[int]], rows: int) -> Cache:
    """``cache`` with its labels, rows until now, as places in ``groups``; keys of rows in no group are left out."""
    place_of_row = np.full(rows, -1, np.int64)
    for place, group in enumerate(groups):
        place_of_row[list(group)] = place
    labels = place_of_row[cache.labels]
    return replace(cache, keys=cache.keys[labels >= 0], labels=labels[labels >= 0])
