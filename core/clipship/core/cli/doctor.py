"""``clipship doctor``: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

import click

from clipship.core.cli.main import emit, json_option
from clipship.core.machine.caches import cache_folder
from clipship.core.tables import machine

_PACKAGES = {
    "torch": "training",
    "open_clip_torch": "training",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "ftfy": "vocab",
    "regex": "vocab",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu12-bindings": "tensorrt-rtx",
    "tritonclient": "",
}
"""Package -> the extra that brings it ("" is the base install)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    found: str | None
    """What is there, None where it is missing."""
    advice: str = ""
    """How to get it, where it is missing."""

    def __str__(self) -> str:
        return f"{'ok' if self.found else '--'}  {self.what:<27} {self.found or f'missing: {self.advice}'}"


def _package(name: str, extra: str) -> Finding:
    version = _version(name)
    if version is None and name == "onnxruntime":
        version = _version("onnxruntime-gpu")  # takes its place
    return Finding(what=name, found=version, advice=f"pip install 'clipship[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Finding:
    command = shutil.which("nvidia-smi")
    if command is None:
        return Finding(
            what="NVIDIA GPU", found=None, advice="none seen (nvidia-smi is absent); everything runs on the CPU"
        )
    query = [command, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    lines = answer.stdout.strip().replace("\n", "; ")
    return Finding(what="NVIDIA GPU", found=lines or None, advice="the driver does not answer: run nvidia-smi")


def _providers() -> Finding:
    try:
        import onnxruntime
    except ImportError:
        return Finding(what="ONNX Runtime runs on", found=None, advice="pip install 'clipship[export]'")
    names = (name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding(what="ONNX Runtime runs on", found=", ".join(names))


def findings() -> list[Finding]:
    """Everything the report says, in its order."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    cache = cache_folder()
    server = "clipship serve installs its own server on first use, into a folder of its own"
    library = f"libpython{sys.version_info.major}.{sys.version_info.minor}"  # which Triton's Python backend loads
    return [
        Finding(what="machine", found=system),
        Finding(what="processor", found=machine()),
        Finding(
            what="cache",
            found=str(cache) if cache else None,
            advice="set CLIPSHIP_CACHE to a folder that can be written",
        ),
        *(_package(name, extra) for name, extra in _PACKAGES.items()),
        _providers(),
        _gpus(),
        Finding(what="tritonserver", found=shutil.which("tritonserver"), advice=server),
        Finding(
            what=library,
            found=ctypes.util.find_library(library.removeprefix("lib")),
            advice=f"apt-get install {library}",
        ),
    ]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Report what this machine has, what is missing and how to get it.

    Example: clipship doctor --json
    """
    report = findings()
    emit({"findings": [asdict(finding) for finding in report]}, "\n".join(map(str, report)), as_json=as_json)
