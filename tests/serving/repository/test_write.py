from __future__ import annotations

import ast
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipship.core import precisions, tolerances
from clipship.core.bundle import Bundle
from clipship.core.cli.main import main
from clipship.core.errors import CheckFailed, PlanError, UsageError
from clipship.core.files import sha256_of, sha256_of_bytes
from clipship.core.images import decoding as images
from clipship.core.images.decoding import ImageSpec
from clipship.core.machine import processor
from clipship.core.machine import runtimes as cpu
from clipship.core.tensorrt_plan import BatchProfile, PlanInfo, TensorRtPlan, read_plan, write_plan
from clipship.core.tensors import ENCODED, ERROR, embedding_tensor, image_tensor, passthrough_tensor
from clipship.serving.repository.backends import BACKENDS
from clipship.serving.repository.classifier_graph import classifier_outputs
from clipship.serving.repository.config_pbtxt import config_from_text, text_from_config
from clipship.serving.repository.models import (
    ModelSettings,
    VocabularySettings,
    configs_from_settings,
    model_settings_from_bundle,
)
from clipship.serving.repository.requirements import model_names
from clipship.serving.repository.tuning import Tuning
from clipship.serving.repository.validate import repository_problems
from clipship.serving.repository.write import repository_from_bundle, sources_folder
from clipship.serving.server.container import Ports, container_command
from tests.serving.bundles import EMBED_DIM, NAMES, SIZE_PX, jpeg_bytes, write_bundle
from tests.serving.processes import python
from tests.serving.publish.vocabularies import write_variant

GOLDENS = Path(__file__).parents[3] / "triton_models" / "goldens"
MODELS = ["admission", "classifier", "classify", "classify_encoded", "embed", "image_encoder", "preprocess"]
MODELS_OF: dict[str, list[str]] = {
    "python": sorted([*MODELS, "admission_pixels"]),
    "onnxruntime": MODELS,
    "tensorrt": MODELS,
}
FACTS = ModelSettings(
    vocabularies=(VocabularySettings(bundle_digest="b" * 64, vocabulary_digest="c" * 64, top_k=5),),
    image_spec=ImageSpec(size_px=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)),
    embed_dim=512,
)
PLAN = PlanInfo(
    runtime="tensorrt",
    runtime_version="10.14.1.48",
    gpus=("sm89",),
    platform="linux",
    precision="fp16",
    profile=BatchProfile(),
    input=image_tensor(SIZE_PX),
    output=embedding_tensor(EMBED_DIM),
    onnx_file="image_encoder.onnx",
    onnx_digest="a" * 64,
    bundle_digest="b" * 64,
    plan_digest="c" * 64,
    plan_bytes=1,
    build_s=1.0,
    layers={"MATRIX_MULTIPLY HALF": 25},
)


@pytest.mark.parametrize(
    ("backend", "model"), [(backend, model) for backend in MODELS_OF for model in MODELS_OF[backend]]
)
def test_the_text_of_each_configuration_is_pinned(backend: str, model: str) -> None:
    plans = (PLAN, replace(PLAN, gpus=("sm80",), precision="bf16")) if backend == "tensorrt" else ()
    text = text_from_config(configs_from_settings(replace(FACTS, plans=plans), BACKENDS[backend])[model])
    refuse_difference(GOLDENS / backend / model / "config.pbtxt", text)


