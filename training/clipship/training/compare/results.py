"""The results of runs: scores in the folder of the checkpoint, or a failure next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from clipship.core.errors import CheckpointError, UsageError
from clipship.core.files import read_record, write_json_atomic
from clipship.training.compare.grid import GridRun, Synthetic

FORMAT = "clipship-comparison-run"
FORMAT_VERSION = 1
RESULT = "result.json"
_ADDED_LATER = {"synthetic_shots", "synthetic_filter"}
"""Fields that older versions did not write."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that ended: its scores, or why it failed."""

    recipe: str
    method: str
    base_model: str
    dataset: str
    """What it learned from."""
    seed: int
    shots: int
    synthetic_shots: int | None = None
    """Synthetic images a class; None: as the recipe says."""
    synthetic_filter: bool = True
    """Whether they are those with the best CLIP scores."""
    identity: str
    """That of the :class:`~clipship.training.compare.grid.GridRun`."""
    error: str = ""
    """Why the run failed; empty if it has scores."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By data set."""
    losses: Sequence[Mapping[str, float]] = ()
    """One record an epoch."""
    learned_parameters: int = 0
    seconds: float = 0.0
    """Of training and evaluation, in the process that ended the run."""
    resumed: bool = False
    """Whether an earlier process began it; ``seconds`` is then only a part."""
    selection: str = ""
    """Which weights were kept."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """All settings."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def synthetic(self) -> Synthetic:
        """Which synthetic images it learned from."""
        return Synthetic(shots=self.synthetic_shots, filtered=self.synthetic_filter)

    @property
    def name(self) -> str:
        """Data set, recipe, images and seed, for people."""
        chosen = f", {self.synthetic}," if f"{self.synthetic}" else ""
        return f"{self.dataset} {self.recipe} {self.shots} shots{chosen} seed {self.seed}"

    @classmethod
    def failed(cls, run: GridRun, error: str) -> RunResult:
        """The result of a run that failed."""
        return cls(**_names_of(run), error=" ".join(error.split()))

    @classmethod
    def done(cls, run: GridRun, **measured: Any) -> RunResult:
        """The result of a run with scores."""
        return cls(**_names_of(run), config=run.config.to_json(), **measured)


def _names_of(run: GridRun) -> dict[str, Any]:
    names = ("recipe", "method", "base_model", "seed", "shots", "synthetic_shots", "synthetic_filter")
    settings = {name: getattr(run.config, name) for name in names}
    return {**settings, "dataset": run.dataset, "identity": run.identity}


def result_path(run: GridRun) -> Path:
    """The file of the scores."""
    return run.folder / RESULT


def failure_path(run: GridRun) -> Path:
    """The file that says why the run failed."""
    return run.folder.with_name(f"{run.folder.name}.failed.json")


def write_result(run: GridRun, result: RunResult) -> None:
    """Write ``result``; scores replace the note of an earlier failure."""
    path = failure_path(run) if result.error else result_path(run)
    write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(result)})
    if not result.error:
        failure_path(run).unlink(missing_ok=True)


def finished_result(run: GridRun) -> RunResult | None:
    """The scores of the run; None if it has none yet.

    Raises:
        UsageError: its folder holds the scores of other settings or images.
        CheckpointError: the file cannot be read.
    """
    if not result_path(run).is_file():
        return None
    result = read_result(result_path(run))
    if result.identity != run.identity:
        raise UsageError(
            f"{run.folder} holds a run with other settings or images: give another --out, or delete that folder"
        )
    return result


def ended_result(run: GridRun) -> RunResult | None:
    """The scores of the run or the failure that is noted for it; None if it has not ended.

    Raises:
        UsageError, CheckpointError: as :func:`finished_result`.
    """
    result = finished_result(run)
    if result is None and failure_path(run).is_file():
        result = read_result(failure_path(run))
    return result


def forget_failures(runs: Sequence[GridRun], *, before_s: float) -> None:
    """Delete the failures of earlier starts: their runs are retried.

    Args:
        runs: all runs, not only those of this process.
        before_s: when this start began, in seconds since 1970; newer failures are of this start.
    """
    for path in map(failure_path, runs):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before_s:
                path.unlink()


def read_result(path: Path) -> RunResult:
    """The result in the file ``path``.

    Raises:
        CheckpointError: the file holds something else, or has another format version.
    """
    advice = "delete the file, and the run is done again"
    content = read_record(path, record_format=FORMAT, version=FORMAT_VERSION, error=CheckpointError, advice=advice)
    given = {name: value for name, value in content.items() if name not in ("format", "format_version")}
    odd = sorted((set(given) ^ {one.name for one in fields(RunResult)}) - _ADDED_LATER)
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is missing or unknown: {advice}")
    return RunResult(**given)
