"""Work that is done ahead in other processes, such as drawing the pictures of the next training steps."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from clipship.training.worker_pool import worker_pool

_T = TypeVar("_T")
_AHEAD = 8


def drawn_ahead(draw: Callable[..., _T], arguments: Iterable[tuple[Any, ...]], *, workers: int) -> Iterator[_T]:
    """Yield `draw(*one)` for each of the arguments, in order; every worker is up to 8 results ahead."""
    with worker_pool(workers) as pool:
        waiting: deque[Future[_T]] = deque()
        for one in arguments:
            waiting.append(pool.submit(draw, *one))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
