"""``clipship compare`` on real runs of a small model: what is run, what is kept, what a kill or a failure costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipship.core.cli import main as command_line
from clipship.training import recipes
from clipship.training.compare import workers
from clipship.training.compare.grid import GridRequest, GridRun, grid_of
from clipship.training.compare.launcher import Rank, alone_in
from clipship.training.compare.results import RunResult, failure_path, write_result
from clipship.training.config import TrainConfig
from clipship.training.methods import config_of
from clipship.training.model.clip import Clip, load_clip
from clipship.training.synthetic_set import SyntheticSet
from tests.training.conftest import write_data, write_model

VERB = ("clipship.training.compare.cli:compare", "")


def small_zero_shot(model: Path) -> TrainConfig:
    return config_of("zero-shot", recipe="small-zero-shot", base_model=str(model), shots=4)


def small_coop(model: Path) -> TrainConfig:
    run = {"shots": 4, "epochs": 2, "batch_size": 5, "feature_views": 1}
    return config_of("coop", recipe="small-coop", base_model=str(model), **run)


def small_synthetic(model: Path) -> TrainConfig:
    run = {"shots": 4, "epochs": 1, "batch_size": 6}
    own = {"text_depth": 2, "image_tokens": 2, "image_depth": 2, "synthetic_weight": 0.25}
    return config_of("ivlp-synthetic", recipe="small-synthetic", base_model=str(model), **run, **own)


def add_recipe(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    monkeypatch.setitem(recipes.RECIPES, config.recipe, lambda dataset: config)


@pytest.fixture(autouse=True)
def _recipes(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (small_zero_shot, small_coop, small_synthetic):
        add_recipe(monkeypatch, make(model_folder))
    monkeypatch.setitem(command_line.VERBS, "compare", VERB)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def paints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data") / "paints")
    (folder / "split_zhou_Colours.json").rename(folder / "split_zhou_Paints.json")
    return folder


@pytest.fixture(scope="session")
def brushes(tmp_path_factory: pytest.TempPathFactory, uneven: SyntheticSet) -> Path:
    """A data set with synthetic images beside it, a different number of every class."""
    folder = write_data(tmp_path_factory.mktemp("data") / "brushes")
    shutil.copytree(uneven.folder, folder / "made")
    return folder


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = command_line.main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def times(out: Path) -> dict[Path, int]:
    """When the files of the runs were written."""
    return {path: path.stat().st_mtime_ns for path in sorted((out / "runs").rglob("*")) if path.is_file()}


def test_recipes_by_data_sets_by_seeds(
    capsys: pytest.CaptureFixture[str], data_folder: Path, paints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("small-zero-shot", "small-coop", "--data", data_folder, paints, "--seeds", 1, 2, "--out", out)
    code, text, err = compare(capsys, *command)
    assert code == 0, err
    content = json.loads((out / "results.json").read_text())
    assert [(one["dataset"], one["recipe"], one["seed"]) for one in content["runs"]] == [
        (dataset, recipe, seed)
        for dataset in ("Colours", "Paints")
        for recipe in ("small-zero-shot", "small-coop")
        for seed in (1, 2)
    ]
    coop = content["runs"][2]
    stored = json.loads((out / "runs/Colours/small-coop-4shots-seed1/checkpoint.json").read_text())
    assert stored["scores"] == {"Colours": coop["scores"]["Colours"]}
    assert stored["losses"] == coop["losses"]
    assert (coop["learned_parameters"], coop["shots"], coop["selection"]) == (4 * 48, 4, "last step")
    assert coop["seconds"] > 0
    assert (out / "table.md").read_text() in text
    assert err.count("small-coop 4 shots seed") == 4
    assert "(8 of 8)" in err
    assert sorted(path.name for path in (out / "plots").iterdir()) == [
        *("base-new.svg", "losses.svg", "reliability.svg")
    ]
    before, page = times(out), (out / "report.html").read_bytes()
    code, again, err = compare(capsys, *command, "--json")
    assert (code, times(out), (out / "report.html").read_bytes()) == (0, before, page)
    assert "8 of them are done already" in err
    assert json.loads(again) == content


def test_few_shot_learns_all_classes_with_every_number_of_images(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path
) -> None:
    command = ("small-coop", "--data", data_folder, "--seeds", 1, "--out", tmp_path / "out", "--protocol", "few-shot")
    code, text, err = compare(capsys, *command, "--shots", 1, 2, 4)
    assert code == 0, err
    assert "| data set | recipe | 1 shot | 2 shots | 4 shots |" in text
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [(one["shots"], one["config"]["classes"]) for one in runs] == [(1, "all"), (2, "all"), (4, "all")]
    assert all(one["scores"]["Colours"]["protocol"] == "all classes" for one in runs)
    assert (tmp_path / "out/plots/accuracy-against-shots.svg").exists()


def test_accuracy_against_the_number_of_synthetic_images_with_and_without_the_filter(
    capsys: pytest.CaptureFixture[str], brushes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = (
        "small-coop",
        "small-synthetic",
        "--data",
        brushes,
        "--synthetic-name",
        "made",
        "--seeds",
        1,
        "--out",
        out,
    )
    code, text, err = compare(capsys, *command, "--synthetic-shots", 0, 2, 3, "--synthetic-filter", "both")
    assert code == 0, err
    runs = json.loads((out / "results.json").read_text())["runs"]
    found = [(one["recipe"], one["synthetic_shots"], one["synthetic_filter"]) for one in runs]
    counts = [(0, True), (2, True), (3, True), (2, False), (3, False)]  # without images there is nothing to filter
    assert found == [("small-coop", None, True), *(("small-synthetic", *count) for count in counts)]
    assert [path.name for path in sorted((out / "runs/Colours").iterdir())] == [
        "small-coop-4shots-seed1",
        *(f"small-synthetic-4shots-{count}synthetic-seed1" for count in ("0", "2")),
        "small-synthetic-4shots-2synthetic-unfiltered-seed1",
        "small-synthetic-4shots-3synthetic-seed1",
        "small-synthetic-4shots-3synthetic-unfiltered-seed1",
    ]
    assert "| data set | recipe | 0 | 2 | 3 |" in text
    assert "| Colours | small-synthetic, no filter |" in text
    assert "4 real images a class, 0, 2, 3 synthetic ones: those with CLIP's best scores or the first" in text
    assert (out / "plots/accuracy-against-synthetic.svg").exists()
    assert "Accuracy against synthetic images a class" in (out / "report.html").read_text()
    before = times(out)
    code, _, err = compare(capsys, *command, "--synthetic-shots", 3, 0)
    assert (code, "3 of them are done already" in err) == (0, True), "a part of it is there"
    assert times(out) == before


def test_a_comparison_that_asks_for_no_number_is_the_one_it_was(
    capsys: pytest.CaptureFixture[str], brushes: Path, tmp_path: Path
) -> None:
    """Folders, identities and results of versions that had no choice of synthetic images are found again."""
    out = tmp_path / "out"
    command = ("small-synthetic", "--data", brushes, "--synthetic-name", "made", "--seeds", 1, "--out", out)
    assert compare(capsys, *command)[0] == 0
    path = out / "runs/Colours/small-synthetic-4shots-seed1/result.json"
    old = json.loads(path.read_text())
    for content in (old, old["config"]):
        del content["synthetic_shots"], content["synthetic_filter"]
    path.write_text(json.dumps(old))
    before = times(out)
    code, _, err = compare(capsys, *command)
    assert (code, "1 of them are done already" in err) == (0, True)
    assert times(out) == before


def test_cross_dataset_learns_from_the_first_and_classifies_all(
    capsys: pytest.CaptureFixture[str], data_folder: Path, paints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("small-coop", "--data", paints, data_folder, "--seeds", 1, 2, "--protocol", "cross-dataset")
    code, text, err = compare(capsys, *command, "--out", out)
    assert code == 0, err
    assert "| recipe | Paints (source) | Colours | average |" in text
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [one["dataset"] for one in runs] == ["Paints", "Paints"]
    assert set(runs[0]["scores"]) == {"Paints", "Colours"}
    assert runs[0]["scores"]["Colours"]["protocol"] == "domain generalisation"
    assert (out / "plots/cross-dataset.svg").exists()


def test_a_killed_comparison_goes_on_and_leaves_finished_runs_alone(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("small-coop", "--data", data_folder, "--seeds", 1, 2, 3)
    scores, done = workers._scores, []

    def killed(*arguments: object) -> object:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return scores(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_scores", killed)
        assert compare(capsys, *command, "--out", tmp_path / "killed")[0] == 130
    assert not (tmp_path / "killed/results.json").exists()
    first = {path: time for path, time in times(tmp_path / "killed").items() if "seed1" in str(path)}
    trained = (tmp_path / "killed/runs/Colours/small-coop-4shots-seed2/learned.safetensors").stat().st_mtime_ns
    assert compare(capsys, *command, "--out", tmp_path / "killed")[0] == 0
    assert first
    assert first.items() <= times(tmp_path / "killed").items()
    second = tmp_path / "killed/runs/Colours/small-coop-4shots-seed2"
    assert (second / "learned.safetensors").stat().st_mtime_ns == trained
    assert json.loads((second / "result.json").read_text())["resumed"]
    assert compare(capsys, *command, "--out", tmp_path / "whole")[0] == 0
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("killed", "whole")]
    assert rows[0] == rows[1]


def test_a_worker_that_dies_between_two_runs_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []

    class Pool:
        def submit(self, work: object, run: Any, *settings: object) -> Future[Any]:
            if self is pools[0] and run == "second":
                raise BrokenProcessPool
            future: Future[Any] = Future()
            future.set_result(f"{run} in pool {pools.index(self)}")
            return future

    @contextmanager
    def pool(*settings: object) -> Iterator[Pool]:
        pools.append(Pool())
        yield pools[-1]

    monkeypatch.setattr(workers, "worker_pool", pool)
    runs: Any = ["first", "second", "third"]
    results: list[Any] = list(workers._from_processes(runs, [None], 0))
    assert results == ["first in pool 0", "second in pool 1", "third in pool 1"]


def test_a_run_that_fails_is_reported_and_costs_no_other(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(recipes.RECIPES["small-coop"](""), recipe="broken", base_model=str(tmp_path / "no|model"))
    add_recipe(monkeypatch, broken)
    command = ("broken", "small-zero-shot", "--data", data_folder, "--seeds", 1, "--out", tmp_path / "out")
    code, text, err = compare(capsys, *command)
    assert code == 1
    assert "clipship: 1 of 2 runs failed" in err
    assert "### Runs that failed" in text
    assert "| Colours | broken | – |" in text
    assert "no\\|model" in text
    before = times(tmp_path / "out")
    write_model(tmp_path / "no|model")
    code, text, _ = compare(capsys, *command)
    assert (code, "Runs that failed" in text) == (0, False)
    kept = {path: time for path, time in before.items() if "small-zero-shot" in str(path)}
    assert kept.items() <= times(tmp_path / "out").items()


def test_other_settings_in_the_same_folder_are_refused(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("small-zero-shot", "--data", data_folder, "--seeds", 1, "--out", tmp_path / "out")
    assert compare(capsys, *command)[0] == 0
    folder = tmp_path / "out/runs/Colours/small-zero-shot-4shots-seed1"
    other = replace(recipes.RECIPES["small-zero-shot"](""), templates=("a {}",))
    with monkeypatch.context() as patch:
        add_recipe(patch, other)
        code, _, err = compare(capsys, *command)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{folder} holds a run with other settings or images" in err
    (folder / "result.json").write_text("{}")
    code, _, err = compare(capsys, *command)
    assert code == 2
    assert "result.json: format None" in err
    assert "delete the file, and the run is done again" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("small-coup", "--data", "{data}"), "did you mean small-coop"),
        (("small-coop", "--data", "{data}", "{data}"), "two data sets are called Colours"),
        (("small-coop", "--data", "absent"), "absent: no such folder"),
        (("small-coop", "--data", "{data}", "--seeds", "one"), "'one' is not a valid integer"),
        (("small-coop", "--data", "{data}", "--seeds", "1", "1"), "--seeds 1 is given twice"),
        (("small-coop", "small-coop", "--data", "{data}"), "RECIPE small-coop is given twice"),
        (("sync-clip-published", "--data", "{data}"), "has no settings for 'Colours'"),
        (("sync-clip", "--data", "{data}", "--shots", "4"), "learns from synthetic images"),
        (("small-coop", "--data", "{data}", "--shots", "1", "2"), "take --protocol few-shot"),
        (("small-coop", "--data", "{data}", "--shots", "7"), "7 are needed"),
        (("small-coop", "--data", "{data}", "--protocol", "cross-dataset"), "give two data sets or more"),
        (("coop-cross", "--data", "{data}", "--shots", "4"), "coop-cross learns from all classes"),
        (
            ("small-synthetic", "--data", "{synthetic}", "--synthetic-shots", "4"),
            "no class of {synthetic}/made has more",
        ),
        (("small-synthetic", "--data", "{data}", "--synthetic-shots", "4"), "with clipship synthesize"),
        (("small-synthetic", "--data", "{data}", "--synthetic-shots", "4", "4"), "--synthetic-shots 4 is given twice"),
        (("small-coop", "--data", "{data}", "--synthetic-shots", "4"), "none of the recipes learns from synthetic"),
        (("small-synthetic", "--data", "{data}", "--synthetic-filter", "both"), "give them with --synthetic-shots"),
        (
            ("small-synthetic", "--data", "{data}", "--synthetic-shots", "4", "--protocol", "few-shot"),
            "--synthetic-shots is for base-to-new, not for few-shot",
        ),
        (("ship-coop", "--data", "{data}", "--shots", "4", "--protocol", "few-shot"), "in few-shot all have some"),
        (("ship-coop-cross", "--data", "{data}"), "clipship train with --generator"),
        (("small-coop", "--data", "{data}", "--device", "abacus"), "give cpu, cuda or cuda:N"),
        (("--data", "{data}"), "Missing argument 'RECIPE...'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_begun(
    capsys: pytest.CaptureFixture[str],
    data_folder: Path,
    brushes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(data=data_folder, synthetic=brushes) for argument in arguments]
    given += ["--synthetic-name", "made"] if brushes in map(Path, given) else []
    code, text, err = compare(capsys, *given, "--out", "out")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert message.format(synthetic=brushes) in err
    assert not (tmp_path / "out").exists()


def test_what_the_report_needs_is_asked_for_before_the_runs(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipship.training.compare.cli.find_spec", lambda name: None)
    code, _, err = compare(capsys, "small-coop", "--data", data_folder, "--out", tmp_path / "out")
    assert code == 2
    assert "matplotlib is not installed: run pip install 'clipship[training]'" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    code, _, err = compare(capsys, "small-coop", "--data", data_folder, "--out", tmp_path)
    assert code == 2
    assert "holds other files and no comparison" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_each_rank_does_its_share_and_the_last_one_reports(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("small-zero-shot", "--data", data_folder, "--seeds", 1, 2, 3, "--out", out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, text, err = compare(capsys, *command)
    assert (code, text) == (0, ""), "the other process has not come"
    assert "other processes have not ended 1 run: the last one writes the report" in err
    assert len(list(out.glob("runs/*/*/result.json"))) == 2
    assert not (out / "results.json").exists()
    monkeypatch.setenv("RANK", "1")
    code, text, _ = compare(capsys, *command)
    assert (code, "failed" in text) == (0, False)
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 3
    monkeypatch.setenv("RANK", "0")
    assert compare(capsys, *command)[:2] == (0, text), "started again, any of them reports"
    assert os.environ["WORLD_SIZE"] == "2", "what the launcher said is as it was"
    monkeypatch.setenv("RANK", "2")
    code, _, err = compare(capsys, *command)
    assert code == 2
    assert "RANK must be 0 to WORLD_SIZE - 1" in err


def test_a_failure_of_another_rank_is_reported_and_one_of_an_earlier_start_forgotten(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GridRequest(recipes=("small-zero-shot",), data=(data_folder,), seeds=(1, 2), out=tmp_path, shots=(4,))
    first, second = grid_of(request).runs
    command = ("small-zero-shot", "--data", data_folder, "--seeds", 1, 2, "--shots", 4, "--out", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "runs").mkdir()
    write_result(first, RunResult.failed(first, "of an earlier start"))
    code, text, _ = compare(capsys, *command)
    assert (code, text) == (0, ""), "rank 0 is about to try again"
    assert not failure_path(first).exists()
    monkeypatch.setattr(workers.Worker, "result_of", lambda self, run: pytest.fail("it has its scores"))
    write_result(first, RunResult.failed(first, "of this start"))
    in_a_minute_s = time.time() + 60
    os.utime(failure_path(first), (in_a_minute_s, in_a_minute_s))
    code, text, err = compare(capsys, *command)
    assert code == 1
    assert "| Colours | small-zero-shot | 4 | 1 | of this start |" in text
    assert "1 of 2 runs failed" in err
    assert second.folder.is_dir()


def test_the_training_loop_does_not_see_the_launcher(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    measured = workers.Worker._measured

    def watched(worker: workers.Worker, run: GridRun) -> RunResult:
        seen.append("WORLD_SIZE" in os.environ)
        return measured(worker, run)

    monkeypatch.setattr(workers.Worker, "_measured", watched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    compare(capsys, "small-zero-shot", "--data", data_folder, "--seeds", 1, 2, "--out", tmp_path / "out")
    assert seen == [False], "it would wait in every run for processes that do others"


def test_two_comparisons_do_not_work_in_one_folder(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/runs").mkdir(parents=True)
    with alone_in(tmp_path / "out", Rank()):
        code, _, err = compare(capsys, "small-zero-shot", "--data", data_folder, "--out", tmp_path / "out")
    assert code == 2
    assert "another clipship compare works there" in err


def test_the_model_is_loaded_once(
    capsys: pytest.CaptureFixture[str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def counted(name: str) -> Clip:
        loaded.append(name)
        return load_clip(name)

    monkeypatch.setattr("clipship.training.model.clip.load_clip", counted)
    command = ("small-zero-shot", "small-coop", "--data", data_folder, "--seeds", 1, 2, "--out", tmp_path / "out")
    assert compare(capsys, *command)[0] == 0
    assert len(loaded) == 1


def die_on_seed_2(run: GridRun, device: str | None, loader_workers: int) -> RunResult:
    """As a worker process does a run, but one of seed 2 is killed, as one is that takes all memory."""
    if run.config.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return workers._worker(device, loader_workers).result_of(run)


@pytest.mark.slow
def test_processes_share_the_runs_and_one_that_dies_costs_one_run(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GridRequest(
        recipes=("small-zero-shot",), data=(data_folder,), seeds=(1, 2, 3, 4), out=tmp_path / "out", shots=(2,)
    )
    runs = grid_of(request).runs
    monkeypatch.setattr(workers, "_result_in_process", die_on_seed_2)
    results = {one.seed: one for one in workers.do_runs(runs, jobs=2, device=None, loader_workers=0)}
    assert set(results) == {1, 2, 3, 4}
    assert results[2].error == "its process was killed or ran out of memory"
    assert json.loads(failure_path(runs[1]).read_text())["error"] == results[2].error
    assert all(not results[seed].error and results[seed].scores for seed in (1, 3, 4))


SCRIPT = """
import sys
from pathlib import Path
from dataclasses import replace
from clipship.core.cli import main as cli
from clipship.training import recipes
from clipship.training.methods import config_of
from clipship.training.synthetic_set import SyntheticSet
config = config_of("coop", recipe="small", base_model=sys.argv[1], shots=4, epochs=40, batch_size=5)
recipes.RECIPES["small"] = lambda dataset: config
cli.VERBS["compare"] = ("clipship.training.compare.cli:compare", "")
if __name__ == "__main__":
    sys.exit(cli.main(["compare", "small", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_torchrun_and_a_hard_kill(data_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [str(model_folder), "--data", str(data_folder), "--seeds", "1", "2", "3", "4", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    alone = subprocess.Popen(
        [sys.executable, str(script), *command, "--jobs", "2"], env=environment, stderr=subprocess.DEVNULL
    )
    while alone.poll() is None and not list(out.glob("runs/*/*/result.json")):
        time.sleep(0.05)
    alone.send_signal(signal.SIGKILL)
    alone.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/result.json")}
    assert finished
    run = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "average" in run.stdout or "| Colours | small |" in run.stdout
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 4
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/result.json")}.items()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(data_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT.replace("epochs=40", "epochs=4000"))
    command = [str(model_folder), "--data", str(data_folder), "--seeds", "1", "2", "3", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), *command, "--jobs", "2"]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as alone:
        while alone.poll() is None and len(list(out.glob("runs/Colours/*"))) < 2:
            time.sleep(0.05)
        os.killpg(alone.pid, signal.SIGINT)
        _, err = alone.communicate(timeout=60)
    assert alone.returncode == 130, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while is_running(alone.pid):
        assert time.monotonic() < deadline, "a process outlives Ctrl-C"
        time.sleep(0.05)


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
