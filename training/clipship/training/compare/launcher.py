"""One process or many, as ``torchrun`` and ``accelerate launch`` start them: each takes every N-th run.

Nothing is sent between the processes. Each keeps a file in ``OUT/ranks`` whose content changes every few seconds while
it lives and which it holds locked; the first waits for the results of the others, as long as their files change.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.progress import log, progress
from clipship.training.compare.grid import GridRun
from clipship.training.compare.results import RunResult, failure_path, read_result, result_path

RANKS = "ranks"
BEAT_S = 2.0
PATIENCE_S = 120.0
"""A process whose file has not changed for so long is taken for dead; importing PyTorch may block it for a while."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of how many processes this one is."""

    number: int = 0
    count: int = 1
    local: int = 0
    """Which of those on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the report."""
        return self.number == 0

    def share(self, runs: Sequence[GridRun]) -> Sequence[GridRun]:
        """The runs of this process."""
        return runs[self.number :: self.count]

    def device(self, given: str | None) -> str | None:
        """``given``, or this process's GPU where there are several processes and GPUs."""
        if given is not None or self.count == 1:
            return given
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local % gpus}" if gpus > 1 else None


@contextmanager
def rank_of(environment: MutableMapping[str, str]) -> Iterator[Rank]:
    """What the launcher says, hidden from the body: the training loop would share each run among all processes.

    Raises:
        UsageError: variables that are not numbers, or a rank that does not exist.
    """
    given = {name: environment[name] for name in _VARIABLES if name in environment}
    try:
        number, count, local = (int(given.get(name, default)) for name, default in zip(_VARIABLES, "010", strict=False))
    except ValueError:
        number, count, local = -1, 1, 0
    if not 0 <= number < count:
        raise UsageError(f"the environment says {given}: RANK must be 0 to WORLD_SIZE - 1: use torchrun, or unset them")
    for name in given:
        del environment[name]
    try:
        yield Rank(number=number, count=count, local=local)
    finally:
        environment.update(given)


@contextmanager
def alive(out: Path, rank: Rank) -> Iterator[None]:
    """Show the other processes that this one lives, and keep a second comparison out of ``out``.

    Raises:
        UsageError: another process holds the same place.
    """
    path = _beat_path(out, rank.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{out}: another clipship compare works there: wait for it, or give another --out"
            ) from error
        stop = threading.Event()
        beats = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beats.start()
        try:
            yield
        finally:
            stop.set()
            beats.join()


def _beat(path: Path, stop: threading.Event) -> None:
    while True:
        path.write_text(f"{os.getpid()} {time.time()}\n", encoding="utf-8")
        if stop.wait(BEAT_S):
            return


def _beat_path(out: Path, number: int) -> Path:
    return out / RANKS / str(number)


def results_of_others(out: Path, rank: Rank, runs: Sequence[GridRun]) -> list[RunResult]:
    """The results of the runs of the other processes, when they have written them.

    A run of a process that has died has a failed result.
    """
    owners = {index: index % rank.count for index in range(len(runs)) if index % rank.count != rank.number}
    watches = {number: _Watch(_beat_path(out, number)) for number in set(owners.values())}
    found: dict[int, RunResult] = {}
    if owners:
        log(f"waiting for the runs of {len(watches)} other processes")
    with progress("other processes", len(owners)) as report:
        while len(found) < len(owners):
            dead = {number for number, watch in watches.items() if watch.is_dead()}
            for index, number in owners.items():
                if index not in found:
                    result = _ended(runs[index]) or (_lost(runs[index], number) if number in dead else None)
                    found |= {} if result is None else {index: result}
            report(len(found))
            if len(found) < len(owners):
                time.sleep(BEAT_S / 2)
    return list(found.values())


def _ended(run: GridRun) -> RunResult | None:
    path = next((path for path in (result_path(run), failure_path(run)) if path.is_file()), None)
    return None if path is None else read_result(path)


def _lost(run: GridRun, number: int) -> RunResult:
    return RunResult.failed(run, f"process {number} stopped before it ended: start the same command again")


class _Watch:
    """Whether a file still changes, by this process's own clock: those of two machines may differ."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = ""
        self._changed_s = time.monotonic()

    def is_dead(self) -> bool:
        content = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        if content != self._content:
            self._content, self._changed_s = content, time.monotonic()
        return time.monotonic() - self._changed_s > PATIENCE_S
