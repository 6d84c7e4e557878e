"""Validates a Triton that was just started against the golden samples of its repository.

The samples go through the models that will serve, whatever their backend, over HTTP on this machine: gRPC may need a
certificate that only clients have.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import CheckFailed
from clipship.core.machine.processor import this_processor
from clipship.core.progress import log
from clipship.core.tensors import ENCODED, ERROR, embedding_tensor, image_tensor
from clipship.core.tolerances import advice, golden_problem, pixels_problem
from clipship.serving.errors import ServerFailed
from clipship.serving.model_names import (
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    EMBED,
    ENCODER,
    PRECISION,
    PREPROCESS,
    RUNTIME,
    of_vocabulary,
)
from clipship.serving.repository.backends import BACKENDS
from clipship.serving.repository.config_pbtxt import read_config
from clipship.serving.repository.golden_check import Answers, in_batches, validate_answers, validate_classifier_model
from clipship.serving.repository.golden_samples import GoldenSamples, read_samples, read_truth
from clipship.serving.repository.versions import ClassifierVersions, vocabularies_in

_BUILD_AGAIN = "build the plan again on this machine with clipship engine, or from a variant of a higher precision"
REQUEST_ID = "self-check"
"""The id of its requests, in Triton's logs and traces."""

_HEADER_LENGTH = "Inference-Header-Content-Length"


class HttpModels:
    """Inference over HTTP by the KServe protocol, version 2, with Triton's binary tensors."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s

    def version(self) -> str:
        """Triton's version."""
        return str(json.loads(self._call("GET", "/v2")[1])["version"])

    def answers(self, model: str, name: str, rows: NDArray[Any], outputs: Sequence[str]) -> Answers:
        """The ``outputs`` of ``model`` for ``rows`` [N, ...] of its one input ``name``, in batches that it takes.

        Raises:
            ServerFailed: it did not answer, or with an error.
        """
        largest = int(json.loads(self._call("GET", f"/v2/models/{model}/config")[1])["max_batch_size"])
        return in_batches(lambda batch: self._infer(model, name, batch, outputs), rows, largest)

    def _infer(self, model: str, name: str, rows: NDArray[Any], outputs: Sequence[str]) -> Answers:
        from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

        kind = np_to_triton_dtype(rows.dtype)
        data = serialize_byte_tensor(rows).item() if kind == "BYTES" else np.ascontiguousarray(rows).tobytes()
        given = {"name": name, "shape": rows.shape, "datatype": kind, "parameters": {"binary_data_size": len(data)}}
        wanted = [{"name": output, "parameters": {"binary_data": True}} for output in outputs]
        header = json.dumps({"id": REQUEST_ID, "inputs": [given], "outputs": wanted}).encode()
        length, body = self._call("POST", f"/v2/models/{model}/infer", header + data, {_HEADER_LENGTH: len(header)})
        described, at, answers = json.loads(body[:length])["outputs"], length or 0, {}
        for tensor in described:
            size = tensor["parameters"]["binary_data_size"]
            answers[tensor["name"]] = _array(tensor, body[at : at + size])
            at += size
        return answers

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, Any] | None = None
    ) -> tuple[int | None, bytes]:
        """The length of the response's JSON part, if binary tensors follow, and the response."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answer, length = response.read(), response.headers.get(_HEADER_LENGTH)
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"Triton does not answer {path} on this machine ({error})") from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ServerFailed(f"Triton answers {path} with {response.status}: {answer.decode('utf-8', 'replace')}")
        return None if length is None else int(length), answer


def _array(tensor: dict[str, Any], data: bytes) -> NDArray[Any]:
    from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

    if tensor["datatype"] == "BYTES":
        array: NDArray[Any] = deserialize_bytes_tensor(data)
    else:
        array = np.frombuffer(data, triton_to_np_dtype(tensor["datatype"]))
    return array.reshape(tensor["shape"])


def validate_server(repository: Path, host: str, http_port: int, *, timeout_s: float) -> None:
    """Validate that the Triton that serves ``repository`` answers its golden samples within tolerance.

    A repository written before 0.6 has none; then a line is logged. Each request may take ``timeout_s`` seconds.

    Raises:
        CheckFailed: it does not; names the model, precision, runtime and processor, and says what to do.
        ServerFailed: it does not answer.
    """
    samples = read_samples(repository)
    if samples is None:
        log(f"{repository} has no golden samples, so its answers were not checked: write it with clipship repository")
        return
    models = HttpModels(host, http_port, timeout_s)
    with _explained(
        f"{repository / PREPROCESS} by Pillow in Triton's Python", "install the Pillow that packed the bundle"
    ):
        decoded = _validate_decoder(models, samples)
    config = read_config(repository / ENCODER)
    precision = config.parameters[PRECISION].string_value
    about = f"{repository / ENCODER} ({precision}) by {_who(config, models.version())}"
    with _explained(about, _BUILD_AGAIN if BACKENDS[config.backend].takes_plans else advice(precision)):
        _validate_encoder(models, samples, precision)
        of_files = _features_of_files(models, samples, decoded)
        for vocabulary in (None, *vocabularies_in(repository)):
            _validate_vocabulary(models, repository, vocabulary, samples, of_files, precision)


@contextmanager
def _explained(who: str, what_to_do: str) -> Iterator[None]:
    """In the block, failed checks get a subject and advice, unless they have them already."""
    try:
        yield
    except _Explained:
        raise
    except CheckFailed as error:
        raise _Explained(f"{who} answers wrongly: {error}: {what_to_do}") from error


class _Explained(CheckFailed):
    """A failed check with its subject and advice."""


def _validate_encoder(models: HttpModels, samples: GoldenSamples, precision: str) -> None:
    """All golden images at once; a single one goes through each vocabulary's ensemble."""
    image, embedding = image_tensor(1).name, embedding_tensor(1).name
    given = models.answers(EMBED, image, samples.pixels, [embedding])[embedding]
    problem = golden_problem(samples.embedding, given, precision)
    if problem:
        raise CheckFailed(f"{EMBED}: {problem}")


