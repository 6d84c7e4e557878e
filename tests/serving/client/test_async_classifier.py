"""The asyncio client: the blocking one's answers, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from clipship.core.errors import UsageError
from clipship.core.images.inputs import ImageLike
from clipship.serving import Classifier, Result, Retry
from clipship.serving.client.async_classifier import AsyncClassifier
from clipship.serving.errors import ServerOverloaded, ServerUnreachable, ServingError
from clipship.serving.server.process import Server
from clipship.serving.transport.base import Tensors
from tests.serving.bundles import jpeg_bytes
from tests.serving.fake_server import answer, fake, flat, grey
from tests.serving.grpc_servers import Triton, serving


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def slowly(count: int, pause_s: float = 0.0) -> AsyncIterator[NDArray[np.uint8]]:
    for value in range(count):
        await asyncio.sleep(pause_s)
        yield flat(value % 256)


def test_sync_and_async_sources_in_order() -> None:
    async def main() -> None:
        async with AsyncClassifier(fake()) as classifier:
            assert [grey(result) for result in await classifier.classify(map(flat, range(30)))] == list(range(30))
            assert [grey(result) for result in await classifier.classify(slowly(30))] == list(range(30))
            taken = [grey(result) async for result in classifier.classify_iter([flat(3), flat(4)])]
            assert taken == [3, 4]
            assert await classifier.classify([]) == []

    run(main())


def test_errors_and_embeddings_as_the_blocking_client() -> None:
    async def main() -> None:
        async with AsyncClassifier(fake(), embeddings=True) as classifier:
            good, bad = await classifier.classify([flat(1), b""])
            assert good.embedding is not None
            assert bad.error == "empty file (0 bytes)"
            embeddings = await classifier.embed([flat(7), b"", flat(9)])
            assert np.asarray(embeddings)[[0, 2], 0].tolist() == [7, 9]
            assert embeddings.errors[1] is not None
            with pytest.raises(UsageError, match="is a URL"):
                await classifier.classify(["https://a/b.jpg"])
            metadata = await classifier.refresh()
            assert metadata == classifier.metadata

    run(main())


def test_it_must_be_connected() -> None:
    classifier = AsyncClassifier(fake())
    with pytest.raises(ServingError, match="await connect"):
        _ = classifier.metadata

    async def main() -> None:
        assert (await classifier.connect()).top_k == 2
        await classifier.close()
        with pytest.raises(ServerUnreachable):
            await AsyncClassifier("127.0.0.1:1").connect()

    run(main())


def test_a_busy_server_is_asked_again() -> None:
    attempts = 0

    def busy(model: str, inputs: Tensors) -> Tensors:
        nonlocal attempts
        attempts += 1
        if attempts % 2:
            raise ServerOverloaded("busy")
        return answer(model, inputs)

    async def main() -> None:
        async with AsyncClassifier(fake(busy), retry=Retry(first_pause_s=0.005)) as classifier:
            assert [grey(result) for result in await classifier.classify(slowly(40))] == list(range(40))

    run(main())


def test_a_slow_source_does_not_wait_for_full_requests() -> None:
    async def main() -> None:
        stop = asyncio.Event()

        async def two_and_a_pause() -> AsyncIterator[NDArray[np.uint8]]:
            yield flat(1)
            yield flat(2)
            await stop.wait()
            yield flat(3)

        async with AsyncClassifier(fake()) as classifier:
            stream = classifier.classify_iter(two_and_a_pause())
            assert [grey(await anext(stream)) for _ in range(2)] == [1, 2], "the source is still waiting"
            stop.set()
            assert [grey(result) async for result in stream] == [3]

    run(main())


def test_the_loop_is_free_while_images_are_decoded_and_answered() -> None:
    def late(model: str, inputs: Tensors) -> Future[Tensors]:
        future: Future[Tensors] = Future()
        threading.Timer(0.05, lambda: future.set_result(answer(model, inputs))).start()
        return future

    async def main() -> None:
        beats = 0

        async def heart() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        async with AsyncClassifier(fake(late), window=1) as classifier:
            beating = asyncio.create_task(heart())
            await classifier.classify(map(flat, range(40)))
            beating.cancel()
        assert beats > 50

    run(main())


def test_a_source_that_fails_is_the_callers_error() -> None:
    async def failing() -> AsyncIterator[NDArray[np.uint8]]:
        yield flat(1)
        raise RuntimeError("no more film")

    async def main() -> None:
        async with AsyncClassifier(fake()) as classifier:
            with pytest.raises(RuntimeError, match="no more film"):
                await classifier.classify(failing())
            assert grey((await classifier.classify([flat(2)]))[0]) == 2

    run(main())


def test_many_tasks_share_a_client() -> None:
    async def main() -> None:
        async with AsyncClassifier(fake()) as classifier:
            streams = [classifier.classify([flat(first), flat(first + 1)]) for first in range(100)]
            for first, results in enumerate(await asyncio.gather(*streams)):
                assert [grey(result) for result in results] == [first, first + 1]

    run(main())


def test_cancellation_leaves_nothing_running() -> None:
    """Neither a call at the server, nor a task, nor a thread."""
    arrived, ended = threading.Semaphore(0), threading.Semaphore(0)

    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        over = threading.Event()
        context.add_callback(over.set)
        arrived.release()
        over.wait(30)
        ended.release()
        return service_pb2.ModelInferResponse()

    async def main(url: str) -> None:
        async with AsyncClassifier(url, window=3) as classifier:
            task = asyncio.create_task(classifier.classify(slowly(1000)))
            await asyncio.to_thread(lambda: [arrived.acquire(timeout=20) for _ in range(3)])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(lambda: all(ended.acquire(timeout=20) for _ in range(3)))
            await asyncio.sleep(0)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert {each.get_coro().__qualname__ for each in others} <= set(), others  # type: ignore[union-attr]

    before = set(threading.enumerate())
    with serving(Triton(hang)) as url:
        asyncio.run(main(url))
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("clipship")]
    assert left == []


def test_leaving_a_stream_early() -> None:
    async def main() -> None:
        async with AsyncClassifier(fake()) as classifier:
            stream = classifier.classify_iter(slowly(1000))
            assert grey(await anext(stream)) == 0
            await stream.aclose()

    started_s = time.monotonic()
    run(main())
    assert time.monotonic() - started_s < 30


def test_the_same_answers_as_the_blocking_client_from_a_triton(server: Server, photos: Path) -> None:
    images: list[ImageLike] = [*sorted(photos.rglob("*.jpg")), jpeg_bytes(3), b"", photos / "gone.jpg"]

    async def main() -> list[Result]:
        async with AsyncClassifier(server.endpoints.url, window=2) as classifier:
            return await classifier.classify(images)

    with Classifier(server.endpoints.url) as classifier:
        assert run(main()) == classifier.classify(images)
