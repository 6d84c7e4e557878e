"""The training loop: schedule, what it may touch, resuming, and what it refuses."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipship.core.errors import CheckFailed, DataError, RecipeError, UsageError
from clipship.training import loop
from clipship.training.checkpoint import Checkpoint, load_checkpoint, method_from_checkpoint
from clipship.training.clip import Clip, digest_of_tensors
from clipship.training.config import TrainConfig
from clipship.training.data import Dataset
from clipship.training.evaluate import evaluate
from clipship.training.methods import Batch
from clipship.training.methods.coop import CoOp
from clipship.training.synthetic import SyntheticSet


def _config(clip: Clip, method: str = "sync-clip", **changes: object) -> TrainConfig:
    config = TrainConfig(
        recipe="test", method=method, base_model=clip.name, shots=4, epochs=3, batch_size=4, learning_rate=0.02,
        text_depth=2, image_tokens=4, image_depth=3, domain_tokens=2, synthetic_weight=0.2, align_weight=0.1,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def _train(
    config: TrainConfig, dataset: Dataset, synthetic: SyntheticSet | None, out: Path, **more: object
) -> Checkpoint:
    return loop.train(config, dataset, out=out, synthetic=synthetic, device="cpu", **more)  # type: ignore[arg-type]


def test_the_learning_rate_is_the_published_schedule() -> None:
    config = TrainConfig(recipe="t", method="coop", base_model="x", epochs=5, learning_rate=0.0035)
    rates = [loop.learning_rate(config, epoch) for epoch in range(1, 6)]
    assert rates[:2] == [1e-5, 0.0035]
    assert rates[3] == pytest.approx(2.2908e-3, abs=5e-8)
    assert rates[4] == pytest.approx(1.2092e-3, abs=5e-8)


@pytest.mark.parametrize("method", ["coop", "sync-clip"])
def test_training_learns_and_leaves_clip_alone(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path, method: str
) -> None:
    before = digest_of_tensors(clip.model.state_dict())
    checkpoint = _train(_config(clip, method, epochs=6), dataset, synthetic, tmp_path / "run", clip=clip)
    assert digest_of_tensors(clip.model.state_dict()) == before
    assert checkpoint.losses[-1]["total"] < checkpoint.losses[0]["total"]
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.to_json() == checkpoint.to_json()
    assert [epoch["epoch"] for epoch in loaded.losses] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "state").exists()


def test_sync_clip_tells_the_colours_apart_better_than_zero_shot(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    """On random weights zero-shot is chance; prompts learned from a few images are not."""
    scores = {}
    for method in ("zero-shot", "sync-clip"):
        config = _config(clip, method, epochs=15, learning_rate=0.1, synthetic_weight=1.0)
        checkpoint = _train(config, dataset, synthetic, tmp_path / method, clip=clip)
        scores[method] = evaluate(method_from_checkpoint(checkpoint, clip), dataset).open_harmonic_mean
    assert scores["sync-clip"] > scores["zero-shot"] + 25


def test_equal_seeds_learn_equal_tensors_and_others_do_not(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    config = _config(clip, epochs=2)
    first, again, other = (
        _train(replace(config, seed=seed), dataset, synthetic, tmp_path / name, clip=clip).learned
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert digest_of_tensors(dict(first)) == digest_of_tensors(dict(again))
    assert digest_of_tensors(dict(first)) != digest_of_tensors(dict(other))


def test_workers_change_nothing(clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path) -> None:
    config = _config(clip, epochs=1)
    alone, helped = (
        _train(config, dataset, synthetic, tmp_path / str(workers), clip=clip, workers=workers).learned
        for workers in (0, 1)
    )
    assert digest_of_tensors(dict(alone)) == digest_of_tensors(dict(helped))


class _Stop(Exception):
    """Stands for a kill."""


def test_an_interrupted_run_ends_with_the_tensors_of_a_whole_one(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(clip)
    whole = _train(config, dataset, synthetic, tmp_path / "whole", clip=clip)
    step = loop._Run._step

    def stops(self: loop._Run, batch: Batch, place: str) -> dict[str, float]:
        if place == "epoch 3 step 2":
            raise _Stop
        return step(self, batch, place)

    monkeypatch.setattr(loop._Run, "_step", stops)
    with pytest.raises(_Stop):
        _train(config, dataset, synthetic, tmp_path / "cut", clip=clip)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="holds an unfinished run: add --resume"):
        _train(config, dataset, synthetic, tmp_path / "cut", clip=clip)
    with pytest.raises(RecipeError, match="other settings or data"):
        _train(replace(config, learning_rate=0.5), dataset, synthetic, tmp_path / "cut", clip=clip, resume=True)
    resumed = _train(config, dataset, synthetic, tmp_path / "cut", clip=clip, resume=True)
    assert digest_of_tensors(dict(resumed.learned)) == digest_of_tensors(dict(whole.learned))
    assert list(resumed.losses) == list(whole.losses)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint.json", "learned.safetensors"]


def test_a_finished_run_is_kept(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    config = _config(clip, "coop", epochs=1)
    out = tmp_path / "run"
    _train(config, dataset, None, out, clip=clip)
    written = (out / "checkpoint.json").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="holds a finished run: add --resume"):
        _train(config, dataset, None, out, clip=clip)
    with pytest.raises(RecipeError, match="other settings or data"):
        _train(replace(config, seed=2), dataset, None, out, clip=clip, resume=True)
    assert _train(config, dataset, None, out, clip=clip, resume=True).config == config
    assert (out / "checkpoint.json").stat().st_mtime_ns == written


def test_other_peoples_files_are_never_replaced(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    for resume in (False, True):
        with pytest.raises(UsageError, match="holds other files"):
            _train(_config(clip, "coop"), dataset, None, tmp_path, clip=clip, resume=resume)
    with pytest.raises(UsageError, match="is a file"):
        _train(_config(clip, "coop"), dataset, None, tmp_path / "thesis.txt", clip=clip)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_zero_shot_is_a_checkpoint_with_nothing_learned(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = _train(_config(clip, "zero-shot"), dataset, None, tmp_path / "run", clip=clip)
    assert (dict(checkpoint.learned), list(checkpoint.losses)) == ({}, [])
    method_from_checkpoint(load_checkpoint(tmp_path / "run"), clip)


def test_a_damaged_state_is_one_line(clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path) -> None:
    (state := tmp_path / "run" / "state").mkdir(parents=True)
    (state / "state.json").write_text("{}")
    (state / "state.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"is damaged .*: delete it and start again"):
        _train(_config(clip), dataset, synthetic, tmp_path / "run", clip=clip, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_files(
    clip: Clip, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CoOp, batch: Batch) -> dict[str, Tensor]:
        return {"total": self.context.sum() * math.nan}

    monkeypatch.setattr(CoOp, "loss", broken)
    with pytest.raises(CheckFailed, match=r"epoch 1 step 1: the loss is .*nan.*train_.*png"):
        _train(_config(clip, "coop"), dataset, None, tmp_path / "run", clip=clip)
    assert not (tmp_path / "run" / "checkpoint.json").exists()


def test_sync_clip_without_synthetic_images_is_refused(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give a synthetic set"):
        _train(_config(clip), dataset, None, tmp_path / "run", clip=clip)


def test_too_few_shots_are_refused_before_anything_is_written(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="16 are asked for"):
        _train(_config(clip, "coop", shots=16), dataset, None, tmp_path / "run", clip=clip)
    assert not (tmp_path / "run").exists()


def test_bf16_learns_float32_tensors(clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path) -> None:
    runs = {
        precision: _train(
            _config(clip, epochs=1, precision=precision), dataset, synthetic, tmp_path / precision, clip=clip
        )
        for precision in ("fp32", "bf16")
    }
    assert all(value.dtype == torch.float32 for value in runs["bf16"].learned.values())
    assert runs["bf16"].losses[0]["total"] == pytest.approx(runs["fp32"].losses[0]["total"], rel=0.05)
    assert runs["bf16"].losses[0]["total"] != runs["fp32"].losses[0]["total"]
