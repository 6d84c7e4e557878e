"""The wheel holds the four stages, the weights, and the sources of the Triton models; nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = out.glob("clipship-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_every_module_of_every_stage_is_in_it(names: list[str]) -> None:
    for stage in ("core", "training", "export", "serving"):
        sources = {
            path.relative_to(ROOT / stage).as_posix()
            for path in (ROOT / stage / "clipship").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
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


def test_the_version_is_the_changelogs(names: list[str]) -> None:
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    version = metadata.removeprefix("clipship-").removesuffix(".dist-info")
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0].startswith(f"## [{version}]")
