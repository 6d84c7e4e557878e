"""Validates this machine before Triton is started on a repository, for errors of one line.

The embedded server has its own packages. For a ``tritonserver`` on the PATH, this looks up its release and the Python
that its Python backend will embed, which is not this one. The backend's stub is linked to one version of Python. It
uses the packages of the first ``python3`` on the PATH: those of its virtual environment, or of its prefix if the
versions agree.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.progress import log
from clipship.core.tensorrt_plan import version_parts
from clipship.serving.repository.backends import PYTHON
from clipship.serving.repository.requirements import Requirements
from clipship.serving.server.install import STUB, Environment, triton_environment
from clipship.serving.server.releases import needs_of, release_of_triton, validate_release

_PACKAGES = {"PIL": "pillow"}
"""Packages of modules with another name."""

_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
found = {"version": "%d.%d" % sys.version_info[:2], "prefix": sys.prefix, "missing": missing}
print(json.dumps({**found, "numpy": version("numpy"), "pillow": version("pillow")}))
"""


@dataclass(frozen=True, kw_only=True)
class Stub:
    """How the stub of a Python backend was built."""

    python: str
    """The version that it embeds, e.g. "3.12"."""
    takes_numpy_2: bool
    """If not, NumPy 2 crashes it or empties arrays, as in Triton up to 2.51."""


@dataclass(frozen=True, kw_only=True)
class StubPython:
    """The Python whose packages the stub uses."""

    executable: str
    version: str
    prefix: str
    missing: Sequence[str]
    """Modules that the models import and it lacks."""
    numpy: str | None
    pillow: str | None


def prepared_environment(repository: Path) -> Environment:
    """A Triton that can run ``repository`` on this machine; creates the folder of its TensorRT engine cache.

    Raises:
        UsageError: there is none, or it lacks something; says what to do.
        ServingError: the embedded server could not be installed.
    """
    required = Requirements(repository)
    environment = triton_environment(required.backends, required.packages)
    if not environment.embedded:
        release = release_of_triton(environment.tritonserver.parent.parent)
        validate_release(release, str(environment.tritonserver), needs_of(repository))
        if PYTHON.name in required.backends:
            validate_python(environment, required.modules)
    if required.engine_cache is not None:
        _make_engine_cache(required.engine_cache)
    return environment


def validate_python(environment: Environment, modules: Sequence[str]) -> None:
    """Validate that Python models can run in what ``environment`` embeds, as far as that can be found out.

    Raises:
        UsageError: a module is missing, or the Python backend does not support its NumPy.
    """
    stub = stub_of(environment)
    python = None if stub is None else python_of(stub, modules)
    if stub is None or python is None:
        return
    for fault in _faults(stub, python, modules):
        who = f"the models in Python of {environment.tritonserver}"
        raise UsageError(f"{who} would run with the packages of {python.prefix}, {fault}")
    _warn_of_other_pillow(python)


def _faults(stub: Stub, python: StubPython, modules: Sequence[str]) -> Iterator[str]:
    """What is wrong with the packages of ``python``, and what to do."""
    install, first = f"{python.executable} -m pip install", "first on the PATH"
    another = f"or put another environment of Python {stub.python} {first}"
    if python.version != stub.python:
        needed = " and ".join(_requirements(stub, modules))
        yield (
            f"which is of Python {python.version}, and its Python backend embeds Python {stub.python}: put an "
            f"environment of Python {stub.python} with {needed} {first}"
        )
    if python.missing:
        absent = " and no ".join(_PACKAGES.get(name, name) for name in python.missing)
        yield f"where there is no {absent}: run {install} {' '.join(_requirements(stub, python.missing))}, {another}"
    if not stub.takes_numpy_2 and version_parts(python.numpy or "") >= (2,):
        yield (
            f"where NumPy is {python.numpy}; its Python backend was built for NumPy 1 (as in Triton up to 2.51) and "
            f"would crash or return empty arrays: run {install} 'numpy<2', {another}"
        )


def _warn_of_other_pillow(python: StubPython) -> None:
    here = importlib.metadata.version("pillow")
    if python.pillow != here:
        log(f"the server decodes with Pillow {python.pillow}, this machine with {here}: the pixels may differ a little")


def _requirements(stub: Stub, modules: Sequence[str]) -> Iterator[str]:
    """What pip is given for ``modules``."""
    for name in modules:
        package = _PACKAGES.get(name, name)
        if package == "pillow":
            yield f"pillow=={importlib.metadata.version('pillow')}"
        else:
            yield "'numpy<2'" if package == "numpy" and not stub.takes_numpy_2 else package


def stub_of(environment: Environment) -> Stub | None:
    """How the Python backend's stub was built; None if that cannot be found out."""
    try:
        code = (environment.backends / PYTHON.name / STUB).read_bytes()
    except OSError:
        return None
    library = re.search(rb"libpython(\d+\.\d+)", code)
    # pybind11 looks up NumPy's core by this name since it supports NumPy 2.
    return library and Stub(python=library[1].decode(), takes_numpy_2=b"numpy._core" in code)


def python_of(stub: Stub, modules: Sequence[str]) -> StubPython | None:
    """The Python whose packages ``stub`` will use; None if ``python3`` on the PATH gives no answer."""
    first = shutil.which("python3")
    if first is None or not (_is_venv(first) or _is_program(first)):
        return None
    python = _asked(first, stub, modules)
    # The stub also uses a virtual environment of another version, and finds no package in it.
    return python if python is not None and (python.version == stub.python or _is_venv(first)) else None


def _asked(executable: str, stub: Stub, modules: Sequence[str]) -> StubPython | None:
    """Version, prefix and packages of ``executable``."""
    # A pybind11 without NumPy 2 support starts Python 3.11 and later without PYTHON* variables.
    isolated = ["-I"] if not stub.takes_numpy_2 and version_parts(stub.python) >= (3, 11) else []
    command = [executable, *isolated, "-c", _PROBE, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return StubPython(executable=executable, **json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def _is_venv(executable: str) -> bool:
    folder = Path(executable).parent
    return (folder / "pyvenv.cfg").is_file() or (folder.parent / "pyvenv.cfg").is_file()


def _is_program(executable: str) -> bool:
    """Not a script such as pyenv's shims: the stub does not run it, but looks beside it."""
    with Path(executable).open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _make_engine_cache(engines: str) -> None:
    """Create the engines' folder with its parents, which the accelerator would not."""
    try:
        Path(engines).mkdir(parents=True, exist_ok=True)
        if not os.access(engines, os.W_OK | os.X_OK):
            raise PermissionError("this user cannot write it")
    except OSError as error:
        raise UsageError(
            f"{engines}, where the TensorRT accelerator keeps the engines it builds, cannot be written "
            f"({error.strerror or error}): run sudo install -d -o $(id -u) {engines}, or write the repository "
            "without --accelerator"
        ) from error
