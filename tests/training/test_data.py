"""Split files, the published few-shot lists and class halves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training import data
from clipship.training.data import Dataset, base_new_split, few_shot, load_dataset


def _published(folder: Path) -> tuple[Dataset, Path]:
    split = next(folder.glob("split_zhou_*.json"))
    return data.read_split(split, data.known_records()[split.name]), folder


@pytest.mark.parametrize("name", ["caltech-101", "dtd", "eurosat"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_shot_lists_are_the_published_ones(published_data: Path, name: str, seed: int) -> None:
    dataset, folder = _published(published_data / "coop" / name)
    images = folder / dataset.record.image_dir
    published = json.loads((folder / "published_few_shot.json").read_text())
    train, val = few_shot(dataset, published["shots"], seed)
    assert [item.path.relative_to(images).as_posix() for item in train] == published["seeds"][str(seed)]["train"]
    assert [item.path.relative_to(images).as_posix() for item in val] == published["seeds"][str(seed)]["val"]


@pytest.mark.parametrize(
    ("name", "last_base", "first_new"),
    [
        ("caltech-101", "helicopter", "ibis"),
        ("dtd", "marbled", "matted"),
        ("eurosat", "Industrial Buildings", "Pasture Land"),
    ],
)
def test_the_classes_at_the_border_of_base_and_new(
    published_data: Path, name: str, last_base: str, first_new: str
) -> None:
    dataset, _ = _published(published_data / "coop" / name)
    assert dataset.class_names[dataset.num_base - 1 : dataset.num_base + 1] == (last_base, first_new)


@pytest.mark.parametrize(("classes", "base"), [(2, 1), (5, 3), (37, 19), (100, 50), (397, 199)])
def test_base_classes_are_the_first_half_rounded_up(classes: int, base: int) -> None:
    assert base_new_split(classes) == base


def test_every_known_split_file_belongs_to_one_data_set() -> None:
    records = data.known_records()
    assert len(records) == len({record.name for record in records.values()})
    assert records["split_zhou_OxfordPets.json"].template == "a photo of a {}, a type of pet."
    assert records["split_zhou_StanfordCars.json"].image_dir == "."
    assert all(record.template.count("{}") == 1 for record in records.values())


def test_real_photographs_in_the_coop_layout_are_read(published_data: Path) -> None:
    dataset = load_dataset(published_data / "caltech-101-mini")
    assert (dataset.record.name, len(dataset.class_names), dataset.num_base) == ("Caltech101", 100, 50)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (400, 100, 400)


def test_unknown_split_files_get_the_default_template(dataset: Dataset, data_folder: Path, tmp_path: Path) -> None:
    assert (dataset.record.name, dataset.record.image_dir, dataset.record.template) == (
        "Colours",
        "images",
        "a photo of a {}.",
    )
    assert dataset.class_names == ("red", "green", "blue_sky", "white", "black")
    assert dataset.num_base == 3
    folder = shutil.copytree(data_folder / "images", tmp_path / "flat")
    shutil.copy(data_folder / "split_zhou_Colours.json", folder)
    assert load_dataset(folder).train[0].path == folder / "red" / "train_0.png"


def _with_split(folder: Path, content: str) -> Path:
    (folder / "split_zhou_X.json").write_text(content)
    return folder


def _split(**lists: object) -> str:
    return json.dumps({"train": [["a.png", 0, "a"], ["b.png", 1, "b"]], "val": [], "test": [], **lists})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "lists train, val and test"),
        (json.dumps({"train": []}), "lists train, val and test"),
        (_split(train=[]), "the list train is empty"),
        (_split(test=[["a.png", "0", "a"]]), r"test holds \['a.png', '0', 'a'\]"),
        (_split(test=[["a.png", 0]]), "each entry must be"),
        (_split(test=[["a.png", 0, "other"]]), "label 0 is both 'a' and 'other'"),
        (_split(train=[["a.png", 0, "a"], ["b.png", 2, "b"]]), "without gaps"),
        (_split(train=[["a.png", 0, "a"], ["b.png", 1, "a"]]), "class name 'a' has several labels"),
        (_split(), "2 of the images named in split_zhou_X.json are not there, the first is .*a.png"),
    ],
)
def test_bad_split_files_are_named_with_their_fault(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(_with_split(tmp_path, content))


def test_folders_without_one_split_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match="no split_zhou_"):
        load_dataset(tmp_path)
    _with_split(tmp_path, _split())
    (tmp_path / "split_zhou_Y.json").write_text(_split())
    with pytest.raises(DataError, match=r"several split files \(split_zhou_X.json, split_zhou_Y.json\)"):
        load_dataset(tmp_path)


def test_a_class_with_too_few_images_is_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="class 'red' has 6 training images, 7 are asked for"):
        few_shot(dataset, 7, seed=1)


def test_new_classes_need_no_training_images(dataset: Dataset) -> None:
    names_only = replace(dataset, train=tuple(item for item in dataset.train if item.label < dataset.num_base))
    train, _ = few_shot(names_only, 4, seed=1)
    assert [item.label for item in train] == [0] * 4 + [1] * 4 + [2] * 4
    assert train == few_shot(dataset, 4, seed=1)[0][:12]


def test_few_shot_takes_at_most_four_validation_images(dataset: Dataset) -> None:
    train, val = few_shot(dataset, 5, seed=1)
    assert (len(train), len(val)) == (25, 15)
    assert len(few_shot(dataset, 2, seed=1)[1]) == 10
