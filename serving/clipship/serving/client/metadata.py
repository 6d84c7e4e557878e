"""What a server reports about its models, read from their configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipship.core.images.decoding import ImageSpec
from clipship.core.tensors import embedding_tensor
from clipship.serving.errors import ModelsMissing, ServingError
from clipship.serving.model_names import (
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    ENCODER,
    ENCODER_DIGEST,
    IMAGE_SPEC,
    TOP_K,
    VOCABULARY_DIGEST,
    of_vocabulary,
)
from clipship.serving.transport.base import Transport, parameters_of


class Identity(NamedTuple):
    """What must be the same for two servers to give the same answers."""

    bundle: str
    """The digest of the image encoder, or of the whole bundle if the server does not report that of the encoder."""
    vocabulary: str
    """The vocabulary's digest."""


@dataclass(frozen=True, kw_only=True)
class ServerMetadata:
    """What the server reports about its models."""

    bundle_digest: str
    vocabulary_digest: str
    image_spec: ImageSpec
    max_batch_size: int
    top_k: int
    """Classes reported per image."""
    encoder_digest: str | None = None
    """Of the image encoder's file; None if the repository does not report it."""
    embed_dim: int | None = None
    """The size of an embedding; None if the repository's ensembles do not return it."""

    @property
    def identity(self) -> Identity:
        """A published vocabulary may come from another bundle that has the same encoder."""
        return Identity(self.encoder_digest or self.bundle_digest, self.vocabulary_digest)


def read_server_metadata(transport: Transport, vocabulary: str | None = None) -> ServerMetadata:
    """What the server reports about its models: those of its first vocabulary, or of a further ``vocabulary``.

    Raises:
        ModelsMissing: it does not serve them; lists the models it has.
        ServingError: as the transport.
    """
    with _naming_what_is_served(transport, vocabulary):
        ensemble = transport.model_config(of_vocabulary(CLASSIFY, vocabulary))
        parameters = {**parameters_of(ensemble), **_classifier_parameters(transport, vocabulary)}
        return ServerMetadata(
            bundle_digest=parameters[BUNDLE_DIGEST],
            vocabulary_digest=parameters[VOCABULARY_DIGEST],
            image_spec=ImageSpec.from_json(json.loads(parameters[IMAGE_SPEC])),
            max_batch_size=int(ensemble["max_batch_size"]),
            top_k=int(parameters[TOP_K]),
            encoder_digest=_encoder_digest(transport),
            embed_dim=_embed_dim(ensemble),
        )


def read_identity(transport: Transport, vocabulary: str | None = None) -> Identity:
    """The identity alone: two calls.

    Raises:
        ModelsMissing, ServingError: as :func:`read_server_metadata`.
    """
    with _naming_what_is_served(transport, vocabulary):
        parameters = _classifier_parameters(transport, vocabulary)
        return Identity(_encoder_digest(transport) or parameters[BUNDLE_DIGEST], parameters[VOCABULARY_DIGEST])


@contextmanager
def _naming_what_is_served(transport: Transport, vocabulary: str | None) -> Iterator[None]:
    """Turn what a server without our models causes into one error."""
    try:
        yield
    except (ModelsMissing, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        wanted = "clipship's models" if vocabulary is None else f"the vocabulary {vocabulary!r}"
        raise ModelsMissing(
            f"the Triton at {transport.url} does not serve {wanted}; {_served(transport)}: "
            "write a repository with clipship repository and start it with clipship serve"
        ) from error


def _served(transport: Transport) -> str:
    try:
        return f"it has {', '.join(transport.model_names()) or 'no models'}"
    except ServingError:
        return "its model list is restricted"


def _classifier_parameters(transport: Transport, vocabulary: str | None) -> dict[str, str]:
    return parameters_of(transport.model_config(of_vocabulary(CLASSIFIER, vocabulary)))


def _encoder_digest(transport: Transport) -> str | None:
    try:
        return parameters_of(transport.model_config(ENCODER)).get(ENCODER_DIGEST) or None
    except ModelsMissing:
        return None


def _embed_dim(ensemble: dict[str, Any]) -> int | None:
    name = embedding_tensor(1).name
    dims = [output["dims"] for output in ensemble.get("output", []) if output["name"] == name]
    return int(dims[0][-1]) if dims else None
