"""Doing the runs: in this process, in several of this machine, or as one of the ranks of a launcher.

The runs are independent, so nothing is shared but files. A run that fails is noted and the others go on.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipship.core.errors import ClipshipError
from clipship.core.progress import log, progress
from clipship.training.compare.grid import FEATURES, GridRun
from clipship.training.compare.results import RunResult, write_result

if TYPE_CHECKING:
    from clipship.training.checkpoint import Checkpoint
    from clipship.training.datasets.base import Dataset
    from clipship.training.methods import Method
    from clipship.training.model.clip import Clip

FAILURES = (ClipshipError, OSError, RuntimeError, ImportError, MemoryError)
"""What ends a run and not the comparison: a bad image, a full disk, a GPU without memory. Our own mistakes are none."""


@dataclass(kw_only=True)
class Worker:
    """Does runs one after the other; the base model and the data sets stay loaded between them."""

    device: str | None = None
    loader_workers: int = 0
    """Distributed that prepare images."""
    _clips: dict[str, Clip] = field(default_factory=dict)
    _datasets: dict[Path, Dataset] = field(default_factory=dict)

    def result_of(self, run: GridRun) -> RunResult:
        """Do ``run``, go on with it or find it done, and write its result; a failure is a result too."""
        try:
            result = self._measured(run)
        except FAILURES as error:
            result = RunResult.failed(run, f"{error}" or type(error).__name__)
        write_result(run, result)
        return result

    def _measured(self, run: GridRun) -> RunResult:
        from clipship.training.checkpoint import method_from_checkpoint, save_scores
        from clipship.training.inputs.synthetic import synthetic_set_for
        from clipship.training.loop.loop import RunOptions, train

        started_s, resumed = time.perf_counter(), run.folder.exists()
        clip = self._clip(run.config.base_model)
        cache = run.folder.parents[2] / FEATURES
        checkpoint = train(
            run.config,
            self._dataset(run.data),
            out=run.folder,
            synthetic=synthetic_set_for(run.config, run.synthetic),
            clip=clip,
            options=RunOptions(resume=True, device=self.device, workers=self.loader_workers, cache=cache),
        )
        method = method_from_checkpoint(checkpoint, clip)
        scores = {}
        for dataset in map(self._dataset, run.targets):
            found = _scores(method, dataset, checkpoint, cache)
            if found is not None:
                scores[dataset.record.name] = found
                save_scores(run.folder, dataset.record.name, found)
        return RunResult.done(
            run,
            scores=scores,
            losses=[dict(one) for one in checkpoint.losses],
            learned_parameters=sum(value.numel() for value in checkpoint.learned.values()),
            seconds=time.perf_counter() - started_s,
            resumed=resumed,
            selection=checkpoint.selection,
            versions=dict(checkpoint.versions),
        )

    def _clip(self, name: str) -> Clip:
        from clipship.training.model.clip import default_device, load_clip

        if name not in self._clips:
            self._clips.clear()  # one model at a time: runs of one model follow each other
            self._clips[name] = load_clip(name).to(self.device or default_device())
        return self._clips[name]

    def _dataset(self, path: Path) -> Dataset:
        from clipship.training.datasets.load import load_dataset

        if path not in self._datasets:
            self._datasets[path] = load_dataset(path)
        return self._datasets[path]


def _scores(method: Method, dataset: Dataset, checkpoint: Checkpoint, cache: Path) -> dict[str, Any] | None:
    """None where the method knows no other classes than those it has seen images of, and the data set has some."""
    from clipship.training.evaluation.evaluate import evaluate

    is_other = dataset.record.name != checkpoint.dataset
    if is_other and method.closed_vocabulary and not set(dataset.class_names) <= set(method.task.base_names):
        return None
    return evaluate(
        method,
        dataset,
        selection=checkpoint.selection,
        trained_on=checkpoint.dataset,
        temperature=checkpoint.temperature,
        cache=cache,
    ).to_json()


def do_runs(runs: Sequence[GridRun], *, jobs: int, device: str | None, loader_workers: int) -> Iterator[RunResult]:
    """The results of ``runs`` as they end, ``jobs`` at the same time, with a line for each.

    One after the other they show bars of their own; several at a time have one together.
    """
    started_s = time.monotonic()
    bar = progress("runs", len(runs)) if jobs > 1 else nullcontext()
    if jobs > 1:
        results = _from_processes(runs, jobs, device, loader_workers)
    else:
        worker = Worker(device=device, loader_workers=loader_workers)
        results = map(worker.result_of, runs)
    with bar as report:
        for done, result in enumerate(results, start=1):
            left_s = (time.monotonic() - started_s) / done * (len(runs) - done)
            left = f", about {left_s / 60:.0f} min left" if left_s >= 60 else ""
            told = f"failed: {result.error}" if result.error else f"{result.seconds:.1f} s"
            log(f"{result.name}: {told} ({done} of {len(runs)}{left})")
            if report is not None:
                report(done, result.name)
            yield result


@dataclass(kw_only=True)
class _Process:
    """A process that does runs, this end of its pipe, and the run it is at."""

    process: BaseProcess
    pipe: Connection
    run: GridRun


def _from_processes(runs: Sequence[GridRun], jobs: int, device: str | None, loader_workers: int) -> Iterator[RunResult]:
    """The results of ``jobs`` processes; one that dies loses its run and no other."""
    waiting = list(runs)
    busy: list[_Process] = []

    def start(number: int) -> None:
        target = _target_device(device, number)
        busy.append(_started(waiting.pop(0), target, loader_workers, jobs))

    for number in range(min(jobs, len(waiting))):
        start(number)
    try:
        while busy:
            ready = connection.wait([one.pipe for one in busy])
            for one in [one for one in busy if one.pipe in ready]:
                result = _received(one)
                if result is None:
                    busy.remove(one)
                    one.process.join()
                    result = RunResult.failed(one.run, f"its process ended with exit code {one.process.exitcode}")
                    write_result(one.run, result)
                    if waiting:
                        start(len(busy))
                elif waiting:
                    one.run = waiting.pop(0)
                    one.pipe.send(one.run)
                else:
                    busy.remove(one)
                    one.pipe.close()
                    one.process.join()
                yield result
    finally:
        for one in busy:
            one.process.terminate()
            one.process.join()


def _target_device(device: str | None, number: int) -> str | None:
    """Several GPUs are taken in turn."""
    if device is not None:
        return device
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{number % gpus}" if gpus > 1 else None


def _started(run: GridRun, device: str | None, loader_workers: int, jobs: int) -> _Process:
    context = get_context("spawn")  # forking a process in which torch runs threads can deadlock
    ours, theirs = context.Pipe()
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    # Not daemonic: those may have no children, and the loader's workers are its children.
    process = context.Process(target=_serve, args=(theirs, device, loader_workers, threads))
    process.start()
    theirs.close()
    ours.send(run)
    return _Process(process=process, pipe=ours, run=run)


def _received(one: _Process) -> RunResult | None:
    """What the process sends, None if it has died."""
    try:
        result: RunResult = one.pipe.recv()
    except (EOFError, ConnectionError):
        return None
    return result


def _serve(pipe: Connection, device: str | None, loader_workers: int, threads: int) -> None:
    """In a process of its own: do the runs that come through ``pipe`` until it is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stderr = _Log(open(2, "wb", closefd=False), write_through=True)  # noqa: SIM115 - as long as the process
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    worker = Worker(device=device, loader_workers=loader_workers)
    while True:
        try:
            run: GridRun = pipe.recv()
        except EOFError:
            return
        pipe.send(worker.result_of(run))


class _Log(io.TextIOWrapper):
    """A stderr on which no bar is drawn: several processes would draw over each other's."""

    def isatty(self) -> bool:
        return False


def _end_with_parent() -> None:
    # A killed parent cannot tell its workers to stop, and a second start would meet them in the same folders.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
