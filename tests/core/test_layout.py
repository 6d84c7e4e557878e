"""The guard rails of the layout: namespace package, import arrows, house limits, no traces of a machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.structure import Structure, structure_of

ROOT = Path(__file__).parents[2]
STAGES = ("core", "training", "export", "serving")
ARROWS: dict[str, set[str]] = {
    "__main__": {"core"},
    "core": set(),
    "training": {"core"},
    "world": {"core", "training"},
    "export": {"core", "training", "world"},
    "serving": {"core"},
}


@pytest.fixture(scope="module")
def structure() -> Structure:
    return structure_of(ROOT)


def sources(stage: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / stage / "clipship").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_a_typed_portion_of_the_namespace(stage: str) -> None:
    assert not (ROOT / stage / "clipship" / "__init__.py").exists(), "it would hide the other stages"
    assert (ROOT / stage / "clipship" / stage / "py.typed").exists()


def test_imports_follow_the_arrows(structure: Structure) -> None:
    assert structure.upward(ARROWS) == []


def test_no_import_runs_in_a_circle(structure: Structure) -> None:
    """Neither between modules nor between the modules and folders of one folder."""
    assert structure.circles() == []


def test_no_folder_is_crowded(structure: Structure) -> None:
    assert structure.crowded() == []


def test_only_command_lines_import_command_lines(structure: Structure) -> None:
    assert structure.command_lines() == []


def test_the_guard_sees_circles_crowds_and_wrong_arrows(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("core/clipship/core/__init__.py", "")
    write("core/clipship/core/low/__init__.py", "")
    write("core/clipship/core/low/a.py", "from clipship.core import b")
    write("core/clipship/core/low/c.py", "")
    write("core/clipship/core/b.py", "def f():\n    from clipship.core.low.c import g")
    write("core/clipship/core/cli.py", "import clipship.serving.d")
    write("serving/clipship/serving/__init__.py", "")
    for number in range(13):
        write(f"serving/clipship/serving/m{number}.py", "")
    write("serving/clipship/serving/d.py", "from clipship.core.cli import main")
    found = structure_of(tmp_path)
    assert [circle.partition(":")[0] for circle in found.circles()] == ["modules", "clipship", "clipship.core"]
    assert found.crowded() == ["clipship.serving has 14 modules, at most 12"]
    assert found.command_lines() == ["clipship.serving.d imports clipship.core.cli"]
    assert found.upward({"core": set(), "serving": {"core"}}) == ["clipship.core.cli imports clipship.serving.d"]


@pytest.mark.parametrize("stage", STAGES)
def test_functions_are_short_and_annotated(stage: str) -> None:
    for path, tree in sources(stage):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                has_doc = ast.get_docstring(node) is not None
                doc = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if has_doc else 0
                length = (node.end_lineno or 0) - node.lineno + 1 - doc
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                assert length <= 60, f"{where} has {length} lines"
                assert node.returns is not None or node.name == "__init__", f"{where} has no return annotation"


def test_nothing_tells_of_a_machine_or_a_registry_host() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"/(work|farm|root)/\w|/tmp/bash|pythonhosted|pypi\.org/simple|registry\.npmjs|deb\.debian")
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.stat().st_size > 500_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = pattern.search(text)
        assert found is None, f"{name} holds {found and found.group(0)}"


def test_committed_weights_stay_small() -> None:
    weights = sum(path.stat().st_size for path in (ROOT / "training").rglob("*.safetensors"))
    assert weights <= 40_000_000, f"{weights / 1e6:.1f} MB of weights; the whole project has 40 MB"
