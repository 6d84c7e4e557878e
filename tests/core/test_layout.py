"""The guard rails of the layout: namespace package, import arrows, house limits, no traces of a machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("core", "training", "export", "serving")
MAY_IMPORT = {"core": {"core"}, "training": {"core", "training"}, "serving": {"core", "serving"}} | {
    "export": {"core", "training", "export"}
}


def sources(stage: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / stage / "clipship").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_a_typed_portion_of_the_namespace(stage: str) -> None:
    assert not (ROOT / stage / "clipship" / "__init__.py").exists(), "it would hide the other stages"
    assert (ROOT / stage / "clipship" / stage / "py.typed").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_imports_follow_the_arrows(stage: str) -> None:
    for path, tree in sources(stage):
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("clipship."):
                    assert name.split(".")[1] in MAY_IMPORT[stage], f"{path.relative_to(ROOT)} imports {name}"


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
