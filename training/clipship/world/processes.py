"""Distributed that draw pictures, and end when the process that started them does."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process


def drawing_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes, to be used in a `with` statement.

    They are spawned, because forking a process in which torch already runs threads can deadlock.
    """
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    # A killed parent cannot tell its workers to stop, and they would wait for work for ever.
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
