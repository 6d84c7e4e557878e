"""Does the runs of a comparison, in this process or in several of this machine.

Runs share nothing but files. A run that fails is recorded, and the others go on.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipship.core.errors import ClipshipError
from clipship.core.machine.runtimes import available_cores
from clipship.core.progress import log, progress
from clipship.training.compare.grid import FEATURES, GridRun
from clipship.training.compare.results import RunResult, write_result
from clipship.training.worker_pool import worker_pool

if TYPE_CHECKING:
    from clipship.training.checkpoint import Checkpoint
    from clipship.training.datasets.base import Dataset
    from clipship.training.methods import Method
    from clipship.training.model.clip import Clip

FAILURES = (ClipshipError, OSError, RuntimeError, ImportError, MemoryError)
"""These end one run: a bad image, a full disk, a GPU without memory. A bug of ours ends the comparison."""


@dataclass(kw_only=True)
class Worker:
    """Does runs one after another, and keeps the base model and the data sets loaded between them."""

    device: str | None = None
    loader_workers: int = 0
    """Processes that prepare images."""
    _clips: dict[str, Clip] = field(default_factory=dict)
    _datasets: dict[Path, Dataset] = field(default_factory=dict)

    def result_of(self, run: GridRun) -> RunResult:
        """Do ``run``, or resume it, and write its result; a failure is a result too."""
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
    """None if the method classifies only the classes it learned from, and the data set has others."""
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


def do_runs(
    runs: Sequence[GridRun], *, jobs: int, device: str | None, loader_workers: int, first_gpu: int = 0
) -> Iterator[RunResult]:
    """The results of ``runs`` as they end, with a log line for each; several ``jobs`` run in worker processes.

    Without a ``device`` the jobs take the GPUs in turn, from ``first_gpu`` on.
    """
    if not runs:
        return
    started_s = time.monotonic()
    bar = progress("runs", len(runs)) if jobs > 1 else nullcontext()  # a single job shows a bar for its run
    devices = [device or _gpu(first_gpu + number) for number in range(min(jobs, len(runs)))]
    if jobs > 1:
        results = _from_processes(runs, devices, loader_workers)
    else:
        worker = Worker(device=devices[0], loader_workers=loader_workers)
        results = map(worker.result_of, runs)
    with bar as report:
        for done, result in enumerate(results, start=1):
            left_s = (time.monotonic() - started_s) / done * (len(runs) - done)
            left = f", about {left_s / 60:.0f} min left" if left_s >= 60 else ""
            outcome = f"failed: {result.error}" if result.error else f"{result.seconds:.1f} s"
            log(f"{result.name}: {outcome} ({done} of {len(runs)}{left})")
            if report is not None:
                report(done, result.name)
            yield result


def _gpu(number: int) -> str | None:
    """GPUs are taken in turn; None lets PyTorch choose where there is at most one."""
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{number % gpus}" if gpus > 1 else None


def _from_processes(runs: Sequence[GridRun], devices: Sequence[str | None], loader_workers: int) -> Iterator[RunResult]:
    """The results of one process for each of ``devices``.

    Each process has its own pool: if it dies, it breaks that pool only and loses its run only.
    """
    waiting, busy = list(reversed(runs)), dict[Future[RunResult], tuple[GridRun, int]]()
    threads = max(1, available_cores() // len(devices))
    with ExitStack() as stack:

        def new_pool() -> ProcessPoolExecutor:
            return stack.enter_context(worker_pool(1, _prepare_process, threads))

        def start(number: int) -> None:
            given = waiting.pop(), devices[number], loader_workers
            try:
                future = pools[number].submit(_result_in_process, *given)
            except BrokenProcessPool:  # it died between two runs
                pools[number] = new_pool()
                future = pools[number].submit(_result_in_process, *given)
            busy[future] = given[0], number

        pools = [new_pool() for _ in devices]

        for number in range(len(devices)):
            start(number)
        while busy:
            ended = next(as_completed(busy))
            run, number = busy.pop(ended)
            try:
                result = ended.result()
            except BrokenProcessPool:
                result = RunResult.failed(run, "its process was killed or ran out of memory")
                write_result(run, result)
                pools[number] = new_pool()
            if waiting:
                start(number)
            yield result


def _prepare_process(threads: int) -> None:
    sys.stderr = _Log(open(2, "wb", closefd=False), write_through=True)  # noqa: SIM115 - as long as the process
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _result_in_process(run: GridRun, device: str | None, loader_workers: int) -> RunResult:
    return _worker(device, loader_workers).result_of(run)


@cache
def _worker(device: str | None, loader_workers: int) -> Worker:
    """The one worker of this process, with what it has loaded."""
    return Worker(device=device, loader_workers=loader_workers)


class _Log(io.TextIOWrapper):
    """A stderr on which no bar is drawn: the bars of several processes would overwrite each other."""

    def isatty(self) -> bool:
        return False
