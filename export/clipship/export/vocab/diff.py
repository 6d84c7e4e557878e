"""Two bundles' vocabularies compared: names added, removed, moved or renamed, and whether features agree.

Shape legend: C classes, D features.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle

_SHOWN = 20
"""Names of a kind in the text for people; JSON has all."""

_FARTHEST = 5
"""Shared names whose features differ most."""


@dataclass(frozen=True, kw_only=True)
class FeatureDistance:
    """How far the features of shared names are from each other."""

    max_abs: float
    """Largest difference of any value."""
    min_cosine: float
    farthest: tuple[tuple[str, float], ...]
    """Names and the largest difference of their values, those that differ most first; none that are equal."""

    def __str__(self) -> str:
        farthest = ", ".join(f"{name!r} {value:.1e}" for name, value in self.farthest)
        numbers = f"max difference {self.max_abs:.1e}, min cosine {self.min_cosine:.7f}"
        return f"features of shared names: {numbers}" + (f"\nfarthest: {farthest}" if farthest else "")


@dataclass(frozen=True, kw_only=True)
class VocabularyDiff:
    """How one bundle's vocabulary differs from another's. True when they are equal."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    """Pairs of a removed name and the new one at its place, between the same neighbours."""
    moved: tuple[str, ...]
    """The fewest shared names whose removal makes the two orders equal."""
    other_words: tuple[str, ...]
    """Shared names with other synonyms."""
    classes: tuple[int, int]
    same: Mapping[str, bool]
    """Whether each of these is the same: image encoder, text encoder, base model, templates, logit scale."""
    distance: FeatureDistance | None
    """None where no name is shared, or the embeddings differ in size."""

    def __bool__(self) -> bool:
        changed = (self.added, self.removed, self.renamed, self.moved, self.other_words)
        return not any(changed) and all(self.same.values()) and (self.distance is None or not self.distance.max_abs)

    def __str__(self) -> str:
        kinds = {
            "added": list(map(repr, self.added)),
            "removed": list(map(repr, self.removed)),
            "renamed": [f"{old!r} -> {new!r}" for old, new in self.renamed],
            "moved": list(map(repr, self.moved)),
            "other words": list(map(repr, self.other_words)),
        }
        lines = [f"{self.classes[0]} -> {self.classes[1]} classes"]
        lines += [f"{kind} {len(names)}: {_shortened(names)}" for kind, names in kinds.items() if names]
        lines += [f"{what}: {'the same' if same else 'DIFFERENT'}" for what, same in self.same.items()]
        return "\n".join([*lines, str(self.distance or "features of shared names: none that can be compared")])

    def to_json(self) -> dict[str, Any]:
        """A JSON object with everything."""
        content = json.loads(json.dumps(asdict(self)))  # lists for tuples
        content["features"] = content.pop("distance")
        return {"equal": bool(self), **content}


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more (--json has all)" if more > 0 else "")


def vocabulary_diff(before: Bundle, after: Bundle) -> VocabularyDiff:
    """How ``after``'s vocabulary differs from ``before``'s."""
    old, new = before.vocabulary, after.vocabulary
    renamed = _renamed(old.names, new.names)
    gone, come = {name for name, _ in renamed}, {name for _, name in renamed}
    place = {name: row for row, name in enumerate(new.names)}
    shared = [name for name in old.names if name in place]
    old_words, new_words = old.classes, new.classes
    return VocabularyDiff(
        added=tuple(name for name in new.names if name not in old_words and name not in come),
        removed=tuple(name for name in old.names if name not in place and name not in gone),
        renamed=renamed,
        moved=_moved(shared, [place[name] for name in shared]),
        other_words=tuple(name for name in shared if old_words[name] != new_words[name]),
        classes=(len(old), len(new)),
        same=_same(before, after),
        distance=_distance(before, after, shared),
    )


def _renamed(old: Sequence[str], new: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Names in runs of equal length between the same two shared neighbours."""
    shared = set(old) & set(new)
    runs = dict(_runs(new, shared))
    pairs = [(run, runs.get(neighbours, ())) for neighbours, run in _runs(old, shared)]
    return tuple(pair for gone, come in pairs if len(gone) == len(come) for pair in zip(gone, come, strict=True))


def _runs(names: Sequence[str], shared: set[str]) -> Iterator[tuple[tuple[str | None, str | None], list[str]]]:
    """By the shared neighbours on both sides, the names between them that are not shared; None is the end."""
    left: str | None = None
    run: list[str] = []
    for name in [*names, None]:
        if name is not None and name not in shared:
            run.append(name)
            continue
        if run:
            yield (left, name), run
        left, run = name, []


def _moved(names: Sequence[str], places: Sequence[int]) -> tuple[str, ...]:
    """The names outside the longest subsequence whose ``places`` rise (patience sorting, n log n)."""
    ends: list[int] = []  # the smallest last place of a rising subsequence of each length
    lengths = []
    for place in places:
        length = bisect_left(ends, place)
        ends[length : length + 1] = [place]
        lengths.append(length)
    wanted, moved = len(ends) - 1, []
    last = float("inf")
    for name, place, length in zip(reversed(names), reversed(places), reversed(lengths), strict=True):
        if length == wanted and place < last:
            wanted, last = wanted - 1, place
        else:
            moved.append(name)
    return tuple(reversed(moved))


def _same(before: Bundle, after: Bundle) -> dict[str, bool]:
    old, new = before.vocabulary_features(), after.vocabulary_features()
    return {
        "image encoder": before.files[IMAGE_ENCODER] == after.files[IMAGE_ENCODER],
        "text encoder": before.files[TEXT_ENCODER] == after.files[TEXT_ENCODER],
        "base model": before.manifest.base_model_digest == after.manifest.base_model_digest,
        "templates": before.vocabulary.templates == after.vocabulary.templates,
        "logit scale": old.logit_scale == new.logit_scale,
    }


def _distance(before: Bundle, after: Bundle, shared: Sequence[str]) -> FeatureDistance | None:
    if not shared or before.manifest.embed_dim != after.manifest.embed_dim:
        return None
    old_CD, new_CD = (_features_of(bundle, shared) for bundle in (before, after))
    each_C = np.abs(old_CD - new_CD).max(axis=1)
    lengths_C = np.linalg.norm(old_CD, axis=1) * np.linalg.norm(new_CD, axis=1)
    farthest = [row for row in np.argsort(-each_C, kind="stable")[:_FARTHEST] if each_C[row] > 0]
    return FeatureDistance(
        max_abs=float(each_C.max()),
        min_cosine=float(((old_CD * new_CD).sum(axis=1) / lengths_C).min()),
        farthest=tuple((shared[row], float(each_C[row])) for row in farthest),
    )


def _features_of(bundle: Bundle, names: Sequence[str]) -> NDArray[np.float32]:
    """The features [C, D] of ``names``."""
    place = {name: row for row, name in enumerate(bundle.vocabulary.names)}
    return bundle.vocabulary_features().features[[place[name] for name in names]]
