"""A Triton on the PATH: what is found out about it before it is started."""

from __future__ import annotations

import os
import shutil
import sys
import venv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.bundle import DEFAULT_ENCODER, Bundle
from clipship.core.errors import UsageError
from clipship.serving.client.classifier import Classifier
from clipship.serving.repository.config_pbtxt import config_from_text, text_from_config
from clipship.serving.repository.tuning import Tuning
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.install import STUB, embedded_environment
from clipship.serving.server.prepare import prepared_environment, stub_of
from clipship.serving.server.process import start_server
from tests.serving.server.test_releases import configured, form

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed Triton, first on the PATH: the embedded one's files, found as any other's."""
    embedded, home = embedded_environment(), tmp_path / "triton"
    (home / "bin").mkdir(parents=True)
    binary = home / "bin" / "tritonserver"
    libraries = embedded.variables["LD_LIBRARY_PATH"]
    binary.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {embedded.tritonserver} "$@"\n')
    binary.chmod(0o755)
    shutil.copytree(embedded.backends, home / "backends")
    (home / "caches").symlink_to(embedded.caches)
    monkeypatch.setenv("PATH", str(binary.parent), prepend=os.pathsep)
    return home


def environment_of(folder: Path, monkeypatch: pytest.MonkeyPatch, links: Iterable[Path] = (), **packages: str) -> Path:
    """A virtual environment, first on the PATH, with ``links`` to packages and empty ones of the versions given."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    site = folder / "lib" / f"python{PYTHON}" / "site-packages"
    for link in links:
        (site / link.name).symlink_to(link)
    for name, version in packages.items():
        (site / {"pillow": "PIL"}.get(name, name)).mkdir()
        (site / {"pillow": "PIL"}.get(name, name) / "__init__.py").touch()
        (site / f"{name}-{version}.dist-info").mkdir()
        told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(told)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    return folder


def refusal(repository: Path) -> str:
    with pytest.raises(UsageError) as refused:
        prepared_environment(repository)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.triton
