"""The unfinished folder: a batch is there as a whole or not at all, and only runs of the same settings go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.synthesis.workspace import Workspace, differences, is_finished
from clipship.training.synthetic_set import SyntheticSet
from tests.training.synthesis.crash_scenarios import add, row

LIVES = Path(__file__).with_name("crash_scenarios.py")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_records_and_images_of_all_processes_are_found_again(tmp_path: Path) -> None:
    add(Workspace(folder=tmp_path), 0, 1)
    add(Workspace(folder=tmp_path), 2, 3)
    Workspace(folder=tmp_path).add([row(4, "flagged")], {})
    found = Workspace(folder=tmp_path).records()
    assert sorted(found) == [(place, 0) for place in range(5)]
    assert found[4, 0].reason == "flagged"
    assert found[1, 0] == row(1)
    images = [f"images/c/{place}.webp" for place in range(4)]
    assert names(tmp_path) == ["batches/0.json", "batches/2.json", "batches/4.json", *images]


def test_a_torn_or_damaged_record_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(folder=tmp_path)
    add(workspace, 0, 1)
    record = tmp_path / "batches" / "0.json"
    whole = record.read_bytes()
    for damaged in (whole[:-9], b"", b"[{}]", b"[1]", b"{}}"):
        record.write_bytes(damaged)
        with pytest.raises(DataError, match=r"0.json is damaged .*: delete it, and the batch is made again"):
            workspace.records()
    record.unlink()
    add(workspace, 0, 1)
    assert record.read_bytes() == whole


def test_images_without_a_record_do_not_count(tmp_path: Path) -> None:
    workspace = Workspace(folder=tmp_path)
    workspace.begin({"steps": 20})
    (tmp_path / "images" / "c").mkdir(parents=True)
    (tmp_path / "images" / "c" / "7.webp").write_bytes(b"of a killed batch")
    assert workspace.records() == {}
    workspace.begin({"steps": 50})
    assert names(tmp_path) == ["unfinished.json"], "an image of other settings would stay in the set"
    add(workspace, 0, 1)
    (tmp_path / "images" / "c" / ".1.webp.1-abcd.part").write_bytes(b"of a killed process")
    workspace.finish()
    assert names(tmp_path) == ["images/c/0.webp", "images/c/1.webp"]


def test_a_kill_at_any_change_of_the_folder_loses_nothing_that_was_done(tmp_path: Path) -> None:
    add(Workspace(folder=tmp_path / "expected"), 0, 1)
    add(Workspace(folder=tmp_path / "expected"), 2, 3)
    run = subprocess.run([sys.executable, LIVES, "batches", tmp_path], capture_output=True, text=True, check=True)
    outcomes = json.loads(run.stdout)
    assert len(outcomes) > 20, "there are more moments than that"
    expected = {name: (tmp_path / "expected" / name).read_bytes() for name in names(tmp_path / "expected")}
    for number, places in enumerate(outcomes):
        folder = tmp_path / str(number)
        assert places in ([], [0, 1], [0, 1, 2, 3]), f"half a batch after a kill at change {number}"
        assert {name: (folder / name).read_bytes() for name in names(folder)} == expected, "a torn batch"
    assert outcomes[0] == []
    assert outcomes[-1] == [0, 1, 2, 3]


def test_only_the_same_settings_go_on(tmp_path: Path) -> None:
    workspace = Workspace(folder=tmp_path)
    workspace.begin({"steps": 20})
    workspace.begin({"steps": 50, "batch_size": 8, "class_names": ["a", "b"]})  # nothing was made with 20 steps
    add(workspace, 0, 1)
    workspace.begin({"steps": 50, "batch_size": 2, "class_names": ["a", "b"]})
    with pytest.raises(DataError, match=r"other settings \(steps 50 -> 30; class_names - 'b', \+ 'c'\): give the same"):
        workspace.begin({"steps": 30, "batch_size": 8, "class_names": ["a", "c"]})
    assert not is_finished(tmp_path, {})
    with pytest.raises(DataError, match="is not finished; run the same clipship synthesize again"):
        SyntheticSet.load(tmp_path)


def test_differences_are_short() -> None:
    digests = {"pipeline_revision": "0" * 64}, {"pipeline_revision": "a" * 64}
    assert differences(*digests) == ["pipeline_revision 00000000... -> aaaaaaaa..."]
    assert differences({"class_names": ["a", "b"]}, {"class_names": ["b", "a"]}) == ["class_names another order"]
    assert differences({"x": ""}, {"x": "y", "z": 1}) == ["x '' -> y", "z None -> 1"]
    assert differences({"class_names": list("abc")}, {"class_names": list("defg")}) == [
        "class_names - 'a', - 'b', - 'c', + 'd', ..."
    ]
    assert differences({"pipeline": "here"}, {"pipeline": "there"}) == []
    moved = differences({"pipeline": "a", **digests[0]}, {"pipeline": "b", **digests[1]})
    assert moved[0] == "pipeline a -> b"


def test_folders_of_something_else_are_refused(tmp_path: Path, synthetic: SyntheticSet) -> None:
    assert not is_finished(tmp_path / "new", {})
    (tmp_path / ".x.part").touch()
    assert not is_finished(tmp_path, {}), "what a kill left is no file of somebody's"
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds other files and no synthetic set"):
        is_finished(tmp_path, {})
    with pytest.raises(DataError, match="holds a set made by test"):
        is_finished(synthetic.folder, {})
