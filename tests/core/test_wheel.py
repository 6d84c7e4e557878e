"""The wheel holds the four stages and the sources of the Triton models; the weights are a wheel of their own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


MODELS = ROOT / "training" / "clipship" / "models"


def built(project: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT / "deploy" / "models", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return names_in(wheel)


def test_every_module_of_every_stage_is_in_it(names: list[str]) -> None:
    for stage in ("core", "training", "export", "serving"):
        sources = {
            path.relative_to(ROOT / stage).as_posix()
            for path in (ROOT / stage / "clipship").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and MODELS not in path.parents
        }
        assert sources <= set(names)
        assert f"clipship/{stage}/py.typed" in names


def test_the_sources_of_the_triton_models_are_in_it(names: list[str]) -> None:
    for source in (
        "image_encoder/model.py",
        "classifier/model.py",
        "preprocess/model.py",
        "admission/model.py",
        "doors.py",
    ):
        assert f"clipship/serving/triton_models/python/{source}" in names


def test_nothing_else_is_in_it(names: list[str]) -> None:
    assert "clipship/__init__.py" not in names, "it would make the namespace package a plain one"
    foreign = [name for name in names if not name.startswith(("clipship/", "clipship-"))]
    assert foreign == [], "top-level packages of other names collide with other distributions"
    assert not [name for name in names if "tests/" in name or name.endswith(".pyc")]


def test_a_client_does_not_carry_the_weights(wheel: Path, names: list[str]) -> None:
    assert not [name for name in names if name.startswith("clipship/models/")]
    assert wheel.stat().st_size < 1_000_000


def test_the_weights_are_a_wheel_beside_it(models: Path) -> None:
    held = {path.relative_to(MODELS.parent).as_posix() for path in MODELS.rglob("*") if path.is_file()}
    assert {name.removeprefix("clipship/") for name in names_in(models) if ".dist-info/" not in name} == held


def test_installed_together_the_weights_are_found_and_without_them_the_extra_is_named(
    wheel: Path, models: Path, tmp_path: Path
) -> None:
    script = "from clipship.training.model.builtin import TINY, builtin_folder; print(builtin_folder(TINY))"

    def run(*wheels: Path) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / str(len(wheels))
        for each in wheels:
            with zipfile.ZipFile(each) as archive:
                archive.extractall(folder)
        command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {script}"]
        return subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)

    assert run(wheel, models).stdout == f"{tmp_path / '2' / 'clipship' / 'models' / 'clipship-tiny'}\n"
    assert "clipship-models is not installed: run pip install 'clipship[demo]'" in run(wheel).stderr


def test_both_wheels_have_one_version(wheel: Path, models: Path) -> None:
    assert wheel.name.split("-")[1] == models.name.split("-")[1]


def test_the_version_is_the_changelogs(names: list[str]) -> None:
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    version = metadata.removeprefix("clipship-").removesuffix(".dist-info")
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0].startswith(f"## [{version}]")
