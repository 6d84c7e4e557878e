"""``clipship verify --url`` against a real Triton: one that serves the bundle, and ones with a mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clipship.core.bundle import Bundle
from clipship.core.cli.main import main
from clipship.core.comparison import Verification, batch_sizes_up_to, golden_samples
from clipship.core.errors import CheckFailed
from clipship.serving import ServerUnreachable
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.verify_server import verify_server
from tests.export.verification import graph_mutations
from tests.serving.bundles import write_bundle

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    return repository_from_bundle(bundle, out, backend="python", max_batch_size=8)


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with start_server(repository) as running:
        yield running


def live(bundle: Bundle, server: Server) -> Verification:
    url, sizes = server.endpoints.url, batch_sizes_up_to(64)
    return verify_server(bundle, url, [golden_samples(bundle)], precision="fp32", batch_sizes=sizes)


def test_what_is_served_equals_the_bundle(bundle: Bundle, server: Server) -> None:
    verification = live(bundle, server)
    assert verification, str(verification)
    assert [row.batch_size for row in verification.comparisons] == [1, 2, 7, 8]
    assert {row.model for row in verification.answers} == {"classify", "classify_encoded"}
    assert max(row.max_abs for row in verification.comparisons) < 1e-5
    assert max(row.max_score_difference for row in verification.answers) < 1e-5


def test_the_verb(bundle: Bundle, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle.path), "--url", server.endpoints.url, "--max-batch", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert f"Triton {server.endpoints.url}" in {row["provider"] for row in content["answers"]}


def test_another_bundles_server(server: Server, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", seed=9)
    with pytest.raises(CheckFailed, match=r"serves bundle .*, not .*: give the bundle it was started with"):
        live(other, server)


@contextmanager
def with_a_mistake(repository: Path, copy: Path, change: Callable[[Path], None]) -> Iterator[Server]:
    """Without golden samples: a server that has them checks itself, and is not served."""
    change(Path(shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("golden.npz"))))
    with start_server(copy) as running:
        yield running


def bgr_encoder(repository: Path) -> None:
    path = repository / "image_encoder" / "1" / "model.onnx"
    graph_mutations.sabotaged(path, graph_mutations.bgr, path)


def swapped_labels(repository: Path) -> None:
    path = repository / "classifier" / "1" / "model.onnx"
    model = onnx.load(path)
    (names,) = [one for one in model.graph.initializer if one.name == "names"]
    labels = numpy_helper.to_array(names)
    names.CopyFrom(numpy_helper.from_array(np.roll(labels, 1), "names"))
    onnx.save(model, path)


def bgr_preprocessing(repository: Path) -> None:
    path = repository / "preprocess" / "1" / "clipship_images.py"
    text = path.read_text(encoding="utf-8")
    assert "def pixels_from_bytes(" in text
    text += (
        "\n_right = pixels_from_bytes\ndef pixels_from_bytes(data, spec):\n    return _right(data, spec)[..., ::-1]\n"
    )
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (bgr_encoder, {"embed", "classify", "classify_encoded"}),
        (swapped_labels, {"classify", "classify_encoded"}),
        (bgr_preprocessing, {"classify_encoded"}),
    ],
)
def test_a_server_with_a_mistake_fails_where_it_is(
    bundle: Bundle, repository: Path, tmp_path: Path, change: Callable[[Path], None], failing: set[str]
) -> None:
    with with_a_mistake(repository, tmp_path / "repository", change) as running:
        verification = live(bundle, running)
    models = {row.form for row in verification.comparisons} | {row.model for row in verification.answers}
    failed = {row.form for row in verification.comparisons if not row}
    failed |= {row.model for row in verification.answers if not row}
    assert models == {"embed", "classify", "classify_encoded"}
    assert failed == failing


def test_a_server_that_ends_is_one_error(bundle: Bundle, repository: Path) -> None:
    with start_server(repository) as running:
        pass
    with pytest.raises(ServerUnreachable, match="no Triton answers"):
        live(bundle, running)