def test_a_server_on_the_path_serves_with_the_packages_of_the_first_python(
    home: Path, repository: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Path(embedded_environment().variables["PYTHONPATH"])
    environment_of(tmp_path / "env", monkeypatch, site.iterdir())
    assert prepared_environment(repository).tritonserver == home / "bin" / "tritonserver"
    with start_server(repository) as running, Classifier(running.endpoints.url, decode="server") as classifier:
        assert classifier.classify([photos / "05.jpg"])[0].error is None


@pytest.mark.triton
def test_packages_that_its_python_lacks_are_named(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import __version__ as pillow

    env = environment_of(tmp_path / "env", monkeypatch, numpy="1.26.4", onnxruntime="1.20.1")
    assert refusal(repository) == (
        f"the models in Python of {home}/bin/tritonserver would run with the packages of {env}, where there is no "
        f"pillow: run {env}/bin/python3 -m pip install pillow=={pillow}, or put another environment of Python {PYTHON} "
        "first on the PATH"
    )


@pytest.mark.triton
def test_numpy_2_under_a_backend_built_before_it_is_refused(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment_of(tmp_path / "env", monkeypatch, numpy="2.4.6", pillow="13.0.0", onnxruntime="1.20.1")
    assert refusal(repository) == (
        f"the models in Python of {home}/bin/tritonserver would run with the packages of {env}, where NumPy is 2.4.6; "
        "its Python backend was built for NumPy 1 (as in Triton up to 2.51) and would crash or return empty arrays: "
        f"run {env}/bin/python3 -m pip install 'numpy<2', or put another environment of Python {PYTHON} first on the "
        "PATH"
    )
    stub = home / "backends" / "python" / STUB
    stub.write_bytes(stub.read_bytes() + b"numpy._core")  # as the stub of 2.52 and later has it
    assert prepared_environment(repository).tritonserver == home / "bin" / "tritonserver"


@pytest.mark.triton
def test_an_environment_of_another_python_is_refused(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment_of(tmp_path / "env", monkeypatch, numpy="1.26.4", pillow="13.0.0", onnxruntime="1.20.1")
    stub = home / "backends" / "python" / STUB
    stub.write_bytes(stub.read_bytes().replace(f"libpython{PYTHON}".encode(), b"libpython3.99"))
    told = refusal(repository)
    assert f"packages of {env}, which is of Python {PYTHON}, and its Python backend embeds Python 3.99: put an" in told
    assert "environment of Python 3.99 with 'numpy<2' and pillow==" in told


@pytest.mark.triton
def test_what_cannot_be_found_out_is_not_refused(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that starts some Python is not where the stub looks; a stub may say nothing of itself."""
    script = tmp_path / "scripts" / "python3"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert not prepared_environment(repository).embedded
    environment_of(tmp_path / "env", monkeypatch)
    (home / "backends" / "python" / STUB).write_bytes(b"some program")
    environment = prepared_environment(repository)
    assert stub_of(environment) is None


@pytest.mark.triton
def test_another_pillow_is_told(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment_of(tmp_path / "env", monkeypatch, numpy="1.26.4", pillow="10.1.0", onnxruntime="1.20.1")
    prepared_environment(repository)
    assert "the server decodes with Pillow 10.1.0, this machine with " in capsys.readouterr().err


@pytest.mark.triton
def test_a_missing_backend_is_named_with_the_server(
    home: Path, repository: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = repository_from_bundle(bundle, tmp_path / "r", backend="onnxruntime")
    binary = home / "bin" / "tritonserver"
    assert refusal(other) == (
        f"{binary} has no onnxruntime backend ({home}/backends has python), the embedded server has only the python "
        f"backend, and the repository needs onnxruntime and python: put what is missing into {home}/backends, write it "
        "with clipship repository --backend python, or run it in NVIDIA's container (clipship serve --container "
        "prints the command)"
    )
    shutil.rmtree(home / "backends")
    assert prepared_environment(repository).embedded
    told = f"{binary} has no python backend (there is none in {home}/backends): the embedded server is used instead"
    assert told in capsys.readouterr().err


@pytest.mark.triton
def test_a_server_of_a_release_that_cannot_serve_it_is_refused(home: Path, tmp_path: Path) -> None:
    (home / "backends" / "onnxruntime").mkdir()
    (home / "TRITON_VERSION").write_text("2.58.0\n")
    told = refusal(configured(tmp_path / "r", "onnxruntime", **form(opset=23)))
    assert told.startswith(f"{home}/bin/tritonserver is release 25.05 (Triton 2.58.0, ")
    assert "needs an ONNX Runtime that takes opset 23 (release 25.08 or later)" in told


@pytest.mark.triton
def test_the_folder_of_the_engines_is_made_whole(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "backends" / "onnxruntime").mkdir()
    environment_of(tmp_path / "env", monkeypatch, numpy="1.26.4", pillow="13.0.0")
    encoder = replace(DEFAULT_ENCODER, precision="fp16")
    repository = configured(tmp_path / "r", "onnxruntime", encoder=encoder, tuning=Tuning(accelerator="tensorrt"))
    engines = tmp_path / "several" / "levels" / "of engines"
    keep_engines_in(engines, repository)
    prepared_environment(repository)
    assert engines.is_dir()
    (tmp_path / "file").touch()
    keep_engines_in(tmp_path / "file" / "engines", repository)
    assert refusal(repository) == (
        f"{tmp_path}/file/engines, where the TensorRT accelerator keeps the engines it builds, cannot be written (Not "
        f"a directory): run sudo install -d -o $(id -u) {tmp_path}/file/engines, or write the repository without "
        "--accelerator"
    )


def keep_engines_in(folder: Path, repository: Path) -> None:
    path = repository / "image_encoder" / "config.pbtxt"
    config = config_from_text(path.read_text(encoding="utf-8"))
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    for name in ("trt_engine_cache_path", "trt_timing_cache_path"):
        accelerator.parameters[name] = str(folder)
    path.write_text(text_from_config(config), encoding="utf-8")
