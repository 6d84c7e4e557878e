"""What a run leaves: a result in its checkpoint's folder, or a note beside the folder that says why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Fields that the results of older versions lack."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run that ended, well or not."""

    recipe: str
    method: str
    base_model: str
    dataset: str
    """What it learned from."""
    seed: int
    shots: int
    synthetic_shots: int | None = None
    """Synthetic images a class, if a number was asked for."""
    synthetic_filter: bool = True
    """Whether they are those with the best scores."""
    identity: str
    """As :class:`~clipship.training.compare.grid.GridRun` has it."""
    error: str = ""
    """Why there are no scores; empty: there are."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By data set."""
    losses: Sequence[Mapping[str, float]] = ()
    """One record an epoch."""
    learned_parameters: int = 0
    seconds: float = 0.0
    """Training and evaluation, of the process that ended the run."""
    resumed: bool = False
    """Whether an earlier process had begun it, so that ``seconds`` is not all of it."""
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
        """For people."""
        chosen = f", {self.synthetic}," if f"{self.synthetic}" else ""
        return f"{self.dataset} {self.recipe} {self.shots} shots{chosen} seed {self.seed}"

    @classmethod
    def failed(cls, run: GridRun, error: str) -> RunResult:
        """The run has no scores because of ``error``."""
        return cls(**_names_of(run), error=" ".join(error.split()))

    @classmethod
    def done(cls, run: GridRun, **measured: Any) -> RunResult:
        """The run has ended well."""
        return cls(**_names_of(run), config=run.config.to_json(), **measured)


def _names_of(run: GridRun) -> dict[str, Any]:
    config = run.config
    return {
        "recipe": config.recipe,
        "method": config.method,
        "base_model": config.base_model,
        "dataset": run.dataset,
        "seed": config.seed,
        "shots": config.shots,
        "synthetic_shots": config.synthetic_shots,
        "synthetic_filter": config.synthetic_filter,
        "identity": run.identity,
    }


def result_path(run: GridRun) -> Path:
    """Where the result of a run that ended well is."""
    return run.folder / RESULT


def failure_path(run: GridRun) -> Path:
    """Where it is noted why the run has no result."""
    return run.folder.with_name(f"{run.folder.name}.failed.json")


def write_result(run: GridRun, result: RunResult) -> None:
    """Put ``result`` where it belongs; a good one takes the place of an earlier failure."""
    path = failure_path(run) if result.error else result_path(run)
    write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(result)})
    if not result.error:
        failure_path(run).unlink(missing_ok=True)


def finished_result(run: GridRun) -> RunResult | None:
    """The scores of the run if an earlier process has left them.

    Raises:
        UsageError: they are of a run with other settings or images.
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


def read_result(path: Path) -> RunResult:
    """The result in the file ``path``.

    Raises:
        CheckpointError: not one, or of another format version.
    """
    advice = "delete the file, and the run is done again"
    content = read_record(path, record_format=FORMAT, version=FORMAT_VERSION, error=CheckpointError, advice=advice)
    given = {name: value for name, value in content.items() if name not in ("format", "format_version")}
    odd = sorted((set(given) ^ {one.name for one in fields(RunResult)}) - _ADDED_LATER)
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is missing or unknown: {advice}")
    return RunResult(**given)
