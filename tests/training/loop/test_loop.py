"""The training loop: schedule, what it may touch, resuming, and what it refuses."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipship.core.errors import CheckFailed, ClipshipError, DataError, RecipeError, UsageError
from clipship.training.checkpoint import Checkpoint, load_checkpoint, method_from_checkpoint
from clipship.training.config import TrainConfig
from clipship.training.datasets.base import Dataset
from clipship.training.evaluation.evaluate import evaluate
from clipship.training.loop import loop
from clipship.training.loop.few_shot import FewShot
from clipship.training.loop.loop import RunOptions
from clipship.training.methods import Batch, config_of
from clipship.training.methods.coop import CoOp
from clipship.training.model.clip import Clip, digest_of_tensors
from clipship.training.synthetic_set import SyntheticSet


def _config(clip: Clip, method: str = "sync-clip", **changes: object) -> TrainConfig:
    config = config_of(method, recipe="test", base_model=clip.name, shots=4, epochs=3, batch_size=4, learning_rate=0.02)
    own = {
        **{"text_depth": 2, "image_tokens": 4, "image_depth": 3, "domain_tokens": 2},
        **{"synthetic_weight": 0.2, "align_weight": 0.1},
    }
    used = {name: value for name, value in own.items() if hasattr(config.settings, name)}
    return config.with_settings(**{**used, **changes})


def _train(
    config: TrainConfig,
    dataset: Dataset,
    synthetic: SyntheticSet | None,
    out: Path,
    clip: Clip | None = None,
    **options: object,
) -> Checkpoint:
    run_options = RunOptions(device="cpu", **options)  # type: ignore[arg-type]
    return loop.train(config, dataset, out=out, synthetic=synthetic, clip=clip, options=run_options)


def test_the_learning_rate_is_the_published_schedule() -> None:
    config = config_of("coop", recipe="t", base_model="x", epochs=5, learning_rate=0.0035)
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
    scores: dict[str, float] = {}
    for method in ("zero-shot", "sync-clip"):
        own = {"synthetic_weight": 1.0} if method == "sync-clip" else {}
        config = _config(clip, method, epochs=15, learning_rate=0.1, **own)
        checkpoint = _train(config, dataset, synthetic, tmp_path / method, clip=clip)
        mean = evaluate(method_from_checkpoint(checkpoint, clip), dataset).open_harmonic_mean
        assert mean is not None
        scores[method] = mean
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


@pytest.mark.parametrize("place", ["epoch 1 step 2", "epoch 3 step 1", "epoch 3 step 2"])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sync-clip", {}),
        ("ivlp-synthetic", {"synthetic_shots": 2, "synthetic_filter": False}),
        ("coop", {"feature_views": 2, "optimizer": "adamw", "schedule": "step-cosine", "warmup_epochs": 0}),
        ("coop", {"average_mean": 2.0, "average_std": 1.0, "momentum": 0.0, "accumulate": 2}),
    ],
)
def test_an_interrupted_run_ends_with_the_tensors_of_a_whole_one(
    clip: Clip,
    dataset: Dataset,
    synthetic: SyntheticSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    changes: dict[str, object],
    place: str,
) -> None:
    config = _config(clip, method, **changes)
    whole = _train(config, dataset, synthetic, tmp_path / "whole", clip=clip)
    batch_of_step = FewShot.with_generated

    def stops(self: FewShot, batch: Batch, epoch: int, step: int) -> Batch:
        if f"epoch {epoch} step {step + 1}" == place:
            raise _Stop
        return batch_of_step(self, batch, epoch, step)

    monkeypatch.setattr(FewShot, "with_generated", stops)
    with pytest.raises(_Stop):
        _train(config, dataset, synthetic, tmp_path / "cut", clip=clip, save_every_s=0.0)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="holds an unfinished run: add --resume"):
        _train(config, dataset, synthetic, tmp_path / "cut", clip=clip)
    with pytest.raises(RecipeError, match="other settings or data"):
        _train(replace(config, learning_rate=0.5), dataset, synthetic, tmp_path / "cut", clip=clip, resume=True)
    resumed = _train(config, dataset, synthetic, tmp_path / "cut", clip=clip, resume=True)
    assert digest_of_tensors(dict(resumed.learned)) == digest_of_tensors(dict(whole.learned))
    assert list(resumed.losses) == list(whole.losses)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint.json", "learned.safetensors"]


_KILLED = """
import sys
from pathlib import Path
import torch
from clipship.training.checkpoint import config_from_json
from clipship.training.datasets.load import load_dataset
from clipship.training.loop.loop import RunOptions, train
from clipship.training.synthetic_set import SyntheticSet

