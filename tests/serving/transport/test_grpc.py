"""The client against real gRPC servers: bad ones, encrypted ones, ones that ask for tokens."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from clipship.core.errors import UsageError
from clipship.serving import Classifier, Connection, Retry
from clipship.serving.errors import (
    AccessDenied,
    BadAnswer,
    DeadlineExceeded,
    RequestRejected,
    ServerUnreachable,
)
from clipship.serving.server.process import Server
from clipship.serving.transport.grpc import _RAW_INPUT_CONTENTS, TritonTransport
from tests.serving.fake_server import answer, flat, grey
from tests.serving.grpc_servers import Relay, Triton, good_answer, inputs_of, message_from, serving

QUICK = Retry(deadline_s=30.0, first_pause_s=0.005, longest_pause_s=0.05)


def numbers(url: str | Connection, count: int = 60, **settings: Any) -> list[int]:
    """The answers for ``count`` greys."""
    with Classifier(url, retry=QUICK, **settings) as classifier:
        return [grey(result) for result in classifier.classify(flat(value) for value in range(count))]


def test_a_good_server() -> None:
    with serving(Triton()) as url:
        assert numbers(url) == list(range(60))


def test_requests_are_what_protobuf_would_write() -> None:
    """The client puts the arrays' bytes behind the message by itself."""
    triton = Triton()
    arrays: dict[str, NDArray[Any]] = {
        "few": np.arange(7, dtype=np.float32),
        "many": np.arange(40_000, dtype=np.uint8).reshape(2, -1)[:, ::2],
        "none": np.zeros((0, 3), np.uint8),
        "text": np.array([[b"a\0b"], [b""], [b"x" * 300]], np.object_),
    }
    with serving(triton) as url:
        transport = TritonTransport(url)
        transport.infer("classify", arrays, ["scores"], timeout_s=10, request_id="x-1").exception(timeout=20)
        transport.close()
    (request,) = triton.requests
    assert (request.model_name, request.id) == ("classify", "x-1")
    received = inputs_of(request)
    assert list(received) == list(arrays)
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype
        np.testing.assert_array_equal(received[name], array)
    numbered = service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
    assert numbered == _RAW_INPUT_CONTENTS


# --- bad servers ------------------------------------------------------------------------------------------------------


def every(nth: int, otherwise: Any) -> Any:
    """A server that does ``otherwise`` at every ``nth`` request."""
    counter = itertools.count(1)

    def infer(request: Any, context: grpc.ServicerContext) -> Any:
        return otherwise(request, context) if next(counter) % nth == 0 else good_answer(request, context)

    return infer


def aborting(status: grpc.StatusCode, message: str) -> Any:
    return lambda request, context: context.abort(status, message)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.CANCELLED, "shutting down"),
        (grpc.StatusCode.INTERNAL, "CUDA out of memory"),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"),
    ],
)
def test_every_second_request_is_refused(status: grpc.StatusCode, message: str) -> None:
    with serving(Triton(every(2, aborting(status, message)))) as url:
        if status is grpc.StatusCode.INVALID_ARGUMENT:  # which no other attempt changes, so some images have errors
            with Classifier(url, retry=QUICK, window=1) as classifier:
                results = classifier.classify(flat(value) for value in range(60))
            right = [grey(result) == position for position, result in enumerate(results) if result.error is None]
            assert len(results) == 60
            assert all(right)
            assert len(right) > 20
        else:
            assert numbers(url) == list(range(60))


def test_a_server_that_hangs_at_times() -> None:
    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)
        return service_pb2.ModelInferResponse()

    with serving(Triton(every(7, hang))) as url:
        assert numbers(url, timeout_s=0.5) == list(range(60))


