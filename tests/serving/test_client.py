from __future__ import annotations

import io
import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images import pixels_from_bytes
from clipship.core.pictures import ImageLike
from clipship.serving import client as client_module
from clipship.serving.client import Classifier, Result, Retry
from clipship.serving.errors import (
    DeadlineExceeded,
    ModelsMissing,
    RequestRejected,
    ServerOverloaded,
    ServerUnreachable,
    ServingError,
)
from clipship.serving.repository import Facts, configs_from_facts
from clipship.serving.transport import FakeTransport, Tensors, config_json, serving_error
from tests.serving.bundles import EMBED_DIM, SPEC, jpeg_bytes

FACTS = Facts(
    bundle_digest="b" * 64,
    vocabulary_digest="v" * 64,
    image_spec=SPEC,
    embed_dim=EMBED_DIM,
    top_k=2,
    max_batch_size=4,
)
CONFIGS = {name: config_json(config) for name, config in configs_from_facts(FACTS, "python").items()}


def flat(value: int) -> NDArray[np.uint8]:
    """An image of one grey."""
    return np.full((SPEC.size_px, SPEC.size_px, 3), value, dtype=np.uint8)


def answer(model: str, inputs: Tensors) -> Tensors:
    """A server whose best class of an image is its first pixel's value."""
    if model == "classify_encoded":
        elements = inputs["encoded"][:, 0]
        greys = np.array([int(pixels_from_bytes(data, SPEC)[0, 0, 0]) if data else 0 for data in elements])
        errors = np.array([[b"" if data else b"empty"] for data in elements], dtype=np.object_)
    else:
        greys = inputs["image"][:, 0, 0, 0].astype(np.int64)
    labels = np.array([[f"grey {grey}".encode(), "\N{FOX FACE}".encode()] for grey in greys], dtype=np.object_)
    scores = np.tile(np.array([[0.75, 0.25]], dtype=np.float32), (len(greys), 1))
    outputs = {"scores": scores, "indices": np.stack([greys, greys + 1], axis=1), "labels": labels}
    return {**outputs, "error": errors} if model == "classify_encoded" else outputs


def fake(function: Any = answer) -> FakeTransport:
    return FakeTransport(function, CONFIGS)


def grey(result: Result) -> int:
    assert result.error is None
    return result.indices[0]


def test_facts_come_from_the_server() -> None:
    facts = Classifier(fake()).facts
    assert facts.image_spec == SPEC
    assert (facts.bundle_digest, facts.vocabulary_digest) == ("b" * 64, "v" * 64)
    assert (facts.max_batch_size, facts.top_k) == (4, 2)


def test_a_result_has_names_scores_and_indices() -> None:
    (result,) = Classifier(fake()).classify([flat(7)])
    assert result == Result(labels=("grey 7", "\N{FOX FACE}"), scores=(0.75, 0.25), indices=(7, 8))
    assert (result.label, result.score) == ("grey 7", 0.75)


@pytest.mark.parametrize("decode", ["client", "server"])
def test_every_kind_of_image(decode: Any, tmp_path: Path) -> None:
    encoded = io.BytesIO()
    image = Image.fromarray(flat(9))
    image.save(encoded, "PNG")
    (tmp_path / "image.png").write_bytes(encoded.getvalue())
    path = tmp_path / "image.png"
    results = Classifier(fake(), decode=decode).classify([path, str(path), encoded.getvalue(), image, flat(9)])
    assert [grey(result) for result in results] == [9] * 5


def test_order_is_kept_though_answers_come_in_another() -> None:
    def late(model: str, inputs: Tensors) -> Future[Tensors]:
        future: Future[Tensors] = Future()
        delay_s = 0.06 - 0.015 * (len(transport.requests) % 4)
        threading.Timer(delay_s, lambda: future.set_result(answer(model, inputs))).start()
        return future

    transport = fake(late)
    results = Classifier(transport, window=4).classify(flat(value) for value in range(30))
    assert [grey(result) for result in results] == list(range(30))
    assert [len(inputs["image"]) for _, inputs in transport.requests] == [4] * 7 + [2]


@pytest.mark.parametrize("window", [1, 3])
def test_at_most_window_requests_are_in_flight(window: int) -> None:
    lock = threading.Lock()
    flying = most = 0

    def slow(model: str, inputs: Tensors) -> Future[Tensors]:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        future: Future[Tensors] = Future()

        def land() -> None:
            nonlocal flying
            with lock:
                flying -= 1
            future.set_result(answer(model, inputs))

        threading.Timer(0.02, land).start()
        return future

    Classifier(fake(slow), window=window).classify(flat(value) for value in range(40))
    assert most == window


def test_memory_is_bounded_when_nobody_takes_the_results() -> None:
    taken = 0

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        while True:
            taken += 1
            yield flat(1)

    results = Classifier(fake(), window=2, workers=1).classify_iter(endless())
    next(results)
    assert taken <= 2 * 4 + 4 + 2, "the window, one batch being loaded, and one image a worker and spare"
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipship-load")]


def test_bad_images_are_results_and_neighbours_are_fine(tmp_path: Path) -> None:
    broken = jpeg_bytes(1)[:-300]
    truncated = Image.open(io.BytesIO(broken))
    images: list[ImageLike] = [
        flat(1),
        b"",
        flat(2),
        b"nonsense",
        tmp_path / "gone.jpg",
        tmp_path,
        broken,
        truncated,
        flat(3),
    ]
    results = Classifier(fake()).classify(images)
    assert [grey(results[position]) for position in (0, 2, 8)] == [1, 2, 3]
    errors = [result.error or "" for result in results]
    for position, words in {
        1: "empty file",
        3: "not an image",
        4: "No such file",
        5: "Is a directory",
        6: "truncated",
        7: "truncated",
    }.items():
        assert words.lower() in errors[position].lower()
        assert results[position].label is None
        assert results[position].score is None