torch.set_num_threads(1)
content, data, synthetic, out = sys.argv[1:]
train(config_from_json(__import__("json").loads(content)), load_dataset(Path(data)), out=Path(out),
      synthetic=SyntheticSet.load(Path(synthetic)), options=RunOptions(device="cpu", resume=True, save_every_s=0.0))
"""


def test_kill_9_at_any_step_costs_nothing(
    clip: Clip, dataset: Dataset, data_folder: Path, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    """A real process, killed when its state has changed a few times, twice; the third one ends as if undisturbed."""
    config = _config(clip, epochs=8)
    whole = _train(config, dataset, synthetic, tmp_path / "whole", clip=clip)
    arguments = [json.dumps(config.to_json()), str(data_folder), str(synthetic.folder), str(tmp_path / "cut")]
    state = tmp_path / "cut" / "state" / "state.json"
    for changes in (3, 5):
        with subprocess.Popen([sys.executable, "-c", _KILLED, *arguments]) as process:
            _wait_for_changes(state, changes, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    resumed = _train(config, dataset, synthetic, tmp_path / "cut", clip=clip, resume=True)
    assert list(resumed.losses) == list(whole.losses)
    assert digest_of_tensors(dict(resumed.learned)) == digest_of_tensors(dict(whole.learned))


def _wait_for_changes(path: Path, changes: int, process: subprocess.Popen[bytes]) -> None:
    seen: set[int] = set()
    while len(seen) <= changes:
        assert process.poll() is None, "it ended before it could be killed"
        with contextlib.suppress(OSError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.002)


def test_kept_features_are_those_of_encoding_anew(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    """With as many views as epochs nothing but the order of summation differs."""
    anew, kept = (
        _train(_config(clip, "coop", feature_views=views), dataset, None, tmp_path / str(views), clip=clip)
        for views in (0, 3)
    )
    for name, value in anew.learned.items():
        torch.testing.assert_close(kept.learned[name], value, rtol=1e-4, atol=1e-5)
    again = _train(_config(clip, "coop", feature_views=1), dataset, None, tmp_path / "1", clip=clip)
    assert digest_of_tensors(dict(again.learned)) != digest_of_tensors(dict(kept.learned))


def test_features_on_disk_are_used_and_follow_the_images(
    clip: Clip, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(clip, "coop", feature_views=2)
    cache = tmp_path / "features"
    first = _train(config, dataset, None, tmp_path / "a", clip=clip, cache=cache)
    monkeypatch.setattr("clipship.training.inputs.features.frozen_features", None)  # would fail if it were called
    second = _train(config, dataset, None, tmp_path / "b", clip=clip, cache=cache)
    assert digest_of_tensors(dict(first.learned)) == digest_of_tensors(dict(second.learned))
    os.utime(dataset.train[0].path)
    with pytest.raises(TypeError):
        _train(config, dataset, None, tmp_path / "c", clip=clip, cache=cache)


def test_a_cache_that_fails_costs_one_line_and_no_run(
    clip: Clip, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder should be, as good as a full disk."""
    (tmp_path / "features").touch()
    config = _config(clip, "coop", feature_views=2)
    kept = _train(config, dataset, None, tmp_path / "a", clip=clip, cache=tmp_path / "features")
    expected = f"{tmp_path / 'features'}: cannot cache features (File exists): every run encodes them again"
    assert capsys.readouterr().err.splitlines() == [expected]
    plain = _train(config, dataset, None, tmp_path / "b", clip=clip)
    assert digest_of_tensors(dict(kept.learned)) == digest_of_tensors(dict(plain.learned))


