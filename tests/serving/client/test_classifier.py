from __future__ import annotations

import io
import os
import random
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images.decoding import Resample, pixels_from_bytes
from clipship.core.images.inputs import ImageLike
from clipship.serving import Canary, Classifier, Result, Retry
from clipship.serving.client import inputs as loading
from clipship.serving.client import scheduler
from clipship.serving.client.inputs import Loader
from clipship.serving.client.request_batch import Window
from clipship.serving.client.settings import ClientSettings
from clipship.serving.errors import (
    AccessDenied,
    BadAnswer,
    DeadlineExceeded,
    ModelsMissing,
    RequestFailed,
    RequestRejected,
    ServerOverloaded,
    ServerUnreachable,
    ServingError,
)
from clipship.serving.transport.base import Tensors
from clipship.serving.transport.grpc import serving_error
from tests.serving.bundles import EMBED_DIM, SPEC, jpeg_bytes
from tests.serving.fake_server import FakeTransport, answer, configs, fake, flat, grey


def test_metadata_comes_from_the_server() -> None:
    metadata = Classifier(fake()).metadata
    assert metadata.image_spec == SPEC
    assert (metadata.bundle_digest, metadata.vocabulary_digest) == ("b" * 64, "v" * 64)
    assert (metadata.max_batch_size, metadata.top_k) == (4, 2)


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
    assert 4 < taken <= 2 * 4 + 4 + 2, "the window, one batch being loaded, and one image a worker and spare"
    results.close()  # type: ignore[attr-defined]


def test_large_files_are_held_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(jpeg_bytes(0))
    monkeypatch.setattr(scheduler, "MAX_REQUEST_BYTES", size)
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield jpeg_bytes(0)

    results = Classifier(fake(), decode="server", window=20, workers=1).classify_iter(endless())
    next(results)
    assert 1 <= taken <= 20 + 1 + 4 + 2, "as many bytes as the window's requests, and what is being loaded"
    results.close()  # type: ignore[attr-defined]


def test_a_slow_image_in_front_is_waited_for_in_peace(tmp_path: Path) -> None:
    """Not by asking again and again whether it is there."""
    advanced = 0

    class Counted(scheduler.RequestScheduler):
        def advance(self, *, flush: bool = False) -> list[Result]:
            nonlocal advanced
            advanced += 1
            return super().advance(flush=flush)

    class Slow(Image.Image):
        def load(self) -> Any:
            time.sleep(0.3)
            return super().load()

    slow = Slow()
    slow.__dict__.update(Image.fromarray(flat(7)).__dict__)
    with pytest.MonkeyPatch.context() as patch, Classifier(fake(), workers=2) as classifier:
        patch.setattr("clipship.serving.client.classifier.RequestScheduler", Counted)
        results = classifier.classify([slow, *(jpeg_bytes(seed) for seed in range(3))])
    assert grey(results[0]) == 7
    assert advanced < 50


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    with Classifier(fake()) as classifier:
        classifier.classify([jpeg_bytes(1)] * 9)
        assert [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("clipship-load")]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("clipship")]


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
    monkeypatch.setattr(scheduler, "MAX_REQUEST_BYTES", int(2.5 * size))
    monkeypatch.setattr(loading, "MAX_IMAGE_BYTES", 4 * size)
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

    transport = fake(flaky)
    with Classifier(transport, window=1, retry=Retry(first_pause_s=0.01)) as classifier:
        assert [grey(result) for result in classifier.classify(flat(value) for value in range(8))] == list(range(8))
    assert len(transport.requests) == 5
    assert transport.request_ids[0] == transport.request_ids[2] != transport.request_ids[4]


def test_a_pause_passes_before_the_next_attempt() -> None:
    times_s: list[float] = []

    def busy_at_first(model: str, inputs: Tensors) -> Tensors:
        times_s.append(time.monotonic())
        if len(times_s) < 3:
            raise ServerOverloaded("busy")
        return answer(model, inputs)

    Classifier(fake(busy_at_first), retry=Retry(first_pause_s=0.1)).classify([flat(0)])
    assert times_s[1] - times_s[0] >= 0.05
    assert times_s[2] - times_s[1] >= 0.1


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
    with pytest.raises(ModelsMissing, match="no models"):
        Classifier(FakeTransport(answer, {}))


