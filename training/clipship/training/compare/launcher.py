"""The place of this process among those that ``torchrun``, ``accelerate launch`` or a scheduler array started.

Process ``RANK`` of ``WORLD_SIZE`` does every ``WORLD_SIZE``-th run. The processes share only the folder of the
comparison and never wait: the one that ends last finds all results there and writes the report.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.files import locked_folder
from clipship.training.compare.grid import RUNS, GridRun

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of how many processes this one is."""

    number: int = 0
    count: int = 1
    local: int = 0
    """Its number among the processes of this machine."""

    def share(self, runs: Sequence[GridRun]) -> Sequence[GridRun]:
        """The runs of this process."""
        return runs[self.number :: self.count]


@contextmanager
def launched_rank(environment: MutableMapping[str, str]) -> Iterator[Rank]:
    """Read the launcher's variables and hide them from the body: the training loop would split each run by them.

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
def alone_in(out: Path, rank: Rank) -> Iterator[None]:
    """Keep a second comparison out of ``out``.

    Raises:
        UsageError: another process works there as the same rank.
    """
    folder = out / RUNS / f".rank-{rank.number}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, "another clipship compare works there: wait for it, or give another --out"):
        yield
