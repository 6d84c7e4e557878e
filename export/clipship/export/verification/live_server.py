"""A live Triton against a bundle: does what is served equal what was packed?

The one place of the export stage that knows gRPC (the serving stage has its own seam, which export may not import: it
talks to one server, once, and wants errors at once instead of retries). Model and parameter names are those that
``clipship repository`` writes.

Shape legend: N images, H = W pixels, D features, C classes, k best classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core import tensors
from clipship.core.bundle import Bundle
from clipship.core.comparison import Answers, Verification, compare_answers
from clipship.core.errors import CheckFailed, ClipshipError
from clipship.core.tensors import ENCODED, ERROR
from clipship.core.tolerances import TOLERANCES
from clipship.export.verification.runners import Runner
from clipship.export.verification.verify import VerificationSamples, verify_samples

EMBED, CLASSIFY, CLASSIFY_ENCODED, CLASSIFIER = "embed", "classify", "classify_encoded", "classifier"
_BUNDLE_DIGEST, _VOCABULARY_DIGEST = "bundle_digest", "vocabulary_digest"
_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
_MAX_MESSAGE_BYTES = 2**31 - 1


class LiveServerError(ClipshipError):
    """A server does not answer, or does not serve what a bundle needs."""


@dataclass(frozen=True)
class _Answered:
    """What one classifying model said. N images, k classes."""

    scores: NDArray[np.float32]
    """[N, k]"""
    indices: NDArray[np.int64]
    labels: list[list[str]]


class LiveServer:
    """A Triton at ``url`` (HOST:PORT of gRPC). Use it in a ``with`` statement; the first call connects."""

    def __init__(self, url: str) -> None:
        from tritonclient import grpc

        self.url = url.removeprefix("grpc://")
        limits = [(f"grpc.max_{way}_message_length", _MAX_MESSAGE_BYTES) for way in ("send", "receive")]
        self._client = grpc.InferenceServerClient(url=self.url, channel_args=limits)

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def config(self, model: str) -> Mapping[str, Any]:
        """A model's configuration as JSON.

        Raises:
            LiveServerError: nobody answers, or there is no such model.
        """
        from tritonclient.utils import InferenceServerException

        try:
            reply = self._client.get_model_config(model, as_json=True, client_timeout=_CONNECT_TIMEOUT_S)
        except InferenceServerException as error:
            raise self._translated(error) from error
        config: Mapping[str, Any] = reply["config"]
        return config

    def infer(self, model: str, name: str, rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The ``outputs`` of ``model`` for ``rows`` [N, ...] as its input ``name``.

        Raises:
            CheckFailed: the server refused the request or failed.
        """
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException, np_to_triton_dtype

        given = grpc.InferInput(name, list(rows.shape), np_to_triton_dtype(rows.dtype))
        given.set_data_from_numpy(np.ascontiguousarray(rows))
        wanted = [grpc.InferRequestedOutput(output) for output in outputs]
        try:
            result = self._client.infer(model, [given], outputs=wanted, client_timeout=_TIMEOUT_S)
        except InferenceServerException as error:
            raise CheckFailed(str(self._translated(error))) from error
        return [result.as_numpy(output) for output in outputs]

    def _translated(self, error: Any) -> LiveServerError:
        status = str(error.status() or "").rpartition(".")[2]
        message = " ".join((error.message() or str(error)).split())[:300]
        if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"):
            return LiveServerError(
                f"no Triton answers at {self.url} ({message}): start one with clipship serve, or give its HOST:PORT"
            )
        if "unknown model" in message or status == "NOT_FOUND":
            return LiveServerError(
                f"{self.url}: {message}: serve the repository that clipship repository writes from the bundle"
            )
        return LiveServerError(f"{self.url}: the server refused the request ({status or 'no status'}: {message})")


