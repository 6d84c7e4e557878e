"""Verify a running Triton against a bundle: does it serve what was packed?

Shape legend: N images, H = W pixels, D features, k best classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.comparison import Answers, Runner, Verification, VerificationSamples, compare_answers, verify_samples
from clipship.core.errors import CheckFailed
from clipship.core.tensors import ENCODED, ERROR, image_tensor
from clipship.core.tolerances import TOLERANCES
from clipship.serving.client.inputs import stacked
from clipship.serving.client.results import EMBEDDING, INDICES, LABELS, SCORES
from clipship.serving.errors import ModelsMissing, ServingError
from clipship.serving.model_names import BUNDLE_DIGEST, CLASSIFIER, CLASSIFY, CLASSIFY_ENCODED, EMBED, VOCABULARY_DIGEST
from clipship.serving.repository.golden_check import in_batches
from clipship.serving.transport.base import Tensors, Transport, parameters_of
from clipship.serving.transport.grpc import TritonTransport

_TIMEOUT_S = 60.0


def verify_server(
    bundle: Bundle, url: str, samples: Sequence[VerificationSamples], *, precision: str, batch_sizes: Sequence[int]
) -> Verification:
    """The Triton at ``url`` (HOST:PORT) against ``bundle``: features of pixels, classes of pixels and of image files.

    Args:
        precision: what the server's encoder computes in; chooses the tolerance.
        batch_sizes: those above the server's own limit are replaced by the limit.

    Raises:
        ServingError: no server answers there, or it does not serve our models.
        CheckFailed: it serves another bundle or vocabulary.
    """
    with closing(TritonTransport(url)) as transport:
        largest = _validated_batch_limit(transport, bundle)
        sizes = tuple(sorted({min(size, largest) for size in batch_sizes}))
        runner = Runner(name=f"Triton {transport.url}", run=lambda pixels: _embed(transport, pixels))
        features = verify_samples(runner, EMBED, samples, bundle.vocabulary_features(), precision, sizes)
        answers = tuple(
            answer
            for one in samples
            for model in (CLASSIFY, CLASSIFY_ENCODED)
            for answer in _verify_answers(transport, model, bundle, one, precision, sizes)
        )
    return features + Verification((), answers=answers)


def _validated_batch_limit(transport: Transport, bundle: Bundle) -> int:
    """The largest batch that the server takes; CheckFailed if it does not serve ``bundle``."""
    try:
        embed, classifier = (transport.model_config(model) for model in (EMBED, CLASSIFIER))
    except ModelsMissing as error:
        advice = "serve the repository that clipship repository writes from the bundle"
        raise ModelsMissing(f"{error}: {advice}") from error
    given = parameters_of(embed).get(BUNDLE_DIGEST)
    if given != bundle.digest:
        raise CheckFailed(
            f"{transport.url} serves bundle {(given or 'no digest')[:16]}, not {bundle.path} ({bundle.digest[:16]}): "
            "give the bundle it was started with"
        )
    words = parameters_of(classifier).get(VOCABULARY_DIGEST)
    if words != bundle.vocabulary.digest:
        raise CheckFailed(
            f"{transport.url} classifies with vocabulary {(words or 'without a digest')[:16]}, the bundle has "
            f"{bundle.vocabulary.digest[:16]}: give the bundle whose vocabulary was published last"
        )
    return int(embed.get("max_batch_size", 1))


def _infer(transport: Transport, model: str, name: str, rows: NDArray[Any], outputs: Sequence[str]) -> Tensors:
    """The outputs for ``rows`` of the model's one input; CheckFailed if the request fails."""
    try:
        answer = transport.infer(model, {name: rows}, outputs, timeout_s=_TIMEOUT_S).result()
        return {output: answer[output] for output in outputs}
    except (ServingError, KeyError) as error:
        raise CheckFailed(str(error)) from error


def _embed(transport: Transport, pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels [N, H, W, 3] to features [N, D]."""
    features: NDArray[np.float32] = _infer(transport, EMBED, image_tensor(1).name, pixels, [EMBEDDING])[EMBEDDING]
    return features


def _verify_answers(
    transport: Transport, model: str, bundle: Bundle, samples: VerificationSamples, precision: str, sizes: Sequence[int]
) -> Iterator[Answers]:
    expected = bundle.vocabulary_features().probabilities(samples.expected)
    for size in sizes:
        blank = Answers(
            what=samples.what,
            model=model,
            provider=f"Triton {transport.url}",
            batch_size=size,
            count=len(samples.pixels),
            tolerance=TOLERANCES[precision],
        )
        try:
            scores, indices, labels = _classify(transport, model, bundle, samples, size)
        except CheckFailed as error:
            yield replace(blank, problem=str(error))
        else:
            texts = [[label.decode() for label in row] for row in labels.tolist()]
            yield compare_answers(blank, expected, bundle.vocabulary.names, scores, indices, texts)


def _classify(
    transport: Transport, model: str, bundle: Bundle, samples: VerificationSamples, size: int
) -> list[NDArray[Any]]:
    """Scores, indices and labels [N, k]."""
    name, rows, outputs = image_tensor(1).name, samples.pixels, [SCORES, INDICES, LABELS]
    if model == CLASSIFY_ENCODED:
        name, rows, outputs = ENCODED.name, stacked(list(samples.files), bundle.image_spec), [*outputs, ERROR.name]
    answer = in_batches(lambda batch: _infer(transport, model, name, batch, outputs), rows, size)
    for file, error in zip(samples.names, answer.get(ERROR.name, np.empty(0)).ravel().tolist(), strict=False):
        if error:
            raise CheckFailed(f"the server cannot decode {file}: {error.decode()}")
    return [answer[output] for output in (SCORES, INDICES, LABELS)]