def test_a_server_that_keeps_its_list_to_itself() -> None:
    class Secretive(FakeTransport):
        def model_names(self) -> list[str]:
            raise AccessDenied("This protocol is restricted")

    with pytest.raises(ModelsMissing, match=r"does not serve clipship's models; its model list is restricted"):
        Classifier(Secretive(answer, {}))


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
    """As gRPC raises it."""

    def __init__(self, status: str | None, message: str) -> None:
        self._status, self._message = status, message

    def code(self) -> grpc.StatusCode | None:
        return grpc.StatusCode[self._status] if self._status else None

    def details(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", ServerUnreachable),
        ("UNAVAILABLE", "Exceeds maximum queue size", ServerOverloaded),
        ("UNAVAILABLE", "Request timeout expired", ServerOverloaded),
        ("UNAVAILABLE", "Request for unknown model: 'x' is not found", ModelsMissing),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", ModelsMissing),
        ("UNAVAILABLE", "Request for unknown model: 'x' has no available versions", ServerUnreachable),
        ("CANCELLED", "CANCELLED", ServerUnreachable),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded),
        ("INVALID_ARGUMENT", "unexpected shape", RequestRejected),
        ("INTERNAL", "boom", RequestFailed),
        ("UNAUTHENTICATED", "no token", AccessDenied),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", AccessDenied),
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


# --- what the server refuses ------------------------------------------------------------------------------------------


def refusing(value: int, error: type[ServingError] = RequestRejected) -> Any:
    """A server that refuses every request with an image of one grey in it."""

    def function(model: str, inputs: Tensors) -> Tensors:
        if value in inputs["image"][:, 0, 0, 0]:
            raise error("no such grey")
        return answer(model, inputs)

    return function


@pytest.mark.parametrize("error", [RequestRejected, RequestFailed, BadAnswer])
def test_an_image_that_is_refused_does_not_take_its_neighbours_with_it(error: type[ServingError]) -> None:
    with Classifier(fake(refusing(5, error)), retry=Retry(first_pause_s=0.01)) as classifier:
        results = classifier.classify(flat(value) for value in range(11))
    assert [grey(result) for position, result in enumerate(results) if position != 5] == [*range(5), *range(6, 11)]
    assert "no such grey" in (results[5].error or "")


def test_a_server_that_refuses_everything_is_an_error_soon() -> None:
    def refuse(model: str, inputs: Tensors) -> Tensors:
        raise RequestRejected("closed for today")

    transport = fake(refuse)
    with pytest.raises(RequestRejected, match=r"closed for today \[request [0-9a-f]{12}-\d"):
        Classifier(transport).classify(flat(value) for value in range(100))
    assert len(transport.requests) < 40


def test_a_server_that_begins_to_refuse_everything_is_an_error_too() -> None:
    def tired(model: str, inputs: Tensors) -> Tensors:
        if len(transport.requests) > 3:
            raise RequestRejected("out of order")
        return answer(model, inputs)

    transport = fake(tired)
    results = Classifier(transport, window=1).classify_iter(flat(value % 256) for value in range(1000))
    taken: list[Result] = []
    with pytest.raises(RequestRejected, match="out of order"):
        taken.extend(results)
    assert [grey(result) for result in taken[:12]] == list(range(12))
    assert len(taken) < 60


def test_every_second_request_fails_and_every_image_has_its_answer() -> None:
    def moody(model: str, inputs: Tensors) -> Tensors:
        if len(transport.requests) % 2:
            raise RequestFailed("try again")
        return answer(model, inputs)

    transport = fake(moody)
    with Classifier(transport, window=1, retry=Retry(first_pause_s=0.001)) as classifier:
        results = classifier.classify(flat(value) for value in range(50))
    assert [grey(result) for result in results] == list(range(50))