def test_a_server_that_hangs_for_good_is_an_error_at_the_deadline() -> None:
    released = threading.Event()

    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        released.wait(30)
        return service_pb2.ModelInferResponse()

    retry = Retry(deadline_s=1.0, first_pause_s=0.01)
    with serving(Triton(hang)) as url, Classifier(url, timeout_s=0.3, retry=retry) as classifier:
        with pytest.raises(DeadlineExceeded, match=r"no answer in time.*\[request [0-9a-f]{12}-1, \d attempts\]"):
            classifier.classify([flat(0)])
        released.set()


def without_content(request: Any, context: grpc.ServicerContext) -> Any:
    return service_pb2.ModelInferResponse(model_name="classify")


def cut_short(request: Any, context: grpc.ServicerContext) -> Any:
    message = good_answer(request, context)
    for position, content in enumerate(message.raw_output_contents):
        message.raw_output_contents[position] = content[:-3]
    return message


def of_other_shapes(request: Any, context: grpc.ServicerContext) -> Any:
    outputs = answer(request.model_name, inputs_of(request))
    return message_from({name: np.concatenate([array, array]) for name, array in outputs.items()}, request)


def of_other_types(request: Any, context: grpc.ServicerContext) -> Any:
    outputs = answer(request.model_name, inputs_of(request))
    return message_from({**outputs, "labels": np.zeros_like(outputs["scores"])}, request)


def of_another_k(request: Any, context: grpc.ServicerContext) -> Any:
    outputs = answer(request.model_name, inputs_of(request))
    return message_from({**outputs, "scores": outputs["scores"][:, :1]}, request)


def of_an_unknown_type(request: Any, context: grpc.ServicerContext) -> Any:
    message = good_answer(request, context)
    for output in message.outputs:
        output.datatype = "COMPLEX"
    return message


def noise(request: Any, context: grpc.ServicerContext) -> Any:
    message = good_answer(request, context)
    for position, content in enumerate(message.raw_output_contents):
        message.raw_output_contents[position] = os.urandom(len(content))
    return message


GARBAGE = [without_content, cut_short, of_other_shapes, of_other_types, of_another_k, of_an_unknown_type]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_times_is_asked_again(garbage: Any) -> None:
    with serving(Triton(every(3, garbage))) as url:
        assert numbers(url) == list(range(60))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_always_is_an_error(garbage: Any) -> None:
    with serving(Triton(garbage)) as url, pytest.raises(BadAnswer, match="answer"):
        numbers(url, 8)


def test_noise_ends_in_results_or_in_an_error() -> None:
    with serving(Triton(noise)) as url, Classifier(url, retry=QUICK) as classifier:
        try:
            results = classifier.classify(flat(value) for value in range(20))
        except BadAnswer:
            return
        assert len(results) == 20


def test_connections_that_break_in_mid_stream() -> None:
    """A relay between client and server that is cut off and comes back, under the same address."""
    with serving(Triton()) as url, Relay(url) as relay, Classifier(relay.url, retry=QUICK) as classifier:
        taken = []
        for position, result in enumerate(classifier.classify_iter(flat(value % 256) for value in range(400))):
            taken.append(grey(result))
            if position % 60 == 30:
                relay.cut()
    assert taken == [value % 256 for value in range(400)]


def test_what_listens_is_no_grpc() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        answering = threading.Thread(target=_answer_http, args=(listener,), daemon=True)
        answering.start()
        with pytest.raises(ServerUnreachable, match="no Triton answers at"):
            Classifier(Connection(urls=(url,), connect_timeout_s=1.0))


def _answer_http(listener: socket.socket) -> None:
    try:
        while True:
            near, _ = listener.accept()
            near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            near.close()
    except OSError:
        return


def test_a_closed_client_says_so() -> None:
    with serving(Triton()) as url:
        transport = TritonTransport(url)
        transport.close()
        future = transport.infer("classify", {"image": flat(0)[None]}, ["scores"], timeout_s=5)
        assert isinstance(future.exception(timeout=5), RequestRejected)