def _features_of_files(models: HttpModels, samples: GoldenSamples, decoded: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The expected features of the golden files.

    If the decoder rounds pixels differently, they are the encoder's own: float32's tolerance is tighter than that."""
    if np.array_equal(decoded, samples.pixels[: len(decoded)]):
        return samples.embedding
    expected, embedding = samples.embedding.copy(), embedding_tensor(1).name
    expected[: len(decoded)] = models.answers(EMBED, image_tensor(1).name, decoded, [embedding])[embedding]
    return expected


def _validate_decoder(models: HttpModels, samples: GoldenSamples) -> NDArray[np.uint8]:
    """The decoded golden files."""
    image = image_tensor(1).name
    answers = models.answers(PREPROCESS, ENCODED.name, samples.files, [image, ERROR.name])
    errors = [error.decode() for error in answers[ERROR.name].ravel() if error]
    problem = errors[0] if errors else pixels_problem(samples.pixels[: len(samples.files)], answers[image])
    if problem:
        raise CheckFailed(f"{PREPROCESS}: {problem}")
    pixels: NDArray[np.uint8] = answers[image]
    return pixels


def _validate_vocabulary(
    models: HttpModels,
    repository: Path,
    vocabulary: str | None,
    samples: GoldenSamples,
    of_files: NDArray[np.float32],
    precision: str,
) -> None:
    """The classifier alone, then its ensembles: one image as pixels, and the files."""
    classifier = ClassifierVersions(repository / of_vocabulary(CLASSIFIER, vocabulary))
    truth = read_truth(classifier.folder / str(classifier.active()))
    if truth is None:
        log(f"{classifier.folder} has no golden samples, so its answers were not checked: publish its vocabulary again")
        return
    with _explained(
        f"{classifier.folder} by the {classifier.config().backend} backend", "publish its vocabulary again"
    ):
        validate_classifier_model(models.answers, classifier.name, truth)
    for ensemble, name, rows, expected in (
        (CLASSIFY, image_tensor(1).name, samples.pixels[:1], samples.embedding),
        (CLASSIFY_ENCODED, ENCODED.name, samples.files, of_files),
    ):
        model = of_vocabulary(ensemble, vocabulary)
        validate_answers(models.answers, model, name, rows, expected, truth, precision)


def _who(config: Any, version: str) -> str:
    """The runtime and the processor of the image encoder."""
    own = f" ({config.parameters[RUNTIME].string_value})" if BACKENDS[config.backend].in_python else ""
    return f"the {config.backend} backend{own} of Triton {version} on {_processor(config)}"


def _processor(config: Any) -> str:
    (group,) = config.instance_group
    here = str(this_processor())
    return {group.KIND_GPU: "a GPU", group.KIND_AUTO: f"{here}, or a GPU if Triton sees one"}.get(group.kind, here)