def broken(**changes: Any) -> Any:
    """A server whose answer has ``changes``."""

    def function(model: str, inputs: Tensors) -> Tensors:
        outputs = {**answer(model, inputs), **changes}
        return {name: array for name, array in outputs.items() if array is not None}

    return function


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": None},
        {"scores": np.zeros((3, 2), np.float32)},
        {"scores": np.zeros((4, 3), np.float32)},
        {"scores": np.zeros((4, 0), np.float32)},
        {"scores": np.zeros((4, 2), np.int64)},
        {"scores": np.zeros(4, np.float32)},
        {"indices": np.zeros((4, 2), np.float32)},
        {"labels": np.zeros((4, 2), np.float32)},
        {"labels": np.array([[b"\xff\xfe", b""]] * 4, np.object_)},
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(changes: dict[str, Any]) -> None:
    images = [flat(value) for value in range(4)]
    with (
        Classifier(fake(broken(**changes)), retry=Retry(first_pause_s=0.001)) as classifier,
        pytest.raises(BadAnswer, match="does not fit the request"),
    ):
        classifier.classify(images)


def test_a_score_that_is_no_number_is_that_images_error() -> None:
    scores = np.array([[0.5, 0.5], [np.nan, 0.1], [0.5, 0.5], [0.1, np.inf]], np.float32)
    results = Classifier(fake(broken(scores=scores))).classify(flat(value) for value in range(4))
    assert [result.error is None for result in results] == [True, False, True, False]


# --- the window -------------------------------------------------------------------------------------------------------


def test_the_window_shrinks_to_what_the_server_takes_and_grows_again() -> None:
    lock, flying, refused, room = threading.Lock(), 0, 0, 3

    def crowded(model: str, inputs: Tensors) -> Future[Tensors]:
        nonlocal flying, refused
        future: Future[Tensors] = Future()
        with lock:
            flying += 1
            if flying > room:
                flying -= 1
                refused += 1
                future.set_exception(ServerOverloaded("Exceeds maximum queue size"))
                return future

        def land() -> None:
            nonlocal flying
            with lock:
                flying -= 1
            future.set_result(answer(model, inputs))

        threading.Timer(0.005, land).start()
        return future

    with Classifier(fake(crowded), window=16, retry=Retry(first_pause_s=0.005)) as classifier:
        assert classifier.window == 16
        results = classifier.classify(flat(value % 256) for value in range(1200))
        assert classifier.window < 8
        assert refused < 150, "of 300 requests: the window learns"
        room = 1000
        assert len(classifier.classify(flat(1) for _ in range(1200))) == 1200
        assert classifier.window == 16
    assert [grey(result) for result in results] == [value % 256 for value in range(1200)]


def test_requests_sent_before_a_cut_do_not_cut_again() -> None:
    window = Window(16)
    sent_s = time.monotonic()
    for _ in range(16):
        window.overloaded(sent_s)
    assert window.size == 8
    window.overloaded(time.monotonic())
    assert window.size == 4
    for _ in range(200):
        window.succeeded()
    assert window.size == 16


# --- who decodes ------------------------------------------------------------------------------------------------------


def test_auto_sends_files_to_another_machine_where_they_are_smaller() -> None:
    small, large = jpeg_bytes(0), jpeg_bytes(0, width=300, height=300)
    assert len(small) < 3 * SPEC.size_px**2 < len(large)
    transport = FakeTransport(answer, configs(), on_this_machine=False)
    images: list[ImageLike] = [small, large, flat(3), Image.fromarray(flat(4)), small, b""]
    results = Classifier(transport, decode="auto").classify(images)
    assert sorted(len(next(iter(inputs.values()))) for _, inputs in transport.requests) == [2, 3]
    assert {model for model, _ in transport.requests} == {"classify", "classify_encoded"}
    assert [grey(result) for result in results[2:4]] == [3, 4]
    assert results[0].indices == results[4].indices
    assert results[5].error == "empty file (0 bytes)"


def test_auto_decodes_here_for_a_server_on_this_machine() -> None:
    transport = fake()
    Classifier(transport, decode="auto").classify([jpeg_bytes(0)])
    assert [model for model, _ in transport.requests] == ["classify"]


def test_kinds_that_alternate_still_make_full_requests() -> None:
    transport = FakeTransport(answer, configs(), on_this_machine=False)
    images = [jpeg_bytes(1) if value % 2 else flat(value) for value in range(80)]
    results = Classifier(transport).classify(images)
    assert [grey(results[value]) for value in range(0, 80, 2)] == list(range(0, 80, 2))
    assert {len(next(iter(inputs.values()))) for _, inputs in transport.requests} == {4}


