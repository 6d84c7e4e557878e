"""Class names to features through a bundle's ``text_encoder.onnx``: in chunks that survive a kill.

Shape legend: W words (a class is known by its name, or by several words), T templates, L tokens, D features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import MissingExtraError
from clipship.core.files import replace_file, sha256_of_text
from clipship.core.progress import log, progress
from clipship.core.vocabulary import prompt_of
from clipship.export.tokenizer import Tokenizer, read_tokenizer

BATCH_SIZE = 16
"""Prompts that enter the text encoder together; benchmarks/vocabulary.py measures it."""

CHUNK_PROMPTS = 512
"""Prompts whose features are kept together: at most these are encoded again after a kill."""


@dataclass(frozen=True, kw_only=True)
class WordEncoder:
    """The text side of a bundle: words to unit features, by all of the bundle's templates.

    Padding is cut where the graph takes rows of any length up to L; bundles of clipship 0.2 and before take L tokens.
    """

    bundle: Bundle
    batch_size: int = BATCH_SIZE

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's own."""
        return read_tokenizer(self.bundle.tokenizer)

    @property
    def templates(self) -> tuple[str, ...]:
        """The bundle's own."""
        return self.bundle.vocabulary.templates

    @property
    def key(self) -> str:
        """Equal keys give equal features: SHA-256 over the text encoder's files, the tokenizer and the templates."""
        names = (self.bundle.tokenizer.name, *(name for name in self.bundle.files if name.startswith("text_encoder")))
        digests = sorted(self.bundle.files[name] for name in names)
        return sha256_of_text(json.dumps([digests, self.templates], ensure_ascii=False))

    @cached_property
    def _run(self) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        from clipship.export.verification.runners import onnx_session, session_function

        if find_spec("onnxruntime") is None:  # the error of onnx_session names an extra that brings PyTorch
            raise MissingExtraError("onnxruntime", "vocab")
        return session_function(onnx_session(self.bundle.text_encoder))

    def features(self, words: Sequence[str]) -> NDArray[np.float32]:
        """Unit features [W, D]: the mean over the templates' unit features, of unit length again.

        Raises:
            BundleError: the bundle carries no tokenizer.
            DataError: a prompt does not fit into the text encoder.
            MissingExtraError: onnxruntime, ftfy or regex is not installed.
        """
        from clipship.core.comparison import run_in_batches

        prompts = [prompt_of(word, template) for word in words for template in self.templates]
        tokens = self.tokenizer.tokens(prompts, self.bundle.context_length)  # [W T, L]
        each = run_in_batches(self._encode, tokens, self.batch_size)
        if len(self.templates) == 1:
            return each
        mean_WD = each.reshape(len(words), len(self.templates), -1).mean(axis=1)
        unit: NDArray[np.float32] = mean_WD / np.linalg.norm(mean_WD, axis=1, keepdims=True)
        return unit

    def _encode(self, tokens_WL: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit features [W, D] of one batch, without its padding where the graph allows that."""
        if self.bundle.takes_short_prompts:
            ends_W = (tokens_WL == self.tokenizer.end_id).argmax(axis=1)
            tokens_WL = tokens_WL[:, : int(ends_W.max()) + 1]
        return self._run(tokens_WL)


def work_folder(out: Path, key: str) -> Path:
    """The folder of finished chunks for the bundle ``out``, beside it."""
    return out.with_name(f".{out.name}.words-{key[:16]}")


def remove_work_folders(out: Path) -> None:
    """Delete the chunks kept for ``out``, also those by another text encoder."""
    for folder in out.parent.glob(f".{out.name}.words-*"):
        shutil.rmtree(folder)


def encode_words(encoder: WordEncoder, words: Sequence[str], out: Path) -> NDArray[np.float32]:
    """Unit features [W, D], chunk by chunk; those that an interrupted run for ``out`` has finished are read.

    The chunks stay until :func:`remove_work_folders`, which is called when ``out`` has been written.

    Raises:
        OSError: the disk is full; the chunks that are done stay.
        As :meth:`WordEncoder.features`.
    """
    folder = work_folder(out, encoder.key)
    size = max(1, CHUNK_PROMPTS // len(encoder.templates))
    done: list[NDArray[np.float32]] = []
    if folder.is_dir():
        log(f"{folder}: continuing with the chunks of an interrupted run")
    with progress("encode names", len(words)) as report:
        for start in range(0, len(words), size):
            done.append(_chunk(encoder, words[start : start + size], folder))
            report(sum(map(len, done)))
    return np.concatenate(done)


def _chunk(encoder: WordEncoder, words: Sequence[str], folder: Path) -> NDArray[np.float32]:
    path = folder / f"{sha256_of_text(json.dumps(list(words)))}.npy"
    shape = (len(words), encoder.bundle.manifest.embed_dim)
    if path.is_file():
        kept: NDArray[np.float32] = np.load(path)
        if kept.shape == shape:
            return kept
    features = encoder.features(words)
    assert features.shape == shape, f"{features.shape} instead of {shape}"
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, features)
    return features
