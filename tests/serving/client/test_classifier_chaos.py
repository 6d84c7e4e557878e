"""Servers killed and broken at random moments while a client streams: every image has its answer, once, in order."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving import Classifier, Connection, Result, Retry
from clipship.serving.server.process import Server, start_server
from tests.serving.bundles import SPEC, image_encoder_model, jpeg_bytes, reference_answers
from tests.serving.fake_server import flat, grey
from tests.serving.grpc_servers import Relay, Triton, good_answer, serving

pytestmark = pytest.mark.chaos

KILLS = 20
QUICK = Retry(deadline_s=120.0, first_pause_s=0.02, longest_pause_s=0.5)


class Images:
    """Photographs for as long as they are wanted, and what a server must answer."""

    def __init__(self) -> None:
        self._pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed), SPEC) for seed in range(50)])
        _, _, indices = reference_answers(self._pixels, image_encoder_model(), 5)
        self._indices = [tuple(row) for row in indices.tolist()]
        self.enough = threading.Event()

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for position in itertools.count():
            if self.enough.is_set():
                return
            yield self._pixels[position % len(self._pixels)]

    def are_right(self, results: list[Result]) -> bool:
        return [result.indices for result in results] == [
            self._indices[position % len(self._indices)] for position in range(len(results))
        ]


def kill(server: Server) -> None:
    """kill -9, for Triton and its guard."""
    os.kill(server._process.pid, signal.SIGKILL)
    server.wait()
    server.stop()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shared_memory", [False, True])
def test_the_server_is_killed_and_started_again(repository: Path, shared_memory: bool) -> None:
    images, chance, results = Images(), random.Random(0), list[Result]()
    server = start_server(repository)
    port = server.endpoints.grpc_port
    connection = Connection(urls=(server.endpoints.url,), shared_memory=shared_memory)
    with Classifier(connection, retry=QUICK) as classifier:
        stream = threading.Thread(target=lambda: results.extend(classifier.classify_iter(images)))
        stream.start()
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.05, 1.0))
            kill(server)
            server = start_server(repository, grpc_port=port)
        answered = len(results)
        deadline_s = time.monotonic() + 60
        while len(results) < answered + 200 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        images.enough.set()
        stream.join(timeout=60)
        assert not stream.is_alive()
    server.stop()
    assert len(results) >= answered + 200
    assert images.are_right(results)


@pytest.mark.timeout(1800)
def test_of_two_servers_one_is_always_being_killed(repository: Path) -> None:
    images, chance, results = Images(), random.Random(1), list[Result]()
    servers = [start_server(repository) for _ in range(2)]
    ports = [server.endpoints.grpc_port for server in servers]
    urls = tuple(server.endpoints.url for server in servers)
    with Classifier(Connection(urls=urls), retry=QUICK) as classifier:
        stream = threading.Thread(target=lambda: results.extend(classifier.classify_iter(images)))
        stream.start()
        for kills in range(KILLS):
            time.sleep(chance.uniform(0.05, 1.0))
            which = kills % 2
            kill(servers[which])
            answered, deadline_s = len(results), time.monotonic() + 30
            while len(results) < answered + 50:
                assert time.monotonic() < deadline_s, "the other one answers"
                time.sleep(0.02)
            servers[which] = start_server(repository, grpc_port=ports[which])
        images.enough.set()
        stream.join(timeout=60)
        assert not stream.is_alive()
    for server in servers:
        server.stop()
    assert images.are_right(results)


class Moody:
    """Whatever a server can do wrong, at random, in a third of the requests."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            mood = self._chance.randrange(18)
        if mood == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        if mood == 1:
            context.abort(grpc.StatusCode.INTERNAL, "boom")
        if mood == 2:
            context.abort(grpc.StatusCode.CANCELLED, "shutting down")
        if mood == 3:
            return service_pb2.ModelInferResponse()
        if mood == 4:
            time.sleep(0.7)
        message = good_answer(request, context)
        if mood == 5:
            message.raw_output_contents[0] = message.raw_output_contents[0][:-1]
        return message


@pytest.mark.timeout(900)
def test_twenty_thousand_images_and_servers_that_do_everything_wrong() -> None:
    count, cut = 20_000, random.Random(5)
    with ExitStack() as stack:
        moody = [stack.enter_context(serving(Triton(Moody(seed)))) for seed in range(3)]
        relays = [stack.enter_context(Relay(url)) for url in moody]
        connection = Connection(urls=tuple(relay.url for relay in relays))
        retry = Retry(deadline_s=120.0, first_pause_s=0.005, longest_pause_s=0.1)
        classifier = stack.enter_context(Classifier(connection, retry=retry, timeout_s=0.5, window=8))
        done = 0
        for done, result in enumerate(classifier.classify_iter(flat(value % 256) for value in range(count)), start=1):
            assert grey(result) == (done - 1) % 256
            if cut.random() < 0.002:
                cut.choice(relays).cut()
    assert done == count
