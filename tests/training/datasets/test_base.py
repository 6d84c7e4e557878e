"""Class names, base classes and the look for images."""

from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets.base import (
    Dataset,
    DatasetRecord,
    LabelledImage,
    folders_in,
    images_in,
    lines_of,
    needed,
    validate_class_names,
    validate_images,
)
from tests.training.pictures import write_jpegs

RECORD = DatasetRecord(name="Things", folders=("things",), source="https://things.example")


def _dataset(folder: Path, *names: str) -> Dataset:
    items = tuple(LabelledImage(folder / name, label, name) for label, name in enumerate(names))
    return Dataset(record=RECORD, train=items, val=(), test=(), class_names=names)


def test_the_number_of_base_classes_can_be_given(dataset: Dataset) -> None:
    assert (dataset.base_classes, dataset.num_base, dataset.generalised) == (None, 3, False)
    given = replace(dataset, base_classes=4, generalised=True)
    assert (given.num_base, given.task.num_base) == (4, 4)
    assert replace(dataset, base_classes=5).num_base == 5


@pytest.mark.parametrize("number", [0, 6, -1])
def test_base_classes_are_some_of_the_classes(dataset: Dataset, number: int) -> None:
    with pytest.raises(DataError, match=rf"Colours: {number} base classes requested: give 1 to 5"):
        replace(dataset, base_classes=number)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"0 classes \(none\): there must be at least 2"),
        (["cat"], r"1 classes \(cat\): there must be at least 2"),
        (["cat", "  "], "a class name is '  '"),
        (["cat", "dog", "cat"], "'cat' and 'cat' give the same prompt"),
        (["sea_lion", "dog", "sea lion"], "'sea_lion' and 'sea lion' give the same prompt"),
        (["Cat", "cat"], "'Cat' and 'cat' give the same prompt"),
    ],
)
def test_class_names_must_give_prompts_of_their_own(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{message}"):
        validate_class_names(Path("here"), names)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_jpegs(tmp_path, "a.jpg", "b/b.jpg")
    complete = _dataset(tmp_path, "a.jpg", "b/b.jpg")
    assert validate_images(complete, tmp_path, "the list") is complete
    assert len(validate_images(_dataset(tmp_path, "b/../a.jpg", "b/b.jpg"), tmp_path, "the list").train) == 2
    with pytest.raises(DataError, match=r"2 of the images named in the list .* first is .*c.jpg: .*things.example"):
        validate_images(_dataset(tmp_path, "a.jpg", "c.jpg", "d/d.jpg"), tmp_path, "the list")


def test_hidden_files_and_those_that_are_no_images_are_ignored(tmp_path: Path) -> None:
    write_jpegs(tmp_path, "b.JPEG", "a.jpg", ".hidden.jpg", ".cache/c.jpg", "folder.jpg/x.jpg", "notes.txt", "a.png")
    assert [path.name for path in images_in(tmp_path)] == ["a.jpg", "a.png", "b.JPEG"]
    assert folders_in(tmp_path) == ["folder.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images directly in this class folder"):
        images_in(tmp_path / "empty")


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"list.txt is missing, Things needs it: get it from https://things.example; if"
    ):
        lines_of(tmp_path / "list.txt", RECORD)
    with pytest.raises(DataError, match=r"get it from https://things.example$"):
        needed(tmp_path / "list.txt", replace(RECORD, folders=()))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"list.txt: not UTF-8 text"):
        lines_of(tmp_path / "list.txt", RECORD)
    (tmp_path / "list.txt").write_text("one \n\n two words\n")
    assert lines_of(tmp_path / "list.txt", RECORD) == ["one", "two words"]
