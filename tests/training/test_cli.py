"""The verbs, through the command line's own entry: results on stdout, one line of error, exit codes."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.cli import main as command_line
from clipship.training import cli
from clipship.training.recipes import RECIPES
from clipship.training.synthetic_set import SyntheticSet, write_synthetic_set
from clipship.world import cli as world_cli
from clipship.world import datasets
from tests.strangers import own, run_as_stranger
from tests.training.conftest import write_model


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = command_line.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_and_evaluate(
    capsys: pytest.CaptureFixture[str], data_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ("train", "coop-tiny", "--data", data_folder, "--out", run, "--base-model", model_folder)
    code, out, _ = _run(capsys, *train, "--shots", 4, "--epochs", 2, "--seed", 3, "--json")
    assert code == 0
    assert json.loads(out)["learned_parameters"] == 4 * 48
    code, out, _ = _run(capsys, "evaluate", run, "--data", data_folder, "--json")
    scores = json.loads(out)["Colours"]
    assert code == 0
    assert scores["num_base_images"] == 12
    assert json.loads((run / "checkpoint.json").read_text())["scores"] == {"Colours": scores}
    code, out, _ = _run(capsys, "evaluate", run, "--data", data_folder)
    assert code == 0
    assert f"{scores['open_harmonic_mean']:.2f}" in out
    code, _, err = _run(capsys, *train, "--shots", 4, "--epochs", 2, "--seed", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "add --resume" in err
    assert _run(capsys, *train, "--shots", 4, "--epochs", 2, "--seed", 3, "--resume")[0] == 0


def test_train_and_evaluate_without_a_home(data_folder: Path, model_folder: Path, stranger_folder: Path) -> None:
    """Features are kept where temporary files are, and one line says so."""
    for name, folder in (("data", data_folder), ("model", model_folder)):
        shutil.copytree(folder, stranger_folder / name)
    (stranger_folder / "tmp").mkdir()
    own(stranger_folder)
    train = ["train", "clip-adapter-tiny", "--data", "data", "--out", "run", "--base-model", "model", "--epochs", "1"]
    for verb in ([*train, "--shots", "2"], ["evaluate", "run", "--data", "data"]):
        command = [sys.executable, "-m", "clipship", *verb]
        done = run_as_stranger(command, cwd=stranger_folder, TMPDIR=str(stranger_folder / "tmp"))
        assert done.returncode == 0, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.endswith(": set CLIPSHIP_CACHE to a folder that can be written and lasts")
    assert len(list(stranger_folder.glob("tmp/clipship-*/.cache/clipship/features/*"))) >= 2


def test_sync_clip_takes_its_synthetic_set(
    capsys: pytest.CaptureFixture[str], data_folder: Path, model_folder: Path, synthetic: SyntheticSet, tmp_path: Path
) -> None:
    train = ("train", "sync-clip-tiny", "--data", data_folder, "--out", tmp_path / "run", "--shots", 2, "--epochs", 1)
    code, _, err = _run(capsys, *train, "--base-model", model_folder)
    assert code == 2
    assert f"{data_folder / 'synthetic'} does not exist: give a synthetic set with --synthetic DIR" in err
    code, _, err = _run(capsys, *train, "--base-model", model_folder, "--synthetic", synthetic.folder)
    assert code == 2  # the recipe is made for the built-in model, which is deeper than the tests'
    assert "prompts in" in err


def test_train_takes_so_many_synthetic_images(
    capsys: pytest.CaptureFixture[str], data_folder: Path, model_folder: Path, uneven: SyntheticSet,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    small = RECIPES["ivlp-synthetic-tiny"]("").with_settings(text_depth=2, image_depth=3, shots=2, epochs=1)
    monkeypatch.setitem(RECIPES, "small", lambda dataset: replace(small, base_model=str(model_folder)))
    train = ("train", "small", "--data", data_folder, "--synthetic", uneven.folder, "--out", tmp_path / "run")
    code, _, err = _run(capsys, *train, "--synthetic-shots", 9)
    assert (code, "has more than 3" in err) == (2, True)
    assert _run(capsys, *train, "--synthetic-shots", 2, "--no-synthetic-filter")[0] == 0
    config = json.loads((tmp_path / "run/checkpoint.json").read_text())["config"]
    assert (config["synthetic_shots"], config["synthetic_filter"]) == (2, False)
    without = (*train[:4], "--synthetic", tmp_path / "absent", "--out", tmp_path / "without", "--synthetic-shots", 0)
    assert _run(capsys, *without)[0] == 0, "no images are asked for, so no set is needed"
    code, _, err = _run(capsys, "train", "coop-tiny", *train[2:4], "--out", tmp_path / "x", "--synthetic-shots", 1,
                        "--shots", 2, "--base-model", model_folder)  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert "recipe coop-tiny does not learn from synthetic images" in err


def test_the_world_is_written_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = replace(datasets.dataset_named("neon"), train_per_class=2, val_per_class=1, test_per_class=1)
    monkeypatch.setattr(datasets, "WORLD_DATASETS", (small,))
    write_model(tmp_path / "models" / "clipship-tiny")
    monkeypatch.setattr("clipship.training.model.builtin.MODELS", tmp_path / "models")
    world = ("world", "--out", tmp_path / "world", "--only", "neon", "--json")
    code, out, _ = _run(capsys, *world, "--no-synthetic")
    assert (code, json.loads(out)["datasets"][0]["synthetic"]) == (0, None)
    assert not (tmp_path / "world/neon/synthetic").exists()
    code, out, _ = _run(capsys, *world)
    assert code == 0
    written = json.loads(out)["datasets"][0]
    assert (written["classes"], written["images"]) == (24, 96)
    synthetic = SyntheticSet.load(Path(written["synthetic"]))
    assert {len(synthetic.kept(name)) for name in synthetic.class_names} == {16}
    assert all(image.score is not None for image in synthetic.images)
    table = synthetic.folder / "images.parquet"
    before = table.stat().st_mtime_ns
    assert _run(capsys, *world)[0] == 0
    assert table.stat().st_mtime_ns == before
    code, _, err = _run(capsys, *world, "--synthetic-seed", 5)
    assert code == 0
    assert "another seed" in err
    assert SyntheticSet.load(synthetic.folder).generator["seed"] == 5
    with write_synthetic_set(
        synthetic.folder, generator={"kind": "other"}, template="{}", class_names=["red"], images_per_class=1
    ):
        pass
    code, _, err = _run(capsys, *world, "--synthetic-seed", 7)
    assert (code, "was not drawn by the renderer: it is kept" in err) == (0, True)
    assert SyntheticSet.load(synthetic.folder).generator == {"kind": "other"}


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "recipes")
    assert code == 0
    assert "sync-clip-tiny" in out
    code, out, _ = _run(capsys, "recipes", "--json")
    assert set(json.loads(out)["recipes"]) >= {"zero-shot", "coop", "sync-clip", "sync-clip-published"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "sink-clip", "--data", "{data}", "--out", "x"), "did you mean sync-clip"),
        (("train", "coop", "--data", "absent", "--out", "x"), "absent: no such folder"),
        (("train", "coop-tiny", "--data", "{data}", "--out", "x", "--shots", "16"), "16 are needed"),
        (("train", "coop-tiny", "--data", "{data}", "--out", "x", "--shots", "-1"), "-1 is not in the range"),
        (("train", "coop-tiny", "--data", "{data}", "--out", "x", "--device", "abacus"), "give cpu, cuda or cuda:N"),
        (("evaluate", "{data}", "--data", "{data}"), "no checkpoint there"),
        (("world", "--out", "x", "--only", "printz"), "did you mean prints"),
    ],
)
def test_errors_are_one_line_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = _run(capsys, *(argument.format(data=data_folder) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_torch_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    code, _, err = _run(capsys, "recipes")
    assert code == 2
    assert "pip install 'clipship[training]'" in err


@pytest.mark.parametrize("verb", [world_cli.world, cli.recipes, cli.train, cli.evaluate])
def test_every_help_has_an_example(verb: object) -> None:
    assert f"Example: clipship {getattr(verb, 'name', '')}" in str(getattr(verb, "help", ""))