def test_requests_are_full_though_answers_come_in_another_order() -> None:
    chance = random.Random(0)

    def late(model: str, inputs: Tensors) -> Future[Tensors]:
        future: Future[Tensors] = Future()
        threading.Timer(chance.uniform(0, 0.01), lambda: future.set_result(answer(model, inputs))).start()
        return future

    transport = fake(late)
    results = Classifier(transport, window=4).classify(jpeg_bytes(value % 10) for value in range(402))
    assert all(result.error is None for result in results)
    assert [len(inputs["image"]) for _, inputs in transport.requests] == [4] * 100 + [2]


# --- embeddings, vocabularies, canaries ------------------------------------------------------------------------------


def test_embeddings_come_with_the_results_when_asked_for() -> None:
    assert Classifier(fake()).classify([flat(1)])[0].embedding is None
    (result,) = Classifier(fake(), embeddings=True).classify([flat(1)])
    assert result.embedding is not None
    assert result.embedding.shape == (EMBED_DIM,)
    assert result.label == "grey 1"


@pytest.mark.parametrize("decode", ["client", "server"])
def test_embed(decode: Any) -> None:
    embeddings = Classifier(fake(), decode=decode).embed([jpeg_bytes(0), b"", jpeg_bytes(1)])
    vectors = np.asarray(embeddings)
    assert vectors.shape == (3, EMBED_DIM)
    assert vectors.dtype == np.float32
    assert [error is None for error in embeddings.errors] == [True, False, True]
    assert np.isfinite(vectors).all(axis=1).tolist() == [True, False, True]
    assert vectors[0, 0] != vectors[2, 0]


def test_embed_nothing() -> None:
    assert np.asarray(Classifier(fake()).embed([])).shape == (0, EMBED_DIM)


def test_an_older_repository_gives_no_embeddings() -> None:
    older = configs()
    older["classify"]["output"] = [each for each in older["classify"]["output"] if each["name"] != "embedding"]
    with pytest.raises(ModelsMissing, match="gives no embeddings: write its repository again"):
        Classifier(FakeTransport(answer, older), embeddings=True)
    Classifier(FakeTransport(answer, older)).classify([flat(0)])


def test_a_further_vocabulary() -> None:
    transport = FakeTransport(answer, configs("birds"))
    results = Classifier(transport, vocabulary="birds").classify([flat(0), flat(1)])
    assert [result.vocabulary for result in results] == ["birds", "birds"]
    assert [model for model, _ in transport.requests] == ["classify-birds"]
    with pytest.raises(
        ModelsMissing, match=r"not serve the vocabulary 'fish'; it has .*, classifier, classifier-birds"
    ):
        Classifier(transport, vocabulary="fish")


def test_a_canary_answers_its_share_of_the_requests() -> None:
    transport = FakeTransport(answer, configs("next"))
    with Classifier(transport, canary=Canary(vocabulary="next", share=0.25)) as classifier:
        results = classifier.classify(flat(value) for value in range(160))
    assert sum(model == "classify-next" for model, _ in transport.requests) == 10
    assert len(transport.requests) == 40
    assert sum(result.vocabulary == "next" for result in results) == 40
    assert [grey(result) for result in results] == list(range(160))


def test_a_canary_that_is_taken_away_gives_its_requests_back() -> None:
    def withdrawn(model: str, inputs: Tensors) -> Tensors:
        if model == "classify-next":
            raise ModelsMissing("unknown model")
        return answer(model, inputs)

    transport = FakeTransport(withdrawn, configs("next"))
    with Classifier(transport, window=1, canary=Canary(vocabulary="next", share=1.0)) as classifier:
        results = classifier.classify(flat(value) for value in range(12))
    assert [result.vocabulary for result in results] == [None] * 12
    assert [model for model, _ in transport.requests] == ["classify-next", *["classify"] * 3]


def test_a_share_out_of_range() -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        Canary(vocabulary="next", share=5)


def test_refresh_reads_the_metadata_again() -> None:
    transport = fake()
    classifier = Classifier(transport)
    transport.configs = configs(digest="w" * 64)
    assert classifier.metadata.vocabulary_digest == "v" * 64
    assert classifier.refresh().vocabulary_digest == "w" * 64
    assert classifier.metadata.vocabulary_digest == "w" * 64


