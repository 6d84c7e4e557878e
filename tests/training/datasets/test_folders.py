"""Trees with a folder for each class."""

import shutil
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets.base import Dataset, LabelledImage
from clipship.training.datasets.folders import split_rows
from clipship.training.datasets.load import few_shot, load_dataset
from clipship.training.synthetic_set import SyntheticSet
from tests.training.pictures import write_jpegs


def _tree(folder: Path, *classes: str, images: int = 10) -> Path:
    return write_jpegs(folder, *(f"{name}/{number:02}.jpg" for name in classes for number in range(images)))


def _names(items: tuple[LabelledImage, ...]) -> list[str]:
    return [f"{item.path.parent.name}/{item.path.name}" for item in items]


def _splits(dataset: Dataset) -> list[list[str]]:
    return [_names(dataset.train), _names(dataset.val), _names(dataset.test)]


def test_a_tree_is_split_by_class(tmp_path: Path) -> None:
    dataset = load_dataset(_tree(tmp_path / "pets", "dog", "Cat", "sea_lion"))
    assert (dataset.record.name, dataset.record.template) == ("pets", "a photo of a {}.")
    assert dataset.class_names == ("Cat", "dog", "sea_lion")
    assert [len(split) for split in _splits(dataset)] == [15, 6, 9]
    assert [item.label for item in dataset.val] == [0, 0, 1, 1, 2, 2]
    every = [name for split in _splits(dataset) for name in split]
    assert sorted(every) == sorted(f"{name}/{k:02}.jpg" for name in dataset.class_names for k in range(10))


def test_the_split_is_the_same_on_every_machine() -> None:
    rows = [(Path(f"anywhere/dog/{number:02}.jpg"), "dog") for number in range(10)]
    split = {name: [path.stem for path, _ in part] for name, part in split_rows(rows).items()}
    assert split == {"train": ["00", "01", "03", "04", "08"], "val": ["06", "09"], "test": ["02", "05", "07"]}


def test_the_split_of_a_class_depends_on_that_class_only(tmp_path: Path) -> None:
    few = load_dataset(_tree(tmp_path / "few", "dog", "cat"))
    many = load_dataset(_tree(tmp_path / "many", "ape", "dog", "bee", "cat"))
    for few_split, many_split in zip(_splits(few), _splits(many), strict=True):
        assert few_split == [name for name in many_split if name.startswith(("cat", "dog"))]


@pytest.mark.parametrize(("images", "sizes"), [(1, (0, 0, 1)), (2, (1, 0, 1)), (5, (2, 1, 2)), (99, (49, 19, 31))])
def test_half_is_for_training_and_a_fifth_for_validation(images: int, sizes: tuple[int, ...]) -> None:
    split = split_rows((Path(f"a/{number}.jpg"), "a") for number in range(images))
    assert tuple(len(part) for part in split.values()) == sizes


def test_a_tree_may_come_with_its_splits(tmp_path: Path) -> None:
    _tree(tmp_path / "train", "a", "b", images=4)
    _tree(tmp_path / "test", "b", "c", images=2)
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("a", "b", "c")
    assert [len(split) for split in _splits(dataset)] == [8, 0, 4]
    assert [item.label for item in dataset.test] == [1, 1, 2, 2]
    assert len(few_shot(dataset, 4, seed=1)[0]) == 8
    _tree(tmp_path / "val", "a", images=3)
    assert _names(load_dataset(tmp_path).val) == ["a/00.jpg", "a/01.jpg", "a/02.jpg"]
    shutil.rmtree(tmp_path / "train")
    assert load_dataset(tmp_path).train == ()


def test_other_files_are_ignored(tmp_path: Path) -> None:
    _tree(tmp_path, "a", "b", ".git")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "a" / "Thumbs.db").write_text("")
    (tmp_path / "a" / ".DS_Store").write_text("")
    dataset = load_dataset(tmp_path)
    assert (dataset.class_names, len(dataset.train)) == (("a", "b"), 10)


def test_synthetic_images_beside_the_classes_are_no_class(tmp_path: Path, synthetic: SyntheticSet) -> None:
    _tree(tmp_path, "a", "b")
    shutil.copytree(synthetic.folder, tmp_path / "synthetic")
    write_jpegs(tmp_path, "begun/images/red/1.jpg", "begun/unfinished.json")
    assert load_dataset(tmp_path).class_names == ("a", "b")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    _tree(tmp_path, "a", "b")
    write_jpegs(tmp_path, "c/deeper/0.jpg")
    with pytest.raises(DataError, match="/c: no images directly in this class folder"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/0.jpg"], r"1 classes \(a\): there must be at least 2"),
        (["train/a/0.jpg", "train/b/0.jpg"], "has train but no test"),
        (["train/a/0.jpg", "test/a/0.jpg"], r"1 classes \(a\)"),
        (["train/a/0.jpg", "test/b/0.jpg", "more/c/0.jpg"], "folder 'more' is beside train or test"),
        (["a b/0.jpg", "a_b/0.jpg"], "'a b' and 'a_b' give the same prompt"),
        (["0.jpg"], "no split_zhou_.* and no class folders in it"),
    ],
)
def test_other_trees_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(write_jpegs(tmp_path, *names))
