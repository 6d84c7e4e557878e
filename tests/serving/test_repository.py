from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from clipship.core import images
from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import sha256_of
from clipship.core.images import ImageSpec
from clipship.core.tensors import ENCODED, ERROR, embedding_tensor, image_tensor
from clipship.serving.check import check_repository, model_names
from clipship.serving.config import config_from_text, text_from_config
from clipship.serving.graphs import classifier_outputs
from clipship.serving.repository import (
    Backend,
    Facts,
    configs_from_facts,
    facts_from_bundle,
    repository_from_bundle,
    sources_folder,
)
from tests.serving.bundles import EMBED_DIM, NAMES, SIZE_PX, jpeg_bytes, write_bundle
from tests.serving.processes import python

GOLDENS = Path(__file__).parents[2] / "triton_models" / "goldens"
MODELS = ["classifier", "classify", "classify_encoded", "embed", "image_encoder", "preprocess"]
FACTS = Facts(
    bundle_digest="b" * 64,
    vocabulary_digest="c" * 64,
    image_spec=ImageSpec(size_px=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)),
    embed_dim=512,
    top_k=5,
)


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
@pytest.mark.parametrize("model", MODELS)
def test_the_text_of_each_configuration_is_pinned(backend: Backend, model: str) -> None:
    text = text_from_config(configs_from_facts(FACTS, backend)[model])
    golden = GOLDENS / backend / model / "config.pbtxt"
    if os.environ.get("CLIPSHIP_WRITE_GOLDENS"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_there_is_a_golden_for_each_model_and_no_other() -> None:
    for backend in ("python", "onnxruntime"):
        assert sorted(path.name for path in (GOLDENS / backend).iterdir()) == MODELS


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_a_written_repository_passes_the_check(bundle: Bundle, tmp_path: Path, backend: Backend) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend=backend)
    assert check_repository(out) == []
    assert model_names(out) == MODELS
    config = config_from_text((out / "image_encoder" / "config.pbtxt").read_text())
    assert config.backend == backend
    assert list(config.input[0].dims) == [SIZE_PX, SIZE_PX, 3]
    assert list(config.output[0].dims) == [EMBED_DIM]
    assert (out / "image_encoder/1/model.py").exists() == (backend == "python")


def test_the_files_are_the_bundles_and_ours(bundle: Bundle, tmp_path: Path) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    assert sha256_of(out / "image_encoder/1/model.onnx") == bundle.files["image_encoder.onnx"]
    assert images.__file__ is not None
    assert (out / "preprocess/1/clipship_images.py").read_bytes() == Path(images.__file__).read_bytes()
    encoded = (out / "preprocess/warmup/encoded").read_bytes()
    assert encoded == len(jpeg_bytes(0)).to_bytes(4, "little") + jpeg_bytes(0)
    assert len((out / "image_encoder/warmup/image").read_bytes()) == SIZE_PX * SIZE_PX * 3


def test_top_k_is_cut_to_the_vocabulary(bundle: Bundle) -> None:
    assert facts_from_bundle(bundle, max_batch_size=4, top_k=1000).top_k == len(NAMES)


@pytest.mark.parametrize(("max_batch_size", "top_k"), [(0, 5), (8, 0), (-1, 5)])
def test_numbers_out_of_range_are_refused(bundle: Bundle, tmp_path: Path, max_batch_size: int, top_k: int) -> None:
    with pytest.raises(UsageError, match="give 1 or more"):
        repository_from_bundle(bundle, tmp_path / "r", backend="python", max_batch_size=max_batch_size, top_k=top_k)
    assert not (tmp_path / "r").exists()


def test_an_unverified_bundle_is_refused(tmp_path: Path) -> None:
    failed = write_bundle(tmp_path / "bundle", passed=False)
    with pytest.raises(CheckFailed, match="verification did not pass"):
        repository_from_bundle(failed, tmp_path / "repository", backend="python")
    assert not (tmp_path / "repository").exists()


def test_a_folder_of_something_else_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a clipship repository"):
        repository_from_bundle(bundle, tmp_path, backend="python")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="is a file"):
        repository_from_bundle(bundle, tmp_path / "thesis.txt", backend="python")


def test_an_old_repository_is_replaced_as_a_whole(bundle: Bundle, tmp_path: Path) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    (out / "stray").mkdir()
    repository_from_bundle(bundle, out, backend="onnxruntime")
    assert model_names(out) == MODELS
    assert not (out / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_a_failure_leaves_the_old_repository(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    before = sorted(out.rglob("*"))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipship.serving.repository._write_warmup_files", full)
    with pytest.raises(OSError, match="No space"):
        repository_from_bundle(bundle, out, backend="onnxruntime")
    assert sorted(out.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def constants_of(model: str) -> dict[str, object]:
    """The constants at the top of a model's source."""
    tree = ast.parse((sources_folder() / "python" / model / "model.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in assigned}


def test_model_sources_spell_the_tensor_names_of_core() -> None:
    """They run in Triton's own Python and cannot import core, so their spelling is compared here."""
    image, embedding = image_tensor(1).name, embedding_tensor(1).name
    assert constants_of("preprocess") == {"INPUT": ENCODED.name, "PIXELS": image, "ERROR": ERROR.name}
    assert constants_of("image_encoder") == {"INPUT": image, "OUTPUT": embedding}
    outputs = tuple(tensor.name for tensor in classifier_outputs(1))
    assert constants_of("classifier") == {"INPUT": embedding, "OUTPUTS": outputs}


def test_the_client_imports_no_torch_and_fast() -> None:
    program = (
        "import sys, time; start = time.process_time(); import clipship.serving.client; "
        "print(time.process_time() - start, *({'torch', 'onnx', 'onnxruntime', 'pyarrow', 'grpc'} & set(sys.modules)))"
    )
    runs = [python(program).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.5
    assert [heavy for _, *heavy in runs] == [[], [], []]
