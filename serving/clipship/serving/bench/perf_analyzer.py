"""Load generation by NVIDIA's perf_analyzer, a C++ client with little overhead."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.machine.caches import cache_places
from clipship.serving.bench.load import PERCENTILES, Reading
from clipship.serving.errors import ServingError

VERSION = "2.51.0"
"""The last release of tritonclient with the program in its wheel."""

FOLDER = f"perf-analyzer-{VERSION}"
"""In the cache, where ``benchmarks/perf_analyzer.py`` installs it."""

_WINDOWS = 3
"""It reports the mean of its last three windows."""
_LONGER = (1, 4, 16)
"""Factors of the window in further attempts, for servers that answer nothing within one window."""


@dataclass(frozen=True, kw_only=True)
class Analyzer:
    """The program, and the environment variables that it needs."""

    program: Path
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run it and return its output."""
        command, variables = [str(self.program), *map(str, arguments)], {**os.environ, **self.variables}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def installed() -> Analyzer | None:
    """The first that starts: the program on the PATH, else the one in the cache; None if there is none."""
    on_path = shutil.which("perf_analyzer")
    in_cache = (analyzer_in(place / FOLDER) for place in cache_places())
    candidates = [Analyzer(program=Path(on_path))] if on_path else []
    candidates += [each for each in in_cache if each.program.is_file()]
    return next((each for each in candidates if each.run("--version").returncode == 0), None)


def analyzer_in(folder: Path) -> Analyzer:
    """The program installed in ``folder``, with the two libraries that its wheel lacks."""
    libraries = os.pathsep.join(map(str, (folder, folder / "nvidia" / "cuda_runtime" / "lib")))
    return Analyzer(program=folder / "bin" / "perf_analyzer", variables={"LD_LIBRARY_PATH": libraries})


def analyze(
    analyzer: Analyzer,
    url: str,
    model: str,
    images: tuple[str, Sequence[NDArray[np.uint8] | bytes]],
    *,
    batch: int,
    concurrency: int,
    seconds: float,
) -> Reading:
    """Measure ``model`` over three windows, ``seconds`` in all, or longer ones if a window has no answer.

    Args:
        images: the name of the model's input, and pixels uint8 [H, W, 3] or a file's bytes for each image.

    Raises:
        ServingError: it failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "images.json"), Path(folder, "report.csv")
        data.write_text(input_data(*images), encoding="utf-8")
        settings: dict[str, Any] = {"-m": model, "-u": url, "-i": "grpc", "-b": batch, "--input-data": data}
        settings |= {"--concurrency-range": concurrency, "--max-trials": _WINDOWS, "-f": report}
        settings["--stability-percentage"] = 999  # accept three windows, however they differ
        for longer in _LONGER:
            settings["--measurement-interval"] = max(1, round(longer * 1000 * seconds / _WINDOWS))
            given = (part for setting in settings.items() for part in setting)
            done = analyzer.run("--async", "--verbose-csv", *given)
            if report.is_file():
                return reading_from_csv(report.read_text(encoding="utf-8"))
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            if "larger time window" not in last:
                break
    raise ServingError(f"{url}: perf_analyzer ended with code {done.returncode} and no report: {last}")


def input_data(name: str, images: Sequence[NDArray[np.uint8] | bytes]) -> str:
    """Its JSON input file. Strings are in Triton's format: a length of 4 bytes, then the bytes."""
    raw = [struct.pack("<I", len(image)) + image if isinstance(image, bytes) else image.tobytes() for image in images]
    return json.dumps({"data": [{name: {"b64": base64.b64encode(each).decode()}} for each in raw]})


def reading_from_csv(text: str) -> Reading:
    """The first row of its CSV file, which counts images as inferences, and microseconds."""
    row = next(csv.DictReader(text.splitlines()))
    mean_ms = float(row["Avg latency"]) / 1e3
    ranks = {f"p{rank}": float(row[f"p{rank} latency"]) / 1e3 for rank in PERCENTILES}
    rate = float(row["Inferences/Second"])
    return Reading(images_per_s=rate, latencies_ms={"mean": mean_ms, **ranks}, whole_mean_ms=mean_ms)
