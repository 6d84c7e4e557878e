"""Pixels in shared memory, with a real Triton, and with servers that will not have it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving import Classifier, Connection, Retry
from clipship.serving.server.process import Server, start_server
from clipship.serving.transport import shared_memory
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import SPEC, jpeg_bytes
from tests.serving.fake_server import flat, grey
from tests.serving.grpc_servers import Triton, serving
from tests.serving.processes import ENVIRONMENT


def shared(url: str) -> Connection:
    return Connection(urls=(url,), shared_memory=True)


def regions(url: str) -> set[str]:
    """The names of the regions that the server holds."""
    transport = TritonTransport(url)
    names = set(transport.call("SystemSharedMemoryStatus").regions)
    transport.close()
    return names


def files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("clipship-client")}


def photographs(count: int) -> list[Any]:
    return [pixels_from_bytes(jpeg_bytes(seed % 40), SPEC) for seed in range(count)]


def test_answers_are_those_of_messages_and_nothing_is_left(server: Server) -> None:
    images = photographs(100)
    with Classifier(server.endpoints.url) as plain:
        expected = plain.classify(images)
    before = regions(server.endpoints.url)
    with Classifier(shared(server.endpoints.url), window=3, batch_size=7) as classifier:
        assert classifier.classify(images) == expected
        assert classifier.classify(images[:50]) == expected[:50]
        assert 1 <= len(regions(server.endpoints.url) - before) <= 3, "a region for each request in flight"
        assert files() == set(), "a region's name is gone as soon as the server has it"
    assert regions(server.endpoints.url) == before


def test_threads_do_not_share_a_region(server: Server) -> None:
    images = photographs(40)
    with Classifier(server.endpoints.url) as plain:
        expected = plain.classify(images)
    answers: list[Any] = []
    with Classifier(shared(server.endpoints.url), window=4, batch_size=3) as classifier:
        threads = [threading.Thread(target=lambda: answers.append(classifier.classify(images))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [expected] * 6


def test_a_killed_client_leaves_no_file_and_the_next_one_takes_its_regions_back(server: Server) -> None:
    program = (
        "import sys, time, numpy as np\n"
        "from clipship.serving import Classifier, Connection\n"
        "classifier = Classifier(Connection(urls=(sys.argv[1],), shared_memory=True))\n"
        "classifier.classify([np.zeros((32, 32, 3), np.uint8)] * 30)\n"
        "print('classified', flush=True)\n"
        "time.sleep(60)"
    )
    before = regions(server.endpoints.url)
    command = [sys.executable, "-c", program, server.endpoints.url]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "classified\n"
        client.send_signal(signal.SIGKILL)
    assert files() == set()
    assert regions(server.endpoints.url) - before
    with Classifier(shared(server.endpoints.url)) as classifier:
        assert classifier.classify([flat(0)])[0].error is None
    assert regions(server.endpoints.url) == before


def test_a_server_that_was_started_anew_gets_new_regions(repository: Path) -> None:
    with start_server(repository) as first:
        port = first.endpoints.grpc_port
        classifier = Classifier(shared(first.endpoints.url), retry=Retry(first_pause_s=0.02))
        before = classifier.classify(photographs(20))
    with start_server(repository, grpc_port=port) as second:
        assert classifier.classify(photographs(20)) == before
        assert regions(second.endpoints.url)
        classifier.close()
        assert regions(second.endpoints.url) == set()


def test_a_region_that_the_new_server_got_before_the_old_ones_failed_is_taken_back_too(repository: Path) -> None:
    pixels = np.stack(photographs(2))
    with start_server(repository) as first:
        transport = TritonTransport(first.endpoints.url)
        slots = shared_memory.SharedSlots(transport)
        old = slots.lend(pixels)
    with start_server(repository, grpc_port=first.endpoints.grpc_port) as second:
        new = slots.lend(pixels)  # while the request with the old region is on its way
        assert old is not None
        assert new is not None
        assert regions(second.endpoints.url) == {new.name}
        slots.forget([old])
        slots.give_back([new])
        slots.close()
        assert regions(second.endpoints.url) == set()
        transport.close()


def test_a_server_that_refuses_gets_messages(caplog: pytest.LogCaptureFixture) -> None:
    """The small server has no shared memory at all."""
    with caplog.at_level(logging.WARNING), serving(Triton()) as url, Classifier(shared(url)) as classifier:
        assert [grey(result) for result in classifier.classify(map(flat, range(40)))] == list(range(40))
    assert len([record for record in caplog.records if record.name.startswith("clipship")]) == 1
    assert "no shared memory, pixels are sent instead" in caplog.text
    assert files() == set()


def test_a_full_memory_disk_gets_messages(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    monkeypatch.setattr(shared_memory, "_FOLDER", small_disk)
    (small_disk / "ballast").write_bytes(bytes(60 * 1024))
    with caplog.at_level(logging.WARNING), Classifier(shared(server.endpoints.url)) as classifier:
        assert all(result.error is None for result in classifier.classify(photographs(30)))
    assert "No space left" in caplog.text
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_slots_grow_with_their_inputs(server: Server) -> None:
    transport = TritonTransport(server.endpoints.url, shared(server.endpoints.url))
    for count in (1, 8, 3):
        pixels = np.stack(photographs(count))
        outputs = transport.infer("embed", {"image": pixels}, ["embedding"], timeout_s=30).result(timeout=30)
        assert len(outputs["embedding"]) == count
        assert len([name for name in regions(server.endpoints.url) if f".{os.getpid()}." in name]) == 1
    transport.close()
