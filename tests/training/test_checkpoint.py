"""Checkpoints: whole, strict, and tied to their base model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipship.core.errors import CheckpointError
from clipship.core.files import sha256_of
from clipship.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    method_from_checkpoint,
    save_checkpoint,
    save_scores,
)
from clipship.training.methods import Task, build_method, config_of
from clipship.training.model.clip import Clip, load_clip

from .conftest import write_model

TASK = Task(class_names=("red", "green", "blue"), num_base=2, templates=("a photo of a {}.",))


@pytest.fixture
def checkpoint(clip: Clip) -> Checkpoint:
    config = config_of("coop", recipe="test", base_model=clip.name, epochs=1, seed=7, context_init="")
    return Checkpoint(
        config=config,
        task=TASK,
        dataset="Colours",
        data_digest="0" * 64,
        base_model_digest=clip.digest,
        learned=build_method(clip, config, TASK).learned(),
        losses=({"epoch": 1, "learning_rate": 1e-5, "total": 1.5},),
    )


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run", checkpoint)
    return tmp_path / "run"


def test_a_checkpoint_comes_back_as_it_was(checkpoint: Checkpoint, saved: Path, clip: Clip) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.to_json() == checkpoint.to_json()
    assert torch.equal(loaded.learned["context"], checkpoint.learned["context"])
    method = method_from_checkpoint(loaded)
    assert not method.training
    assert torch.equal(method.learned()["context"], checkpoint.learned["context"])
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint.json", "learned.safetensors"]


def test_the_record_says_what_it_came_from(saved: Path, clip: Clip) -> None:
    record = json.loads((saved / "checkpoint.json").read_text())
    assert (record["format"], record["format_version"]) == ("clipship-checkpoint", 2)
    assert (record["seed"], record["base_model"], record["base_model_digest"]) == (7, clip.name, clip.digest)
    assert (record["class_names"], record["num_base"], record["selection"]) == (
        ["red", "green", "blue"],
        2,
        "last step",
    )
    assert record["scores"] == {}
    assert torch.__version__.startswith(record["versions"]["torch"])


def test_scores_are_added_to_the_record(saved: Path) -> None:
    save_scores(saved, "prints", {"base": 50.0})
    save_scores(saved, "neon", {"all": 9.0})
    assert load_checkpoint(saved).scores == {"prints": {"base": 50.0}, "neon": {"all": 9.0}}


def test_another_base_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = load_clip(str(write_model(tmp_path / "other", seed=1)))
    with pytest.raises(CheckpointError, match="load the model it was trained on"):
        method_from_checkpoint(load_checkpoint(saved), other)


def _rewrite(saved: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Change the tensors and keep the digest right, as someone who edits a checkpoint would."""
    save_file(tensors, saved / "learned.safetensors")
    record = json.loads((saved / "checkpoint.json").read_text())
    record["learned_sha256"] = sha256_of(saved / "learned.safetensors")
    (saved / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "type"])
def test_tensors_that_do_not_fit_are_refused(saved: Path, clip: Clip, fault: str) -> None:
    tensors = load_file(saved / "learned.safetensors")
    changed = {
        "missing": {"other": tensors["context"]},
        "extra": {**tensors, "zeta": torch.zeros(1)},
        "misshapen": {"context": tensors["context"][:, :3].contiguous()},
        "type": {"context": tensors["context"].double()},
    }
    _rewrite(saved, changed[fault])
    with pytest.raises(CheckpointError, match="'zeta'" if fault == "extra" else "'context'"):
        method_from_checkpoint(load_checkpoint(saved), clip)


def test_damage_is_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_checkpoint(tmp_path)
    record = (saved / "checkpoint.json").read_text()
    faults = {
        "{": "not JSON",
        "[]": "is not 'clipship-checkpoint' version 2",
        record.replace('"format_version": 2', '"format_version": 9'): "version 9 is not",
        record.replace('"num_base"', '"num_bass"'): "malformed",
        record.replace('"momentum"', '"moment"'): "malformed",
    }
    for content, message in faults.items():
        (saved / "checkpoint.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved)
    (saved / "checkpoint.json").write_text(record)
    with (saved / "learned.safetensors").open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\xff")
    with pytest.raises(CheckpointError, match="is missing or has changed"):
        load_checkpoint(saved)


def test_a_checkpoint_of_version_0_5_is_read(saved: Path, checkpoint: Checkpoint, clip: Clip) -> None:
    """Its settings are those of all methods in one flat object."""
    golden = json.loads((Path(__file__).parent / "recipes-0.5.json").read_text(encoding="utf-8"))
    record = json.loads((saved / "checkpoint.json").read_text())
    assert golden["defaults"].keys() > record["config"].keys()
    record["config"] = {**golden["defaults"], **record["config"]}
    (saved / "checkpoint.json").write_text(json.dumps(record))
    loaded = load_checkpoint(saved)
    assert loaded.config == checkpoint.config
    assert torch.equal(method_from_checkpoint(loaded, clip).learned()["context"], checkpoint.learned["context"])
