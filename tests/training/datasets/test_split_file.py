"""Split files in the CoOp layout: the published ones, and faulty ones."""

import json
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets.load import known_records, load_dataset
from clipship.training.datasets.split_file import read_split
from tests.training.datasets.test_records import LINES, numbers_of
from tests.training.pictures import write_jpegs


@pytest.mark.parametrize("name", ["caltech-101", "dtd", "eurosat"])
def test_published_split_files_have_the_published_numbers(published_data: Path, name: str) -> None:
    split_path = next((published_data / "coop" / name).glob("split_zhou_*.json"))
    record = known_records()[split_path.name]
    dataset = read_split(split_path, record)
    assert record.folders == (name,)
    assert numbers_of(dataset) in LINES


def test_the_file_is_missing_in_a_folder_of_a_known_name(tmp_path: Path) -> None:
    folder = write_jpegs(tmp_path / "dtd", "images/banded/banded_0002.jpg")
    message = (
        r"dtd/split_zhou_DescribableTextures.json is missing, DescribableTextures needs it: get it from http.*CoOp"
    )
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


def test_missing_images_of_a_published_data_set_say_where_they_are(published_data: Path, tmp_path: Path) -> None:
    split_path = published_data / "coop" / "eurosat" / "split_zhou_EuroSAT.json"
    (tmp_path / split_path.name).write_bytes(split_path.read_bytes())
    message = r"27000 of the images named in split_zhou_EuroSAT.json .* first is .*/2750/.*, from https://github.com/"
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_a_data_set_may_have_test_images_only(tmp_path: Path) -> None:
    write_jpegs(tmp_path, "a.png", "b.png")
    dataset = load_dataset(_with_split(tmp_path, _split(train=[], test=_split_lists()["train"])))
    assert (dataset.train, dataset.val, len(dataset.test)) == ((), (), 2)


def _split_lists() -> dict[str, list[list[object]]]:
    return {"train": [["a.png", 0, "a"], ["b.png", 1, "b"]], "val": [], "test": []}


def _split(**lists: object) -> str:
    return json.dumps({**_split_lists(), **lists})


def _with_split(folder: Path, content: str) -> Path:
    (folder / "split_zhou_X.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "lists train, val and test"),
        (json.dumps({"train": []}), "lists train, val and test"),
        (_split(train=[]), "0 classes"),
        (_split(train=[["a.png", 0, "a"]]), r"1 classes \(a\)"),
        (_split(test=[["a.png", "0", "a"]]), r"test holds \['a.png', '0', 'a'\]"),
        (_split(test=[["a.png", -1, "a"]]), r"test holds \['a.png', -1, 'a'\]"),
        (_split(test=[["a.png", 0]]), "each entry must be"),
        (_split(test=[["a.png", 0, "other"]]), "label 0 is both 'a' and 'other'"),
        (_split(train=[["a.png", 0, "a"], ["b.png", 2, "b"]]), "no entry has label 1, though the labels go to 2"),
        (_split(train=[["a.png", 0, "a"], ["b.png", 1, "a"]]), "'a' and 'a' give the same prompt"),
        (_split(train=[["a.png", 0, "a b"], ["b.png", 1, "a_b"]]), "'a b' and 'a_b' give the same prompt"),
        (_split(), "2 of the images named in split_zhou_X.json are not there, the first is .*a.png"),
    ],
)
def test_bad_split_files_are_named_with_their_fault(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(_with_split(tmp_path, content))
