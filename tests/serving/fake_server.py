"""A server that is a function: the best class of an image is the value of its first pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving import Result
from clipship.serving.errors import ModelsMissing, ServingError
from clipship.serving.model_names import CLASSIFIER, CLASSIFY, CLASSIFY_ENCODED, of_vocabulary
from clipship.serving.repository.backends import PYTHON
from clipship.serving.repository.models import ModelSettings, VocabularySettings, configs_from_settings
from clipship.serving.transport.base import CallOptions, Tensors, config_json
from tests.serving.bundles import EMBED_DIM, SPEC

BATCH = 4


class FakeTransport:
    """A transport whose ``function(model, inputs)`` gives the outputs, or a future of them, or raises."""

    def __init__(
        self,
        function: Callable[[str, Tensors], Tensors | Future[Tensors]],
        configs: Mapping[str, dict[str, Any]],
        *,
        url: str = "fake",
        on_this_machine: bool = True,
    ) -> None:
        self.url = url
        self.on_this_machine = on_this_machine
        self.requests: list[tuple[str, Tensors]] = []
        self.request_ids: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.function = function
        self.configs = dict(configs)
        self.closed = False

    def infer(
        self, model: str, inputs: Tensors, outputs: Sequence[str], **options: Unpack[CallOptions]
    ) -> Future[Tensors]:
        self.requests.append((model, inputs))
        self.request_ids.append(options.get("request_id", ""))
        self.headers.append(options.get("headers", {}))
        future: Future[Tensors] = Future()
        try:
            answer = self.function(model, inputs)
        except ServingError as error:
            future.set_exception(error)
            return future
        if isinstance(answer, Future):
            return answer
        future.set_result(answer)
        return future

    def model_config(self, model: str) -> dict[str, Any]:
        if model not in self.configs:
            raise ModelsMissing(f"{self.url}: no model {model!r}")
        return self.configs[model]

    def model_names(self) -> list[str]:
        return sorted(self.configs)

    def close(self) -> None:
        self.closed = True


def configs(
    *vocabularies: str, digest: str = "v" * 64, bundle: str = "b" * 64, encoder: str = ""
) -> dict[str, dict[str, Any]]:
    """The configurations of a repository with further ``vocabularies``."""
    facts = ModelSettings(
        vocabularies=(VocabularySettings(bundle_digest=bundle, vocabulary_digest=digest, top_k=2),),
        image_spec=SPEC,
        embed_dim=EMBED_DIM,
        encoder_digest=encoder,
        max_batch_size=BATCH,
    )
    told = {name: config_json(config) for name, config in configs_from_settings(facts, PYTHON).items()}
    for vocabulary in vocabularies:
        for model in (CLASSIFIER, CLASSIFY, CLASSIFY_ENCODED):
            told[of_vocabulary(model, vocabulary)] = told[model]
    return told


def flat(value: int) -> NDArray[np.uint8]:
    """An image of one grey."""
    return np.full((SPEC.size_px, SPEC.size_px, 3), value, dtype=np.uint8)


def answer(model: str, inputs: Tensors) -> Tensors:
    """The outputs for ``inputs``; the embedding's first number is the grey."""
    errors = None
    if "encoded" in inputs:
        elements = inputs["encoded"][:, 0]
        greys = np.array([int(pixels_from_bytes(data, SPEC)[0, 0, 0]) if data else 0 for data in elements])
        errors = np.array([[b"" if data else b"empty"] for data in elements], dtype=np.object_)
    else:
        greys = inputs["image"][:, 0, 0, 0].astype(np.int64)
    labels = np.array([[f"grey {grey}".encode(), "\N{FOX FACE}".encode()] for grey in greys], dtype=np.object_)
    scores = np.tile(np.array([[0.75, 0.25]], dtype=np.float32), (len(greys), 1))
    embedding = np.zeros((len(greys), EMBED_DIM), np.float32)
    embedding[:, 0] = greys
    outputs = {"scores": scores, "indices": np.stack([greys, greys + 1], axis=1), "labels": labels}
    return {**outputs, "embedding": embedding, **({} if errors is None else {"error": errors})}


def fake(function: Any = answer) -> FakeTransport:
    """A transport to the function."""
    return FakeTransport(function, configs())


def grey(result: Result) -> int:
    """The image's grey, from its result."""
    assert result.error is None
    return result.indices[0]
