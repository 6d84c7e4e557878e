"""The oldest and the newest versions of the runtimes, and the table that guides/precision.md promises."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from benchmarks.runtimes import (
    PROMISED,
    Graph,
    Outcome,
    broken_promises,
    ends_of,
    graphs_of,
    image_graph,
    outcomes_in,
    problem_in,
    table_of,
    text_graph,
)

from clipship.core.bundle import TEXT_ENCODER, Bundle
from clipship.core.vocabulary import Vocabulary
from clipship.export.onnx_graph import OPSETS
from clipship.export.pack import bundle_from_method
from clipship.export.reference import Picture
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of
from tests.export.graphs import value_types

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "guides" / "precision.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
OLD = Outcome(graph="text encoder", opset=18, runtime="onnxruntime", version="1.17.0", problem="")


@pytest.fixture(scope="module")
def graphs(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> list[Graph]:
    folder = tmp_path_factory.mktemp("graphs")
    return list(graphs_of(method_of(clip, "sync-clip"), Vocabulary(names=NAMES), pictures[:40], folder))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", PROMISED)
def test_the_oldest_and_the_newest_version_give_pytorchs_features(runtime: str, graphs: list[Graph]) -> None:
    for requirement in ends_of(runtime):
        outcomes = outcomes_in(requirement, graphs)
        assert broken_promises(outcomes) == []
        assert {one.opset for one in outcomes if not one.problem} >= {18, 20}
    assert {one.opset for one in outcomes if not one.problem} == set(OPSETS), "the newest runs all profiles"


@pytest.fixture(scope="module")
def bundle(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "coop"
    return bundle_from_method(method_of(clip, "coop"), Vocabulary(names=NAMES), pictures[:40], out, provenance={})


def test_a_graph_is_judged_in_a_process_of_its_own(bundle: Bundle, clip: Clip, tmp_path: Path) -> None:
    """Here with the Python of the tests instead of a new environment's."""
    here = Path(sys.executable)
    text = text_graph(bundle, method_of(clip, "coop"), 18)
    image = image_graph(bundle, bundle.image_encoders[0])
    assert [problem_in(here, "onnxruntime", one) for one in (text, image)] == ["", ""]
    assert "max_abs" in problem_in(here, "onnxruntime", replace(image, rows=255 - image.rows))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert "the graph failed" in problem_in(here, "onnxruntime", replace(image, path=tmp_path / "broken.onnx"))


def test_the_text_encoder_has_no_argmax_over_int64(bundle: Bundle) -> None:
    """ONNX Runtime has it since 1.20 only."""
    types = value_types(bundle.path / TEXT_ENCODER)
    searches = [node for node in onnx.load(bundle.path / TEXT_ENCODER).graph.node if node.op_type == "ArgMax"]
    assert [types[node.input[0]] for node in searches] == [onnx.TensorProto.INT32]


def test_the_table_and_the_promises() -> None:
    new = replace(OLD, version="1.32.0", problem="no kernel")
    bf16 = replace(new, graph="image encoder, bf16")
    late = replace(OLD, opset=23, problem="Unsupported model IR version: 11")
    assert broken_promises([OLD, new, bf16, late]) == [new]
    table = table_of([OLD, replace(OLD, version="1.9.0"), new, bf16, late])
    assert table.rows == (
        ("text encoder", "18", "1.9.0 to 1.17.0 [1]", "not served by it"),
        ("image encoder, bf16", "18", "none [1]", "not served by it"),
        ("text encoder", "23", "none [2]", "not served by it"),
    )
    assert table.notes == (
        "ONNX Runtime 1.32.0: no kernel",
        "ONNX Runtime 1.17.0: Unsupported model IR version: 11",
    )


def test_the_docs_promise_what_is_tested() -> None:
    rows = re.findall(r"^\| (.+) \| (18|20|23) \| (\S+) .*\| (\S+) .*\|$", DOCS, re.MULTILINE)
    for column, opsets in enumerate(PROMISED.values(), start=2):
        for opset, promised in opsets.items():
            firsts = [row[column] for row in rows if row[1] == str(opset) and row[column][0].isdigit()]
            assert max(firsts, key=lambda version: [int(part) for part in version.split(".")]) == promised
    assert PROMISED["openvino"][18] in [one.removeprefix("openvino>=") + ".0" for one in EXTRAS["openvino"]]