def verify_live(
    bundle: Bundle, url: str, samples: Sequence[VerificationSamples], *, precision: str, batch_sizes: Sequence[int]
) -> Verification:
    """The Triton at ``url`` against ``bundle``: features of pixels, classes of pixels, classes of image files.

    Args:
        precision: what the server's encoder computes in; chooses the tolerance.
        batch_sizes: those above the server's own limit are left out, the limit takes their place.

    Raises:
        LiveServerError: nobody answers there, or not with our models.
        CheckFailed: the server serves another bundle or vocabulary.
    """
    with LiveServer(url) as server:
        _validate_bundle(server, bundle)
        largest = int(server.config(EMBED).get("max_batch_size", 1))
        sizes = tuple(sorted({min(size, largest) for size in batch_sizes}))
        total = _verify_features(server, bundle, samples, precision, sizes)
        answers = tuple(
            answer
            for one in samples
            for model in (CLASSIFY, CLASSIFY_ENCODED)
            for answer in _verify_answers(server, model, bundle, one, precision, sizes)
        )
    return total + Verification((), answers=answers)


def _parameter(config: Mapping[str, Any], name: str) -> str | None:
    value: str | None = config.get("parameters", {}).get(name, {}).get("string_value")
    return value


def _validate_bundle(server: LiveServer, bundle: Bundle) -> None:
    given = _parameter(server.config(EMBED), _BUNDLE_DIGEST)
    if given != bundle.digest:
        raise CheckFailed(
            f"{server.url} serves bundle {(given or 'no digest')[:16]}, not {bundle.path} ({bundle.digest[:16]}): "
            "give the bundle it was started with"
        )
    words = _parameter(server.config(CLASSIFIER), _VOCABULARY_DIGEST)
    if words != bundle.vocabulary.digest:
        raise CheckFailed(
            f"{server.url} classifies with vocabulary {(words or 'without a digest')[:16]}, the bundle has "
            f"{bundle.vocabulary.digest[:16]}: give the bundle whose vocabulary was published last"
        )


def _verify_features(
    server: LiveServer, bundle: Bundle, samples: Sequence[VerificationSamples], precision: str, sizes: Sequence[int]
) -> Verification:
    image, embedding = (
        tensors.image_tensor(bundle.image_spec.size_px).name,
        tensors.embedding_tensor(bundle.manifest.embed_dim).name,
    )

    def embed(pixels: NDArray[Any]) -> NDArray[np.float32]:
        (given,) = server.infer(EMBED, image, pixels, [embedding])
        return given

    runner = Runner(name=f"Triton {server.url}", run=embed)
    return verify_samples(runner, EMBED, samples, bundle.vocabulary_features(), precision, sizes)


def _verify_answers(
    server: LiveServer, model: str, bundle: Bundle, samples: VerificationSamples, precision: str, sizes: Sequence[int]
) -> Iterator[Answers]:
    expected = bundle.vocabulary_features().probabilities(samples.expected)
    for size in sizes:
        blank = Answers(
            what=samples.what,
            model=model,
            provider=f"Triton {server.url}",
            batch_size=size,
            count=len(samples.pixels),
            tolerance=TOLERANCES[precision],
        )
        try:
            given = _answered(server, model, bundle, samples, size)
        except CheckFailed as error:
            yield replace(blank, problem=str(error))
        else:
            yield compare_answers(blank, expected, bundle.vocabulary.names, given.scores, given.indices, given.labels)


def _answered(server: LiveServer, model: str, bundle: Bundle, samples: VerificationSamples, size: int) -> _Answered:
    names = [tensors.scores_tensor(1).name, tensors.indices_tensor(1).name, tensors.labels_tensor(1).name]
    given, rows = tensors.image_tensor(bundle.image_spec.size_px).name, samples.pixels
    if model == CLASSIFY_ENCODED:
        given, rows, names = ENCODED.name, _as_elements(samples.files), [*names, ERROR.name]
    parts = [server.infer(model, given, rows[start : start + size], names) for start in range(0, len(rows), size)]
    scores, indices, labels, *errors = (np.concatenate(column) for column in zip(*parts, strict=True))
    if errors:
        _validate_decoded(errors[0], samples.names)
    return _Answered(scores, indices, [[one.decode() for one in row] for row in labels.tolist()])


def _as_elements(files: Sequence[bytes]) -> NDArray[Any]:
    """[N, 1] of bytes objects (NumPy's own bytes type would cut trailing zeros)."""
    elements = np.empty((len(files), 1), dtype=object)
    elements[:, 0] = files
    return elements


def _validate_decoded(errors: NDArray[Any], names: Sequence[str]) -> None:
    for name, error in zip(names, errors.reshape(-1).tolist(), strict=True):
        if error:
            raise CheckFailed(f"the server cannot decode {name}: {error.decode()}")
