"""NVIDIA's perf_analyzer as a peer: found on the PATH, or taken from the wheel of tritonclient that carries it.

It is a C++ program, so what it reaches is what a client without overhead reaches. The wheel's binary needs two
libraries that it does not carry: libcudart, of which there is a wheel, and libb64, which lies in the embedded Triton.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import ClipshipError
from clipship.core.files import replace_folder
from clipship.core.machine.caches import cache_folder
from clipship.serving.server.install import embedded_environment

VERSION = "2.51.0"
"""The last release of tritonclient with the program in its wheel."""

PERCENTILES = ("p50", "p90", "p95", "p99")

_WINDOWS = 3
"""It reports the mean of its last three windows, so a reading has three. Requests that are cut by a window's ends count
in none, so a window must be several times as long as a request takes."""

_LONGER = (1, 4, 16)
"""How much longer its windows become in further attempts, where a slow server answers nothing in one."""


@dataclass(frozen=True, kw_only=True)
class Analyzer:
    """The program, and the environment variables that it needs."""

    program: Path
    variables: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """One line of its CSV file."""

    images_per_s: float
    latencies_ms: dict[str, float]
    """p50, p90, p95, p99."""


def found() -> Analyzer:
    """The program on the PATH, or the wheel's, installed into the cache folder on first use.

    Raises:
        ClipshipError: it cannot be installed here, or does not start.
    """
    on_path = shutil.which("perf_analyzer")
    cache = cache_folder()
    if cache is None:
        raise ClipshipError("perf_analyzer has no folder: set CLIPSHIP_CACHE to one that can be written")
    folder = cache / f"perf-analyzer-{VERSION}"
    analyzer = Analyzer(program=Path(on_path), variables={}) if on_path else _in_folder(folder)
    if not on_path and not folder.is_dir():
        _install(folder)
    started = subprocess.run(
        [analyzer.program, "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **analyzer.variables},
    )
    if started.returncode != 0:
        raise ClipshipError(f"{analyzer.program} does not start: {started.stderr.strip()}: put another on the PATH")
    return analyzer


def _in_folder(folder: Path) -> Analyzer:
    libraries = os.pathsep.join(map(str, (folder, folder / "nvidia" / "cuda_runtime" / "lib")))
    return Analyzer(program=folder / "bin" / "perf_analyzer", variables={"LD_LIBRARY_PATH": libraries})


def _install(folder: Path) -> None:
    libraries = embedded_environment().variables["LD_LIBRARY_PATH"].split(os.pathsep)
    bundled = [path for library in libraries for path in Path(library).glob("libb64-*.so.0d")]
    with replace_folder(folder) as temporary:
        wheels = [f"tritonclient=={VERSION}", "nvidia-cuda-runtime-cu12"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary), *wheels]
        if subprocess.run(command, check=False).returncode != 0 or not bundled:
            raise ClipshipError("perf_analyzer could not be installed: check the network, or put one on the PATH")
        shutil.copyfile(bundled[0], temporary / "libb64.so.0d")
        (temporary / "bin" / "perf_analyzer").chmod(0o755)


def write_input(path: Path, name: str, images: Sequence[NDArray[np.uint8] | bytes]) -> Path:
    """The file of images that it sends: pixels uint8 [H, W, 3] or a file's bytes each, under the input's ``name``.

    It sends what base64 stands for as it is, so a string needs Triton's form: its length in 4 bytes, then its bytes.
    """
    raw = [struct.pack("<I", len(image)) + image if isinstance(image, bytes) else image.tobytes() for image in images]
    data = [{name: {"b64": base64.b64encode(each).decode()}} for each in raw]
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def analyze(
    analyzer: Analyzer,
    url: str,
    model: str,
    images: Path,
    *,
    batch: int,
    concurrency: int,
    seconds: float,
    folder: Path,
) -> Report:
    """Its reading of ``model`` over three windows of ``seconds``; longer ones where none was answered in one.

    Raises:
        ClipshipError: it failed; with its last line.
    """
    for longer in _LONGER:
        settings: dict[str, Any] = {
            "-m": model,
            "-u": url,
            "-i": "grpc",
            "-b": batch,
            "--concurrency-range": concurrency,
            "--input-data": images,
            "--measurement-interval": round(longer * 1000 * seconds),
            "--stability-percentage": 999,  # so that three windows are enough, whatever they say
            "--max-trials": _WINDOWS,
        }
        report = folder / "perf_analyzer.csv"
        report.unlink(missing_ok=True)
        run = _run(analyzer, [*(str(part) for setting in settings.items() for part in setting), "-f", str(report)])
        if report.is_file():
            return report_from_csv(report.read_text(encoding="utf-8"))
        last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        if "larger time window" not in last:
            break
    raise ClipshipError(f"perf_analyzer ended with code {run.returncode} and no report: {last}")


def _run(analyzer: Analyzer, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **analyzer.variables}
    command = [str(analyzer.program), "--async", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def report_from_csv(text: str) -> Report:
    """The first line of its CSV file; it counts an image as an inference, and microseconds."""
    row = next(csv.DictReader(text.splitlines()))
    latencies = {name: float(row[f"{name} latency"]) / 1e3 for name in PERCENTILES}
    return Report(images_per_s=float(row["Inferences/Second"]), latencies_ms=latencies)