# --- what is no image, and many of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://a/b.jpg", "https://a/b.jpg", "s3://bucket/b.jpg", "data:image/png;base64,AA"])
@pytest.mark.parametrize("decode", ["client", "server"])
def test_urls_are_refused(url: str, decode: Any) -> None:
    with pytest.raises(UsageError, match="is a URL: fetch it"):
        Classifier(fake(), decode=decode).classify([url])


def test_a_file_whose_name_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data:1.jpg").write_bytes(jpeg_bytes(0))
    assert Classifier(fake()).classify(["data:1.jpg"])[0].error is None


def test_pipes_devices_and_odd_paths_are_errors_of_their_own(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths: list[ImageLike] = [tmp_path / "pipe", "/dev/zero", tmp_path / "loop", "with\0nul.jpg", ""]
    errors = [result.error or "" for result in Classifier(fake()).classify(paths)]
    assert ["not a regular file" in error for error in errors[:2]] == [True, True]
    assert all("cannot be read" in error for error in errors)


@pytest.mark.parametrize("size_px", [SPEC.size_px, 2 * SPEC.size_px])
def test_a_buffer_may_be_used_again_for_the_next_image(size_px: int) -> None:
    def one_buffer() -> Iterator[NDArray[np.uint8]]:
        buffer = np.zeros((size_px, size_px, 3), np.uint8)
        for value in range(100):
            buffer[...] = value
            yield buffer

    assert [grey(result) for result in Classifier(fake()).classify(one_buffer())] == list(range(100))


def test_threads_share_a_client() -> None:
    results: dict[int, list[Result]] = {}
    with Classifier(fake(), window=2) as classifier:

        def work(thread: int) -> None:
            results[thread] = classifier.classify(flat((thread + value) % 256) for value in range(200))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(16):
        assert [grey(result) for result in results[number]] == [(number + value) % 256 for value in range(200)]


def test_ten_thousand_images_with_few_alive() -> None:
    class Tracked(np.ndarray[Any, Any]):
        pass

    alive = most = 0

    def born() -> Iterator[NDArray[np.uint8]]:
        nonlocal alive, most
        for value in range(10_000):
            image = flat(value % 256).view(Tracked)
            weakref.finalize(image, died)
            alive += 1
            most = max(most, alive)
            yield image

    def died() -> None:
        nonlocal alive
        alive -= 1

    transport = fake()
    done = 0
    for done, result in enumerate(Classifier(transport, window=3, workers=2).classify_iter(born()), start=1):
        assert grey(result) == (done - 1) % 256
        transport.requests.clear()
    assert done == 10_000
    assert most <= 3 * 4 + 4 + 2 * 2 + 2


def test_a_closed_client_says_so() -> None:
    with Classifier(fake()) as classifier:
        pass
    classifier.close()
    with pytest.raises(ServingError, match="the client is closed"):
        classifier.classify([jpeg_bytes(0)])


def test_leaving_a_stream_cancels_what_is_in_flight() -> None:
    flying: list[Future[Tensors]] = []

    def first_only(model: str, inputs: Tensors) -> Future[Tensors]:
        flying.append(Future())
        if len(flying) == 3:
            flying[0].set_result(answer(model, transport.requests[0][1]))
        return flying[-1]

    transport = fake(first_only)
    stream = Classifier(transport, window=3).classify_iter(flat(1) for _ in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [future.cancelled() for future in flying] == [False, *[True] * (len(flying) - 1)]
    assert len(flying) >= 3


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_way_to_resize_reaches_the_pixels(mode: Resample) -> None:
    """What is sent is what the mode makes of the file, and an unknown mode is refused."""
    image = jpeg_bytes(3, width=301, height=203)
    with pytest.raises(UsageError, match="resample is 'sharp': give exact or fast"):
        ClientSettings(resample="sharp")  # type: ignore[arg-type]
    loaded = Loader(spec=SPEC, decode="client", on_this_machine=True, resample=mode).load(image)
    np.testing.assert_array_equal(np.asarray(loaded), pixels_from_bytes(image, SPEC, mode))
