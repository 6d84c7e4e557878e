"""The table of precisions: complete, and the only one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from clipship.core.precisions import PRECISIONS, REDUCED
from clipship.core.tolerances import TOLERANCES

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "core/clipship/core/precisions.py"


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_is_complete(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    spec = PRECISIONS[name]
    assert onnx.TensorProto.DataType.Value(spec.onnx_type) > 0
    assert spec.openvino_reads in (None, *PRECISIONS)
    assert TOLERANCES[name] is spec.tolerance
    assert (name in REDUCED) == (name != "fp32")


def test_no_other_module_lists_the_precisions() -> None:
    """A new one would be left out there. (Training's autocast is another matter.)"""
    files = [path for stage in ("core", "export", "serving") for path in (ROOT / stage).rglob("*.py") if path != TABLE]
    assert len(files) > 50
    lists = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict | ast.Subscript)
        and len({one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & set(PRECISIONS)) > 1
    ]
    assert lists == []