def test_cancelling_the_future_cancels_the_call() -> None:
    cancelled = threading.Event()

    def wait(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(cancelled.set)
        cancelled.wait(30)
        return service_pb2.ModelInferResponse()

    triton = Triton(wait)
    with serving(triton) as url:
        transport = TritonTransport(url)
        future = transport.infer("classify", {"image": flat(0)[None]}, ["scores"], timeout_s=30)
        _until(lambda: len(triton.requests) == 1)
        assert future.cancel()
        assert cancelled.wait(10)
        transport.close()


def _until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_messages_have_a_limit_that_can_be_set() -> None:
    with serving(Triton()) as url:
        small = Connection(urls=(url,), max_message_bytes=8_000)
        assert numbers(small, 10) == list(range(10)), "requests of four images are too large, of two are not"
        tiny = Connection(urls=(url,), max_message_bytes=2_000)
        with pytest.raises(RequestRejected, match="larger than max"):
            numbers(tiny, 10)


# --- a real Triton ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("classify", {"image": np.zeros((2, 31, 32, 3), np.uint8)}),
        ("classify", {"image": np.zeros((32, 32, 3), np.uint8)}),
        ("classify", {"image": np.zeros((9, 32, 32, 3), np.uint8)}),
        ("classify", {"image": np.zeros((0, 32, 32, 3), np.uint8)}),
        ("classify", {"image": np.zeros((2, 32, 32, 3), np.float32)}),
        ("classify", {"pixels": np.zeros((2, 32, 32, 3), np.uint8)}),
        ("classify", {}),
        ("classify_encoded", {"encoded": np.array([b"a", b"b"], np.object_)}),
        ("classifier", {"embedding": np.zeros((2, 5), np.float32)}),
    ],
)
def test_what_triton_refuses_and_lives_on(server: Server, model: str, inputs: Any) -> None:
    transport = TritonTransport(server.endpoints.url)
    refusal = transport.infer(model, inputs, ["scores"], timeout_s=30).exception(timeout=60)
    assert isinstance(refusal, RequestRejected)
    assert "\n" not in str(refusal)
    good = transport.infer("classify", {"image": flat(3)[None]}, ["scores"], timeout_s=30).result(timeout=60)
    assert good["scores"].shape == (1, 5)
    transport.close()


def test_a_vector_that_is_no_number_is_answered(server: Server) -> None:
    transport = TritonTransport(server.endpoints.url)
    vectors = {"embedding": np.full((2, 16), np.nan, np.float32)}
    transport.infer("classifier", vectors, ["scores"], timeout_s=30).exception(timeout=60)
    good = transport.infer("classify", {"image": flat(3)[None]}, ["scores"], timeout_s=30).result(timeout=60)
    assert np.isfinite(good["scores"]).all()
    transport.close()