def test_a_batch_of_bad_images_only_sends_nothing() -> None:
    transport = fake()
    assert [result.error for result in Classifier(transport).classify([b""] * 9)] == ["empty file (0 bytes)"] * 9
    assert transport.requests == []


def test_no_images_no_requests() -> None:
    transport = fake()
    assert Classifier(transport).classify([]) == []
    assert transport.requests == []


def test_server_side_errors_are_results() -> None:
    results = Classifier(fake(), decode="server").classify([jpeg_bytes(0), b"", jpeg_bytes(1)])
    assert [result.error for result in results] == [None, "empty", None]


def test_requests_of_encoded_images_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(jpeg_bytes(0))
    monkeypatch.setattr(client_module, "MAX_REQUEST_BYTES", int(2.5 * size))
    monkeypatch.setattr(client_module, "MAX_IMAGE_BYTES", 4 * size)
    transport = fake()
    results = Classifier(transport, decode="server").classify([jpeg_bytes(0)] * 5 + [b"x" * (4 * size + 1)])
    assert [len(inputs["encoded"]) for _, inputs in transport.requests] == [2, 2, 1]
    assert (results[5].error or "").startswith("too large to send")


@pytest.mark.parametrize("error", [ServerUnreachable, ServerOverloaded, DeadlineExceeded])
def test_what_may_pass_is_tried_again(error: type[ServingError]) -> None:
    failures = iter([True, True, False, True] + [False] * 9)

    def flaky(model: str, inputs: Tensors) -> Tensors:
        if next(failures):
            raise error("busy")
        return answer(model, inputs)

    pauses: list[float] = []
    classifier = Classifier(fake(flaky), window=1, sleep=pauses.append, retry=Retry(first_pause_s=1.0))
    assert [grey(result) for result in classifier.classify(flat(value) for value in range(8))] == list(range(8))
    assert len(pauses) == 3
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0
    assert 0.5 <= pauses[2] <= 1.0


def test_a_refused_request_is_not_tried_again() -> None:
    def refuse(model: str, inputs: Tensors) -> Tensors:
        raise RequestRejected("no")

    transport = fake(refuse)
    with pytest.raises(RequestRejected):
        Classifier(transport, window=1).classify([flat(0)])
    assert len(transport.requests) == 1


def test_trying_again_ends_at_the_deadline() -> None:
    def gone(model: str, inputs: Tensors) -> Tensors:
        raise ServerUnreachable("gone")

    started_s = time.monotonic()
    with pytest.raises(ServerUnreachable):
        Classifier(fake(gone), retry=Retry(deadline_s=0.3, first_pause_s=0.05)).classify([flat(0)])
    assert time.monotonic() - started_s < 2


def test_pauses_double_up_to_the_longest() -> None:
    retry = Retry(first_pause_s=1.0, longest_pause_s=5.0)
    assert [retry.pause_s(attempt, 1.0) for attempt in (0, 1, 2, 3, 1000)] == [1, 2, 4, 5, 5]
    assert retry.pause_s(0, 0.0) == 0.5


def test_a_server_without_our_models_is_named_with_what_it_has() -> None:
    strangers = FakeTransport(answer, {"resnet50": {}, "bert": {}})
    with pytest.raises(ModelsMissing, match=r"does not serve clipship's models; it has bert, resnet50"):
        Classifier(strangers)
    namesakes = FakeTransport(answer, {"classify": {"max_batch_size": 1}, "classifier": {}})
    with pytest.raises(ModelsMissing, match="it has classifier, classify"):
        Classifier(namesakes)
    with pytest.raises(ModelsMissing, match="no model at all"):
        Classifier(FakeTransport(answer, {}))


@pytest.mark.parametrize(
    "settings", [{"decode": "gpu"}, {"window": 0}, {"timeout_s": 0.0}, {"batch_size": 5}, {"batch_size": 0}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"give|the server takes 1 to 4"):
        Classifier(fake(), **settings)


@pytest.mark.parametrize(
    "image", [3, None, flat(0).astype(np.float32), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)]
)
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(UsageError, match="give"):
        Classifier(fake()).classify([image])


class GrpcError:
    """As ``tritonclient`` raises it."""

    def __init__(self, status: str | None, message: str) -> None:
        self._status, self._message = status, message

    def status(self) -> str | None:
        return self._status

    def message(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses", ServerUnreachable),
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", ServerOverloaded),
        ("StatusCode.UNAVAILABLE", "Request timeout expired", ServerOverloaded),
        ("StatusCode.UNAVAILABLE", "Request for unknown model: 'x' is not found", ModelsMissing),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'x' is not found", ModelsMissing),
        ("StatusCode.UNAVAILABLE", "Request for unknown model: 'x' has no available versions", ServerUnreachable),
        ("StatusCode.CANCELLED", "CANCELLED", ServerUnreachable),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded),
        ("StatusCode.INVALID_ARGUMENT", "unexpected shape", RequestRejected),
        ("StatusCode.INTERNAL", "boom", RequestRejected),
        (None, "Exception serializing request!", RequestRejected),
    ],
)
def test_status_codes_are_translated(status: str | None, message: str, expected: type[ServingError]) -> None:
    error = serving_error(GrpcError(status, message), "host:1")
    assert type(error) is expected
    assert "host:1" in str(error)
    assert os.linesep not in str(error)


def test_decoding_in_threads_leaves_the_process_settings_alone() -> None:
    """Pillow's size limit and the warning filters belong to the whole process."""
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    Classifier(fake(), workers=8).classify([jpeg_bytes(seed, width=300, height=300) for seed in range(100)])
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before
