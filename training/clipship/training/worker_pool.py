"""Pools of worker processes that never outlive the process that started them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


@contextmanager
def worker_pool(
    processes: int, initializer: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with the ``with`` block: after their work, or at once if it raises.

    They are spawned: forking a process in which PyTorch runs threads can deadlock. Ctrl-C reaches the parent only.

    Args:
        processes: how many, at most.
        initializer: called in each of them, with ``arguments``, before its first work.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    given = (theirs, initializer, arguments)
    with ours, theirs, ProcessPoolExecutor(processes, context, initializer=_start, initargs=given) as pool:
        try:
            yield pool
        except BaseException:
            ours.close()
            raise


def _start(parent: Connection, initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with(parent: Connection) -> None:
    parent.poll(None)  # readable when the other end is closed: by the parent, or by the kernel if it was killed
    os._exit(1)