def test_accumulated_parts_have_the_gradients_of_the_whole_batch(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    whole, parts = (
        _train(_config(clip, "coop", accumulate=count), dataset, None, tmp_path / str(count), clip=clip)
        for count in (1, 3)
    )
    for name, value in whole.learned.items():
        torch.testing.assert_close(parts.learned[name], value, rtol=1e-4, atol=1e-5)


def test_the_weights_kept_are_the_gaussian_average(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    """A bell so narrow that one epoch has all the weight gives that epoch's weights."""
    config = _config(clip, "coop", schedule="constant")
    short = _train(replace(config, epochs=2), dataset, None, tmp_path / "short", clip=clip)
    averaged = _train(
        replace(config, average_mean=2.0, average_std=0.1), dataset, None, tmp_path / "averaged", clip=clip
    )
    wide = _train(replace(config, average_mean=2.0, average_std=9.0), dataset, None, tmp_path / "wide", clip=clip)
    torch.testing.assert_close(averaged.learned["context"], short.learned["context"])
    assert averaged.selection == "Gaussian average over epochs (mean 2, std 0.1)"
    assert (averaged.learned["context"] - wide.learned["context"]).abs().max() > 1e-4


def test_tensorboard_gets_every_step(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    _train(_config(clip, "coop"), dataset, None, tmp_path / "run", clip=clip, tensorboard=tmp_path / "board")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "real", "total"]
    assert [one.step for one in events.Scalars("total")] == list(range(1, 10))


def test_two_processes_learn_what_one_does(
    clip: Clip, dataset: Dataset, data_folder: Path, uneven: SyntheticSet, tmp_path: Path
) -> None:
    """With parts of a batch whose images have unequal numbers of synthetic partners."""
    config = _config(clip, "ivlp-synthetic", epochs=2, batch_size=6, accumulate=2)
    alone = _train(config, dataset, uneven, tmp_path / "alone", clip=clip)
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    arguments = [json.dumps(config.to_json()), str(data_folder), str(uneven.folder), str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29561", str(script)]
    subprocess.run([*launch, *arguments], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = load_checkpoint(tmp_path / "two")
    for name in ("context", "image_context"):
        torch.testing.assert_close(two.learned[name], alone.learned[name], rtol=1e-4, atol=1e-5)
    for part in ("real", "synthetic", "total"):
        assert two.losses[-1][part] == pytest.approx(alone.losses[-1][part], rel=1e-4)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError("too much"),
    ],
)
def test_out_of_memory_says_what_lowers_it(
    clip: Clip, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def hungry(self: CoOp, batch: Batch) -> dict[str, Tensor]:
        raise error

    monkeypatch.setattr(CoOp, "loss", hungry)
    with pytest.raises(ClipshipError, match=r"epoch 1 step 1: out of memory .*raise --accumulate.*--text-chunk"):
        _train(_config(clip, "coop"), dataset, None, tmp_path / "run", clip=clip)


def test_other_errors_of_a_step_are_not_taken_for_it(
    clip: Clip, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: CoOp, batch: Batch) -> dict[str, Tensor]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(CoOp, "loss", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _train(_config(clip, "coop"), dataset, None, tmp_path / "run", clip=clip)


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


@pytest.mark.parametrize("method", ["sync-clip", "ivlp-synthetic"])
def test_classes_without_synthetic_images_learn_from_real_ones_and_are_told_once(
    clip: Clip, dataset: Dataset, uneven: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    config = _config(clip, method, epochs=4, batch_size=6, learning_rate=0.1)
    checkpoint = _train(config, dataset, uneven, tmp_path / "run", clip=clip)
    err = capsys.readouterr().err
    assert err.count("no synthetic image of 2 of 5 classes, the first is 'blue_sky'") == 1
    assert "fewer than" not in err
    assert checkpoint.losses[-1]["total"] < checkpoint.losses[0]["total"]
    assert all(epoch["synthetic"] > 0 for epoch in checkpoint.losses)
    assert method_from_checkpoint(load_checkpoint(tmp_path / "run"), clip).name == method


def test_so_many_synthetic_images_and_no_more_are_learned_from(
    clip: Clip, dataset: Dataset, uneven: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen: set[str] = set()
    batch_of_step = FewShot.with_generated

    def watched(self: FewShot, batch: Batch, epoch: int, step: int) -> Batch:
        seen.update("/".join(Path(file).parts[-2:]) for file in batch.files if Path(file).suffix == ".jpg")
        return batch_of_step(self, batch, epoch, step)

    monkeypatch.setattr(FewShot, "with_generated", watched)
    _train(_config(clip, epochs=6, synthetic_shots=2), dataset, uneven, tmp_path / "best", clip=clip)
    assert seen == {"red/3.jpg", "red/2.jpg", "green/1.jpg", "white/5.jpg", "white/4.jpg"}
    assert "fewer than 2 synthetic images of 1 of 5 classes" in capsys.readouterr().err
    seen.clear()
    first = _config(clip, epochs=6, synthetic_shots=2, synthetic_filter=False)
    _train(first, dataset, uneven, tmp_path / "first", clip=clip)
    assert seen == {"red/1.jpg", "red/2.jpg", "green/1.jpg", "white/0.jpg", "white/1.jpg"}


def test_no_synthetic_images_are_the_real_loss_alone_and_need_no_set(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    """The three ways of learning from no synthetic image begin with equal prompts and end with equal ones."""
    runs = {
        name: _train(_config(clip, name, **changes), dataset, None, tmp_path / name, clip=clip)
        for name, changes in {
            "sync-clip": {"synthetic_shots": 0},
            "ivlp-synthetic": {"synthetic_shots": 0},
            "ivlp": {},
        }.items()
    }
    want = runs["ivlp"]
    for name in ("sync-clip", "ivlp-synthetic"):
        assert [one["real"] for one in runs[name].losses] == pytest.approx([one["real"] for one in want.losses])
        assert {one["synthetic"] for one in runs[name].losses} == {0.0}
        torch.testing.assert_close(runs[name].learned["context"], want.learned["context"], rtol=1e-5, atol=1e-6)
    real_path = runs["sync-clip"].learned["real_tokens"]
    torch.testing.assert_close(real_path, want.learned["image_context"], rtol=1e-5, atol=1e-6)


def test_synthetic_images_that_a_recipe_does_not_learn_from_are_refused(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    for changes in ({"synthetic_shots": 4}, {"synthetic_filter": False}):
        with pytest.raises(RecipeError, match="does not learn from synthetic images: leave out --synthetic-shots"):
            _train(_config(clip, "coop", **changes), dataset, synthetic, tmp_path / "run", clip=clip)
    with pytest.raises(DataError, match=r"no class of .* has more than 3"):
        _train(_config(clip, synthetic_shots=4), dataset, synthetic, tmp_path / "run", clip=clip)
    assert not (tmp_path / "run").exists()


def test_too_few_shots_are_refused_before_anything_is_written(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="16 are needed"):
        _train(_config(clip, "coop", shots=16), dataset, None, tmp_path / "run", clip=clip)
    assert not (tmp_path / "run").exists()


def test_reduced_precision_learns_float32_tensors(
    clip: Clip, dataset: Dataset, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    runs = {
        precision: _train(
            _config(clip, epochs=1, precision=precision), dataset, synthetic, tmp_path / precision, clip=clip
        )
        for precision in ("fp32", "bf16", "fp16")
    }
    for precision in ("bf16", "fp16"):
        assert all(value.dtype == torch.float32 for value in runs[precision].learned.values())
        assert runs[precision].losses[0]["total"] == pytest.approx(runs["fp32"].losses[0]["total"], rel=0.05)
        assert runs[precision].losses[0]["total"] != runs["fp32"].losses[0]["total"]