def refuse_difference(golden: Path, text: str) -> None:
    """Compare with a golden file, or write it when that is asked for."""
    if os.environ.get("CLIPSHIP_WRITE_GOLDENS"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


TUNED: dict[str, tuple[str, Tuning]] = {
    "onnxruntime-tuned": (
        "onnxruntime",
        Tuning(
            instances=2,
            decoders=3,
            gpus=(0, 1),
            max_queue_delay_us=500,
            max_queue_size=64,
            queue_timeout_s=5,
            preferred_batch_sizes=(16, 64),
            warmup_batch_sizes=(1, 8, 64),
            accelerator="tensorrt",
            response_cache=True,
        ),
    ),
    "tensorrt-tuned": ("tensorrt", Tuning(cuda_graphs=True, preferred_batch_sizes=(32,), gpus=(1,))),
    "python-tuned": ("python", Tuning(threads=2, warmup_batch_sizes=(4,))),
}
TUNED_MODELS = [
    "admission",
    "classifier-birds",
    "classify-birds",
    "classify_encoded-birds",
    "image_encoder",
    "preprocess",
]
BIRDS = VocabularySettings(name="birds", bundle_digest="d" * 64, vocabulary_digest="e" * 64, top_k=3)


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("model", TUNED_MODELS)
def test_the_text_of_tuned_configurations_is_pinned(name: str, model: str) -> None:
    backend, tuning = TUNED[name]
    plans = (PLAN,) if backend == "tensorrt" else ()
    vocabularies = (*FACTS.vocabularies, BIRDS)
    facts = replace(FACTS, plans=plans, tuning=tuning, vocabularies=vocabularies, encoder_digest="f" * 64)
    refuse_difference(
        GOLDENS / name / model / "config.pbtxt",
        text_from_config(configs_from_settings(facts, BACKENDS[backend])[model]),
    )


def test_there_is_a_golden_for_each_model_and_no_other() -> None:
    for backend, models in MODELS_OF.items():
        assert sorted(path.name for path in (GOLDENS / backend).iterdir()) == models
    for name in TUNED:
        assert sorted(path.name for path in (GOLDENS / name).iterdir()) == TUNED_MODELS


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("python", {"device": "gpu"}, "the python backend runs on the CPU"),
        ("python", {"gpus": (0,)}, "the python backend runs on the CPU"),
        ("tensorrt", {"device": "cpu"}, "the tensorrt backend runs on GPUs"),
        ("tensorrt", {"threads": 2}, "--threads is for an encoder on the CPU"),
        ("onnxruntime", {"cuda_graphs": True}, "CUDA graphs need plans: give --backend tensorrt"),
        ("python", {"accelerator": "tensorrt"}, "accelerator needs --backend onnxruntime and a GPU"),
        ("python", {"preferred_batch_sizes": (65,)}, "preferred batch size 65: give 1 to 64"),
        ("python", {"warmup_batch_sizes": (0,)}, "warm-up batch size 0: give 1 to 64"),
        ("python", {"instances": 0}, "instances is 0: give 1 or more"),
        ("python", {"threads": 0}, "threads is 0: give 1 or more"),
        ("python", {"queue_timeout_s": -1.0}, "queue_timeout_s -1"),
        ("onnxruntime", {"gpus": (1, 1)}, "give each number once"),
        ("onnxruntime", {"gpus": (1,), "device": "cpu"}, "GPUs were named for the device cpu"),
    ],
)
def test_tuning_that_contradicts_itself_is_refused(backend: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tuning(**changes).validate_backend(BACKENDS[backend], 64)


def test_several_vocabularies_share_one_encoder(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    birds, foreign = write_variant(tmp_path / "birds", 1), write_variant(tmp_path / "foreign", 1, seed=3)
    command = ["repository", str(bundle.path), "--out", str(tmp_path / "r"), "--vocabulary"]
    assert main([*command, f"birds={birds.path}"]) == 0
    assert repository_problems(tmp_path / "r") == []
    assert model_names(tmp_path / "r") == sorted(
        [*MODELS_OF["python"], *(name for name in TUNED_MODELS if "-" in name)]
    )
    config = config_from_text((tmp_path / "r/classifier-birds/config.pbtxt").read_text())
    assert config.parameters["vocabulary_digest"].string_value == birds.vocabulary.digest
    assert main([*command, f"birds={foreign.path}"]) == 2
    assert main([*command, f"No Name={birds.path}"]) == 2
    assert main([*command, "birds"]) == 2
    assert main([*command, f"birds={birds.path}", "--vocabulary", f"birds={birds.path}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    wanted = ("another image encoder than", "lower-case letters", "give NAME=BUNDLE", "have the same name")
    assert [want in error for want, error in zip(wanted, errors, strict=True)] == [True] * 4


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_a_written_repository_passes_the_check(bundle: Bundle, tmp_path: Path, backend: str) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend=backend)
    assert repository_problems(out) == []
    assert model_names(out) == MODELS_OF[backend]
    config = config_from_text((out / "image_encoder" / "config.pbtxt").read_text())
    assert config.backend == backend
    assert list(config.input[0].dims) == [SIZE_PX, SIZE_PX, 3]
    assert list(config.output[0].dims) == [EMBED_DIM]
    assert (out / "image_encoder/1/model.py").exists() == (backend == "python")


def test_the_files_are_the_bundles_and_ours(bundle: Bundle, tmp_path: Path) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    assert sha256_of(out / "image_encoder/1/model.onnx") == bundle.files["image_encoder.onnx"]
    for model in ("admission", "admission_pixels", "preprocess", "image_encoder"):
        doors = out / model / "1/clipship_doors.py"
        assert doors.read_bytes() == (GOLDENS.parent / "python" / "doors.py").read_bytes()
    copies = {
        "preprocess/1/clipship_images.py": images,
        "image_encoder/1/clipship_runtimes.py": cpu,
        "image_encoder/1/clipship_processor.py": processor,
        **{f"{model}/1/clipship_precisions.py": precisions for model in ("preprocess", "image_encoder", "classifier")},
        **{f"{model}/1/clipship_tolerances.py": tolerances for model in ("preprocess", "image_encoder", "classifier")},
    }
    for copy, module in copies.items():
        assert module.__file__ is not None
        source = Path(module.__file__).read_text(encoding="utf-8")
        expected = source.replace("from clipship.core.precisions", "from clipship_precisions")
        assert (out / copy).read_text(encoding="utf-8") == expected
        assert "import clipship" not in expected
    encoded = (out / "preprocess/warmup/encoded").read_bytes()
    assert encoded == len(jpeg_bytes(0)).to_bytes(4, "little") + jpeg_bytes(0)
    assert len((out / "image_encoder/warmup/image").read_bytes()) == SIZE_PX * SIZE_PX * 3


def test_top_k_is_cut_to_the_vocabulary(bundle: Bundle) -> None:
    settings = model_settings_from_bundle(bundle, max_batch_size=4, top_k=1000)
    assert settings.vocabularies[0].top_k == len(NAMES)


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
    assert model_names(out) == MODELS_OF["onnxruntime"]
    assert not (out / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_a_failure_leaves_the_old_repository(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    before = sorted(out.rglob("*"))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipship.serving.repository.write._write_warmup_files", full)
    with pytest.raises(OSError, match="No space"):
        repository_from_bundle(bundle, out, backend="onnxruntime")
    assert sorted(out.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def plan_of(bundle: Bundle, folder: Path, **changes: Any) -> TensorRtPlan:
    """A plan of ``bundle`` on disk, with ``changes``. Its code is not run here."""
    data = f"machine code {changes}".encode()
    info = replace(PLAN, onnx_digest=bundle.files["image_encoder.onnx"], plan_digest=sha256_of_bytes(data), **changes)
    folder.mkdir(parents=True)
    write_plan(folder, data, info)
    return read_plan(folder)


def test_one_plan_is_the_encoder(bundle: Bundle, tmp_path: Path) -> None:
    plan = plan_of(bundle, tmp_path / "plan")
    out = repository_from_bundle(bundle, tmp_path / "r", backend="tensorrt", plans=[plan])
    assert repository_problems(out) == []
    assert sorted(path.name for path in (out / "image_encoder/1").iterdir()) == ["model.plan"]
    assert (out / "image_encoder/1/model.plan").read_bytes() == plan.data
    config = config_from_text((out / "image_encoder/config.pbtxt").read_text())
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert dict(config.cc_model_filenames) == {"8.9": "model.plan"}
    assert config.parameters["tensorrt_version"].string_value == "10.14.1.48"
    assert config_from_text((out / "classifier/config.pbtxt").read_text()).backend == "onnxruntime"
    assert (out / "classifier/1/model.onnx").is_file()
    assert "docker run --rm --gpus=all " in container_command(out, Ports())
    assert "tritonserver:25.12-py3" in container_command(out, Ports())
    assert "version_compatible" not in config.parameters


def test_several_plans_and_the_one_for_all_other_gpus(bundle: Bundle, tmp_path: Path) -> None:
    ada = plan_of(bundle, tmp_path / "ada")
    ampere = plan_of(bundle, tmp_path / "ampere", gpus=("sm80",), hardware_compatible=True)
    out = repository_from_bundle(bundle, tmp_path / "r", backend="tensorrt", plans=[ada, ampere])
    config = config_from_text((out / "image_encoder/config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {"8.0": "model_sm80.plan", "8.9": "model_sm89.plan"}
    assert config.default_model_filename == "model_sm80.plan"
    assert repository_problems(out) == []
    (out / "image_encoder/1/model_sm89.plan").unlink()
    assert repository_problems(out) == ["image_encoder: 1/model_sm89.plan is missing"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"runtime": "tensorrt-rtx"}, {}, "plan of tensorrt-rtx, which TensorRT, and so Triton, cannot load"),
        ({"weights_stripped": True}, {}, "weights are stripped"),
        ({"platform": "win32"}, {}, "built on win32"),
        ({}, {"tensorrt_version": "10.13.2"}, "of tensorrt 10.14.1.48 and would run on 10.13.2"),
    ],
)
def test_plans_that_the_server_could_not_load_are_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, Any], arguments: dict[str, str], message: str
) -> None:
    plan = plan_of(bundle, tmp_path / "plan", **changes)
    with pytest.raises(PlanError, match=message):
        repository_from_bundle(bundle, tmp_path / "r", backend="tensorrt", plans=[plan], **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()


def test_a_plan_of_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", seed=1)
    with pytest.raises(PlanError, match=r"built from an image_encoder.onnx .* that .* does not have"):
        repository_from_bundle(bundle, tmp_path / "r", backend="tensorrt", plans=[plan_of(other, tmp_path / "plan")])


def test_plans_that_contradict_each_other_or_the_batches_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    plan = plan_of(bundle, tmp_path / "plan")
    from_two = plan_of(bundle, tmp_path / "from-two", profile=BatchProfile(min=2))
    newer = plan_of(bundle, tmp_path / "newer", gpus=("sm80",), runtime_version="10.15.0.1")
    cases: list[tuple[list[TensorRtPlan], dict[str, Any], str]] = [
        ([plan], {"max_batch_size": 65}, r"a batch of 65 images is outside the plan's profile \(1 to 64\)"),
        ([from_two], {}, "a batch of 1 images is outside"),
        ([plan, plan], {}, "two plans are for sm89"),
        ([plan, newer], {}, "of tensorrt 10.15.0.1 and would run on 10.14.1.48"),
        ([], {}, "give --plan with --backend tensorrt"),
        ([plan], {"backend": "python"}, "give --plan with --backend tensorrt only"),
    ]
    for plans, settings, message in cases:
        with pytest.raises(UsageError, match=message):
            repository_from_bundle(bundle, tmp_path / "r", **{"backend": "tensorrt", **settings}, plans=plans)
    assert not (tmp_path / "r").exists()


def test_the_command_line_takes_what_the_plans_take(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_of(bundle, tmp_path / "plan", profile=BatchProfile(opt=2, max=4))
    command = ["repository", str(bundle.path), "--backend", "tensorrt", "--out", str(tmp_path / "r")]
    assert main([*command, "--plan", str(tmp_path / "plan")]) == 0
    config = config_from_text((tmp_path / "r/image_encoder/config.pbtxt").read_text())
    assert config.max_batch_size == 4
    assert main([*command, "--plan", str(tmp_path / "plan"), "--max-batch-size", "5"]) == 2
    assert main([*command, "--plan", str(tmp_path / "absent")]) == 2
    assert "no plan there" in capsys.readouterr().err


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
    passed = passthrough_tensor(1).name
    assert constants_of("classifier") == {"INPUT": embedding, "OUTPUTS": outputs, "PASSTHROUGH": passed}


def test_the_client_imports_no_torch_and_fast() -> None:
    program = (
        "import sys, time; start = time.process_time(); import clipship.serving.client.classifier; "
        "print(time.process_time() - start, *({'torch', 'onnx', 'onnxruntime', 'pyarrow', 'grpc'} & set(sys.modules)))"
    )
    runs = [python(program).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.5
    assert [heavy for _, *heavy in runs] == [[], [], []]
