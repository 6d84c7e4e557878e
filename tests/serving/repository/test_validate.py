from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipship.serving.errors import RepositoryError, ServerFailed
from clipship.serving.repository.config_pbtxt import config_from_text, text_from_config
from clipship.serving.repository.golden_samples import SAMPLES
from clipship.serving.repository.requirements import Requirements
from clipship.serving.repository.validate import STRICTER, repository_problems, validate_repository
from clipship.serving.server import process as server_module


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Change one model's configuration in place."""
    path = folder / "config.pbtxt"
    config = config_from_text(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(text_from_config(config), encoding="utf-8")


def test_a_good_repository_has_no_problem(copy: Path) -> None:
    assert repository_problems(copy) == []
    assert Requirements(copy).backends == {"python"}


def swap_first_step(config: Any) -> None:
    config.ensemble_scheduling.step[0].model_name = "nobody"


def forget_input(config: Any) -> None:
    del config.ensemble_scheduling.step[0].input_map["image"]


def feed_too_much(config: Any) -> None:
    config.ensemble_scheduling.step[0].input_map["extra"] = "image"


def take_too_much(config: Any) -> None:
    config.ensemble_scheduling.step[0].output_map["extra"] = "more"


def produce_twice(config: Any) -> None:
    config.ensemble_scheduling.step.append(config.ensemble_scheduling.step[1])


def drop_last_step(config: Any) -> None:
    del config.ensemble_scheduling.step[-1]


def widen_output(config: Any) -> None:
    config.output[0].dims[0] += 1


def retype_output(config: Any) -> None:
    config.output[0].data_type = config.output[1].data_type


def prefer_too_much(config: Any) -> None:
    config.dynamic_batching.preferred_batch_size.append(99)


def name_absent_version(config: Any) -> None:
    config.version_policy.specific.versions[:] = [7]


def batch_nothing(config: Any) -> None:
    config.max_batch_size = 0
    del config.model_warmup[1:]  # of the largest batch


EDITS: list[tuple[str, Callable[[Any], object], str]] = [
    ("image_encoder", lambda c: setattr(c, "name", "encoder"), "must be that of its folder"),
    ("image_encoder", lambda c: c.ClearField("input"), "has no input"),
    ("image_encoder", lambda c: c.ClearField("output"), "has no output"),
    ("image_encoder", lambda c: c.input.append(c.input[0]), "'image' occurs twice"),
    ("image_encoder", lambda c: setattr(c.input[0], "data_type", 0), "has no data_type"),
    ("image_encoder", lambda c: setattr(c.input[0], "name", ""), "has no name"),
    ("image_encoder", lambda c: c.input[0].ClearField("dims"), "dims []"),
    ("classifier", lambda c: c.output[0].dims.append(0), "give positive sizes"),
    ("image_encoder", lambda c: setattr(c, "max_batch_size", -1), "max_batch_size is -1"),
    ("preprocess", batch_nothing, STRICTER),
    ("image_encoder", lambda c: setattr(c, "backend", "tensorflow"), "backend 'tensorflow' is not one of"),
    ("image_encoder", lambda c: setattr(c.model_warmup[0], "batch_size", 99), "batch size 99"),
    ("image_encoder", lambda c: c.model_warmup[0].inputs.clear(), "feeds [], the model takes ['image']"),
    ("image_encoder", lambda c: c.model_warmup[0].inputs["image"].dims.append(1), "type or dims differ"),
    (
        "image_encoder",
        lambda c: setattr(c.model_warmup[0].inputs["image"], "input_data_file", "gone"),
        "warmup/gone is missing",
    ),
    ("preprocess", lambda c: c.model_warmup[0].inputs["encoded"].dims.__setitem__(0, -1), "must all be positive"),
    ("classify", lambda c: c.instance_group.add(count=1), "must not have instance_group"),
    ("classify", lambda c: c.optimization.graph.SetInParent(), "must not have optimization"),
    ("classify", lambda c: c.model_warmup.add(name="x"), "must not have model_warmup"),
    ("classify", lambda c: c.dynamic_batching.SetInParent(), "must not have dynamic_batching"),
    ("classify", lambda c: c.ensemble_scheduling.ClearField("step"), "at least one step"),
    ("classify", swap_first_step, "no such model"),
    ("classify", forget_input, "its input 'image' is not fed"),
    ("classify", feed_too_much, "it has no input 'extra'"),
    ("classify", take_too_much, "it has no output 'extra'"),
    ("classify", produce_twice, "'encoded_image' has two producers"),
    ("classify", drop_last_step, "'scores', which is the ensemble's output, has no producer"),
    ("classify", widen_output, "differ in type or dims"),
    ("classify", retype_output, "differ in type or dims"),
    ("classify", lambda c: setattr(c, "max_batch_size", 9), "is below the ensemble's 9"),
    ("image_encoder", prefer_too_much, "prefers batches of 99"),
    ("classifier", name_absent_version, "its version_policy names versions that do not exist (7)"),
    ("embed", lambda c: setattr(c.ensemble_scheduling.step[0], "model_name", "embed"), "the ensemble holds itself"),
]


@pytest.mark.parametrize(("model", "change", "message"), EDITS, ids=[message for _, _, message in EDITS])
def test_each_rule_finds_its_mistake(copy: Path, model: str, change: Callable[[Any], object], message: str) -> None:
    edit(copy / model, change)
    found = repository_problems(copy)
    assert [text for text in found if message in text and text.startswith(f"{model}: ")], found


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize(("model", "change", "message"), EDITS, ids=[message for _, _, message in EDITS])
def test_each_rule_is_tritons(
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    change: Callable[[Any], object],
    message: str,
) -> None:
    edit(copy / model, change)
    monkeypatch.setattr(server_module, "validate_repository", lambda path: None)
    monkeypatch.setattr(Requirements, "backends", {"python"})
    if message == STRICTER:
        (copy / "image_encoder" / SAMPLES).unlink()  # it loads, and then takes no batch of golden samples
        server_module.start_server(copy).stop()
    else:
        with pytest.raises(ServerFailed):
            server_module.start_server(copy)


def test_missing_and_broken_files(copy: Path) -> None:
    (copy / "classifier" / "config.pbtxt").unlink()
    (copy / "embed" / "config.pbtxt").write_text('name: "embed"\nmax_batch: 3\n')
    shutil.rmtree(copy / "classify" / "1")
    (copy / "image_encoder" / "1" / "model.py").unlink()
    found = " | ".join(repository_problems(copy))
    assert "classifier: config.pbtxt is missing" in found
    assert "embed: config.pbtxt: not a model configuration: 2:1" in found
    assert "classify: it has no version folder" in found
    assert "image_encoder: 1/model.py is missing" in found


def test_versions_that_are_not_served_may_lack_files(copy: Path) -> None:
    """A publish that was killed may leave one behind; Triton never looks at it."""
    (copy / "classifier" / "2").mkdir()
    assert repository_problems(copy) == []


def test_version_folders_are_positive_numbers(copy: Path) -> None:
    (copy / "embed" / "1").rename(copy / "embed" / "0")
    assert repository_problems(copy) == ["embed: it has no version folder (1/)"]


def test_the_error_is_one_that_says_what_to_do(copy: Path, tmp_path: Path) -> None:
    edit(copy / "classify", swap_first_step)
    with pytest.raises(RepositoryError, match=r"step 1 \(nobody\).*write it again with clipship repository") as caught:
        validate_repository(copy)
    assert caught.value.exit_code == 2
    with pytest.raises(RepositoryError, match="no model repository there"):
        repository_problems(tmp_path / "nowhere")