def test_many_threads_share_a_client_of_a_triton(server: Server) -> None:
    images = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8) for seed in range(60)]
    answers: list[Any] = []
    with Classifier(server.endpoints.url, window=2) as classifier:
        expected = classifier.classify(images)
        threads = [threading.Thread(target=lambda: answers.append(classifier.classify(images))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [expected] * 6


# --- what is sent along -----------------------------------------------------------------------------------------------


def test_request_ids_are_one_clients_and_counted() -> None:
    triton = Triton()
    with serving(triton) as url:
        numbers(url, 12, window=1)
    prefixes, counts = zip(*(request.id.rsplit("-", 1) for request in triton.requests), strict=True)
    assert len(set(prefixes)) == 1
    assert counts == ("1", "2", "3")


@pytest.mark.parametrize(("compression", "least", "most"), [("none", 180_000, 300_000), ("gzip", 0, 60_000)])
def test_compression(compression: Any, least: int, most: int) -> None:
    with serving(Triton()) as url, Relay(url) as relay:
        assert numbers(Connection(urls=(relay.url,), compression=compression)) == list(range(60))
        assert least < relay.sent_bytes < most


def test_headers_and_token_go_with_every_call() -> None:
    triton = Triton()
    with serving(triton) as url:
        numbers(Connection(urls=(url,), token="s3cret", headers={"x-team": "birds"}), 8)
    assert len(triton.metadata) >= 4
    for metadata in triton.metadata:
        assert metadata["authorization"] == "Bearer s3cret"
        assert metadata["x-team"] == "birds"


def guarded(tokens: set[str]) -> Any:
    def infer(request: Any, context: grpc.ServicerContext) -> Any:
        told = dict(context.invocation_metadata())
        if told.get("authorization", "").removeprefix("Bearer ") not in tokens:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")
        return good_answer(request, context)

    return infer


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    tokens = {"first"}
    triton = Triton(guarded(tokens))
    with serving(triton) as url, Classifier(Connection(urls=(url,), token_file=file)) as classifier:
        assert grey(classifier.classify([flat(1)])[0]) == 1
        tokens.symmetric_difference_update({"first", "second"})
        file.with_suffix(".new").write_text("second\n")
        file.with_suffix(".new").replace(file)
        assert grey(classifier.classify([flat(2)])[0]) == 2
        file.write_text("not one token\n")
        with pytest.raises(UsageError) as caught:
            classifier.classify([flat(3)])
        assert "not one token" not in str(caught.value)


def test_a_wrong_token_is_one_line_without_the_token() -> None:
    with serving(Triton(guarded({"right"}))) as url:
        with pytest.raises(AccessDenied, match=r"access denied.*give the token") as caught:
            numbers(Connection(urls=(url,), token="wr0ng"), 4)
        assert "wr0ng" not in str(caught.value)


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server called triton.test and for a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority"
    )
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=DNS:triton.test")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return folder


def credentials(folder: Path, *, mutual: bool = False) -> grpc.ServerCredentials:
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    authority = (folder / "ca.pem").read_bytes() if mutual else None
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=mutual)


def test_tls(certificates: Path) -> None:
    with serving(Triton(), credentials=credentials(certificates)) as url:
        connection = Connection(urls=(url,), ca_file=certificates / "ca.pem", server_name="triton.test", token="t")
        assert numbers(connection) == list(range(60))
        stranger = Connection(urls=(f"grpcs://{url}",), server_name="triton.test", connect_timeout_s=2)
        with pytest.raises(AccessDenied, match="TLS handshake failed"):
            Classifier(stranger)
        other_name = Connection(urls=(url,), ca_file=certificates / "ca.pem", connect_timeout_s=2)
        with pytest.raises(AccessDenied, match="check the CA, the server's name"):
            Classifier(other_name)


def test_an_authority_that_this_machine_trusts_needs_no_file(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Triton(), credentials=credentials(certificates)) as url:
        connection = Connection(urls=(url,), tls=True, server_name="triton.test", connect_timeout_s=2)
        with pytest.raises(AccessDenied):
            Classifier(connection)
        monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        assert numbers(connection, 8) == list(range(8))


def test_mutual_tls(certificates: Path) -> None:
    with serving(Triton(), credentials=credentials(certificates, mutual=True)) as url:
        known = Connection(
            urls=(url,),
            ca_file=certificates / "ca.pem",
            certificate_file=certificates / "client.pem",
            key_file=certificates / "client.key",
            server_name="triton.test",
        )
        assert numbers(known) == list(range(60))
        unknown = Connection(
            urls=(url,), ca_file=certificates / "ca.pem", server_name="triton.test", connect_timeout_s=2
        )
        with pytest.raises((ServerUnreachable, AccessDenied)):
            Classifier(unknown)


def test_tls_with_a_server_that_has_none(certificates: Path) -> None:
    with serving(Triton()) as url, pytest.raises(AccessDenied, match="TLS handshake failed"):
        Classifier(Connection(urls=(url,), ca_file=certificates / "ca.pem", connect_timeout_s=2))
