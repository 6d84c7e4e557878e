"""Golden samples in a model repository, which its models and ``clipship serve`` check themselves with.

::

    image_encoder/golden.npz      pixels uint8 [N, H, W, 3], embedding float32 [N, D] by PyTorch
    preprocess/golden.npz         files uint8 (the bytes of n files, concatenated), lengths int64 [n],
                                  pixels uint8 [n, H, W, 3]
    classifier/V/golden.npz       embedding float32 [N, D], scores float32 [N, C] of all classes
    classifier/V/labels.txt       the C class names, one a line

Triton ignores them. Those of a vocabulary are in its version's folder, so they are published and rolled back with it.
The models read them with NumPy, the only package that Triton's Python always has.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import GOLDEN, LABELS, Bundle
from clipship.core.tolerances import golden_arrays, golden_files
from clipship.serving.errors import RepositoryError
from clipship.serving.model_names import ENCODER, PREPROCESS

SAMPLES = "golden.npz"

FILES = 2
"""Golden images kept as files: photographs can be large, and two are enough for a decoder."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The expected answers of a vocabulary for N golden images."""

    names: tuple[str, ...]
    """The C classes."""
    embedding: NDArray[np.float32]
    """[N, D] by PyTorch."""
    scores: NDArray[np.float32]
    """[N, C] by the classification rule."""


@dataclass(frozen=True, kw_only=True)
class GoldenSamples:
    """The expected answers of a repository's encoder and decoder."""

    pixels: NDArray[np.uint8]
    """[N, H, W, 3]"""
    embedding: NDArray[np.float32]
    """[N, D] by PyTorch."""
    files: NDArray[Any]
    """[n, 1] of bytes: the first images' own files."""


def truth_from_bundle(bundle: Bundle) -> Truth:
    """The expected answers of ``bundle``'s vocabulary."""
    embedding = bundle.golden().embedding
    scores = bundle.vocabulary_features().probabilities(embedding)
    return Truth(names=bundle.vocabulary.names, embedding=embedding, scores=scores)


def write_samples(folder: Path, bundle: Bundle) -> None:
    """Write the samples of the image encoder and of preprocess to the repository in ``folder``."""
    golden = bundle.golden()
    np.savez(folder / ENCODER / SAMPLES, pixels=golden.pixels, embedding=golden.embedding)
    files = [np.fromfile(bundle.path / GOLDEN / name, np.uint8) for name in golden.files[:FILES]]
    lengths = np.array([len(file) for file in files], np.int64)
    np.savez(folder / PREPROCESS / SAMPLES, files=np.concatenate(files), lengths=lengths, pixels=golden.pixels[:FILES])


def write_truth(version: Path, truth: Truth) -> None:
    """Write ``truth`` to the folder of a classifier's version."""
    np.savez(version / SAMPLES, embedding=truth.embedding, scores=truth.scores)
    (version / LABELS).write_text("".join(f"{name}\n" for name in truth.names), encoding="utf-8")


def read_samples(repository: Path) -> GoldenSamples | None:
    """What :func:`write_samples` wrote; None in repositories written before 0.6.

    Raises:
        RepositoryError: it is damaged.
    """
    encoder, decoder = (_arrays(repository / model / SAMPLES) for model in (ENCODER, PREPROCESS))
    if encoder is None or decoder is None:
        return None
    files = np.empty((len(decoder["lengths"]), 1), np.object_)
    files[:, 0] = golden_files(decoder)
    return GoldenSamples(pixels=encoder["pixels"], embedding=encoder["embedding"], files=files)


def read_truth(version: Path) -> Truth | None:
    """What :func:`write_truth` wrote; None in versions written before 0.6.

    Raises:
        RepositoryError: it is damaged.
    """
    arrays = _arrays(version / SAMPLES)
    if arrays is None:
        return None
    try:
        names = (version / LABELS).read_bytes().decode().split("\n")[:-1]  # names may contain other line separators
    except OSError as error:
        raise _damaged(version / LABELS, error) from error
    return Truth(names=tuple(names), embedding=arrays["embedding"], scores=arrays["scores"])


def _arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        return golden_arrays(str(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RepositoryError:
    return RepositoryError(f"{path}: cannot be read ({error}): write it again with clipship repository")
