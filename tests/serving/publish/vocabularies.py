"""Bundles that share the stand-in encoder and have vocabularies of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle, read_bundle, write_manifest
from clipship.core.classification import VocabularyFeatures
from clipship.core.vocabulary import Vocabulary
from tests.serving.bundles import EMBED_DIM, LOGIT_SCALE, write_bundle

CLASSES = 6


def names_of(variant: int) -> tuple[str, ...]:
    """Names that no other variant has, and that say which it is."""
    return tuple(f"v{variant} clåss {index}" for index in range(CLASSES))


def features_of(variant: int) -> VocabularyFeatures:
    """Features that no other variant has."""
    rows: NDArray[np.float32] = np.random.default_rng(100 + variant).normal(size=(CLASSES, EMBED_DIM)).astype("f4")
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return VocabularyFeatures(features=rows / norms, logit_scale=LOGIT_SCALE + variant)


def write_variant(folder: Path, variant: int, *, seed: int = 0, wrong: bool = False) -> Bundle:
    """The stand-in bundle with variant number ``variant`` of its vocabulary; ``wrong``: golden answers of another."""
    from safetensors.numpy import load_file, save_file

    bundle = write_bundle(folder, seed=seed)
    features = features_of(variant)
    save_file(features.tensors(), folder / "vocabulary.safetensors")
    (folder / "labels.txt").write_text("\n".join(names_of(variant)) + "\n", encoding="utf-8")
    golden = load_file(folder / "golden" / "golden.safetensors")
    answers = features_of(variant + 50) if wrong else features
    scores = answers.probabilities(golden["embedding"])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    best = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    golden |= {"scores": np.ascontiguousarray(best), "indices": np.ascontiguousarray(order)}
    save_file(golden, folder / "golden" / "golden.safetensors")
    write_manifest(folder, replace(bundle.manifest, vocabulary=Vocabulary(names=names_of(variant))))
    return read_bundle(folder)
