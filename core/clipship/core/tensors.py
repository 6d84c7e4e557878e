"""The names, types and shapes of every tensor that crosses a file or a wire. No other file spells a tensor name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BATCH = "batch"
"""The free axis of images."""

CLASSES = "classes"
"""The free axis of class names."""


TOKENS = "tokens"
"""The free axis of a prompt's tokens, at most the text encoder's context length."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output: ``shape`` holds sizes, and names for its free axes."""

    name: str
    dtype: str
    """A NumPy name ("uint8", "int64", "float32"), or "string" for UTF-8 bytes."""
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "int64", "float32", "string"):
            raise ValueError(f"tensor {self.name}: dtype {self.dtype} is not one of uint8, int64, float32, string")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with name, dtype and shape."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_json`."""
        return cls(name=content["name"], dtype=content["dtype"], shape=tuple(content["shape"]))


def image_tensor(size_px: int) -> TensorSpec:
    """Pixels as the client sends them: RGB, rows from the top."""
    return TensorSpec(name="image", dtype="uint8", shape=(BATCH, size_px, size_px, 3))


def embedding_tensor(embed_dim: int, axis: str = BATCH) -> TensorSpec:
    """Features of unit length."""
    return TensorSpec(name="embedding", dtype="float32", shape=(axis, embed_dim))


def passthrough_tensor(embed_dim: int) -> TensorSpec:
    """The embedding as the classifier hands it on.

    An ensemble's output must not be what one of its steps needs: when a client does not ask for it, Triton leaves out
    the step that makes it and answers "unexpected deadlock". So ensembles take the embedding from here.
    """
    return TensorSpec(name="embedding_passthrough", dtype="float32", shape=(BATCH, embed_dim))


def tokens_tensor(length: int | str = TOKENS) -> TensorSpec:
    """Token ids as open_clip's tokenizer gives them, padded with zeros to a common length, or to a fixed ``length``."""
    return TensorSpec(name="tokens", dtype="int64", shape=(CLASSES, length))


def scores_tensor(k: int) -> TensorSpec:
    """Probabilities of the top k classes, descending."""
    return TensorSpec(name="scores", dtype="float32", shape=(BATCH, k))


def indices_tensor(k: int) -> TensorSpec:
    """Positions of the top k classes in the vocabulary."""
    return TensorSpec(name="indices", dtype="int64", shape=(BATCH, k))


def labels_tensor(k: int) -> TensorSpec:
    """Names of the top k classes, from the very vocabulary the scores come from."""
    return TensorSpec(name="labels", dtype="string", shape=(BATCH, k))


ENCODED = TensorSpec(name="encoded", dtype="string", shape=(BATCH, 1))
"""One image file's bytes an element (JPEG, PNG, WebP, BMP, GIF)."""

ERROR = TensorSpec(name="error", dtype="string", shape=(BATCH, 1))
"""Why an image could not be decoded; empty for those that could."""
