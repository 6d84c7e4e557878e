"""Finds ``tritonserver`` on the PATH, or installs the embedded Triton on first use.

The embedded server is the binary in the ``nvidia-pytriton`` wheel, with the Python backend only. Its packages are in a
separate virtual environment, because the models run in Triton's processes, not in this one:

- The backend's stub embeds Python in isolated mode: it ignores ``PYTHON*`` variables and uses the environment whose
  ``bin`` is first on the ``PATH``.
- NumPy must be below 2: with NumPy 2 this Triton's Python backend silently returns empty outputs.
- Pillow has this process's version, so that client and server decode identically; so has ONNX Runtime if this process
  has it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.files import locked_file, replace_folder, sha256_of_text
from clipship.core.machine.caches import cache_folder, cache_places
from clipship.core.progress import Report, log, progress
from clipship.serving.errors import ServingError
from clipship.serving.repository.backends import PYTHON

PYTRITON_VERSION = "0.7.0"
_ONNXRUNTIME = "onnxruntime>=1.20"
STUB = "triton_python_backend_stub"
_COMPLETE = "complete"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A Triton that can be started: the binary and its settings."""

    tritonserver: Path
    backends: Path
    """Has one folder per backend."""
    caches: Path
    """Has one folder per response cache."""
    variables: Mapping[str, str]
    """Additional environment variables."""
    embedded: bool = False
    """Whether it is the embedded server, with packages installed by us."""


def triton_environment(backends: set[str], packages: Sequence[str] = ()) -> Environment:
    """The Triton on the PATH if it has all of ``backends``, else the embedded one.

    Args:
        packages: what Python models need besides ONNX Runtime and Pillow; installed for the embedded server.

    Raises:
        UsageError: neither has them, or the embedded one cannot run on this machine; says what to do.
        ServingError: the embedded one could not be installed.
    """
    on_path = _environment_on_path()
    missing = set() if on_path is None else {name for name in backends if not (on_path.backends / name).is_dir()}
    if on_path is not None and not missing:
        return on_path
    found = "no tritonserver is on the PATH" if on_path is None else _without(on_path, missing)
    if backends - {PYTHON.name}:
        raise UsageError(
            f"{found}, the embedded server has only the {PYTHON.name} backend, and the repository needs "
            f"{' and '.join(sorted(backends))}: {f'put what is missing into {on_path.backends}, ' if on_path else ''}"
            f"write it with clipship repository --backend {PYTHON.name}, or run it in NVIDIA's container "
            "(clipship serve --container prints the command)"
        )
    if on_path is not None:
        log(f"{found}: the embedded server is used instead")
    return embedded_environment(packages)


def _without(environment: Environment, missing: set[str]) -> str:
    """That a Triton lacks ``missing``."""
    backends = environment.backends
    has = sorted(folder.name for folder in backends.iterdir() if folder.is_dir()) if backends.is_dir() else []
    found = f"{backends} has {', '.join(has)}" if has else f"there is none in {backends}"
    return f"{environment.tritonserver} has no {' and no '.join(sorted(missing))} backend ({found})"


def embedded_environment(packages: Sequence[str] = ()) -> Environment:
    """The embedded Triton with ``packages``, installed into the cache folder if needed.

    Raises:
        UsageError: no Python library for the backend on this machine; says what to install.
        ServingError: the installation failed.
    """
    library_folder = _python_library_folder()
    folder = _installed_folder(packages)
    site = _site_packages(folder)
    libraries = [site / "nvidia_pytriton.libs", *([library_folder] if library_folder else [])]
    return Environment(
        tritonserver=site / "pytriton" / "tritonserver" / "bin" / "tritonserver",
        backends=folder / "backends",
        caches=site / "pytriton" / "tritonserver" / "caches",
        variables={
            "PATH": _joined(str(folder / "bin"), os.environ.get("PATH", "")),
            "LD_LIBRARY_PATH": _joined(*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")),
            "PYTHONPATH": str(site),
        },
        embedded=True,
    )


def _joined(*paths: str) -> str:
    return os.pathsep.join(path for path in paths if path)


def _environment_on_path() -> Environment | None:
    found = shutil.which("tritonserver")
    if found is None:
        return None
    binary = Path(found).resolve()
    home = binary.parent.parent
    return Environment(tritonserver=binary, backends=home / "backends", caches=home / "caches", variables={})


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{_python_version()}" / "site-packages"


def _python_library_folder() -> Path | None:
    """The folder of this Python's shared library, which the stub links; None if the loader finds it."""
    name = f"libpython{_python_version()}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix)
    if (folder / name).is_file():
        return folder
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise UsageError(
            f"the embedded Triton needs {name}, which is missing: run apt-get install libpython{_python_version()}"
        ) from error
    return None


def _requirements(packages: Sequence[str]) -> list[str]:
    """Packages of the embedded server, at this process's versions where that matters."""
    return ["numpy<2", *map(_as_here, ("onnxruntime", "pillow", *packages))]


def _as_here(package: str) -> str:
    """``package`` at this process's version; without one, any version that works."""
    try:
        return f"{package}=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return _ONNXRUNTIME if package == "onnxruntime" else package


def _installed_folder(packages: Sequence[str]) -> Path:
    """The embedded server's folder, installed by one process while others wait. A read-only cache may have it."""
    requirements = _requirements(packages)
    digest = sha256_of_text(" ".join(requirements))[:8]
    name = f"triton-{PYTRITON_VERSION}-py{_python_version()}-{digest}"
    for there in cache_places():
        if os.path.isfile(there / name / _COMPLETE):
            return there / name
    cache = cache_folder()
    if cache is None:
        raise UsageError("the embedded Triton needs 350 MB of disk: set CLIPSHIP_CACHE to a folder that can be written")
    folder = cache / name
    if not (folder / _COMPLETE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(folder.with_name(f"{folder.name}.lock")):
            if not (folder / _COMPLETE).is_file():
                _install(folder, requirements)
    return folder


def _install(folder: Path, requirements: Sequence[str]) -> None:
    log(f"installing the embedded Triton into {folder} (once; about 350 MB)")
    with replace_folder(folder) as temporary, progress("installing Triton", None) as report:
        venv.EnvBuilder(with_pip=False, symlinks=True).create(temporary)
        site = _site_packages(temporary)
        _pip_install(["--no-deps", f"nvidia-pytriton=={PYTRITON_VERSION}"], site, report)
        _pip_install(requirements, site, report)
        _gather_backend(site / "pytriton" / "tritonserver", temporary / "backends" / PYTHON.name)
        (temporary / _COMPLETE).touch()


def _gather_backend(tritonserver: Path, backend: Path) -> None:
    """The Python backend's files in one folder, with the stub of this Python's version."""
    stub = tritonserver / "python_backend_stubs" / _python_version() / STUB
    if not stub.is_file():
        raise UsageError(
            f"the embedded Triton has no Python backend for Python {_python_version()}: use Python 3.11 or 3.12, or "
            "NVIDIA's container (clipship serve --container prints the command)"
        )
    shutil.copytree(tritonserver / "backends" / PYTHON.name, backend)
    shutil.copy2(stub, backend / STUB)


def _pip_install(arguments: Sequence[str], target: Path, report: Report) -> None:
    """Run pip into ``target``, showing its output in the progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise UsageError("pip is needed to install the embedded Triton: run python -m ensurepip")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar=off", "--target", str(target), "--upgrade", *arguments]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            report(0, lines[-1][:60])
    if process.returncode != 0:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
        raise ServingError(f"the embedded Triton could not be installed: {errors[-1]}: check the network")
