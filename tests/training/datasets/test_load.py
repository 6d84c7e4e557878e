"""Split files, the published few-shot lists and class halves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets import load as data
from clipship.training.datasets.base import Dataset, base_new_split
from clipship.training.datasets.load import few_shot, load_dataset
from clipship.training.datasets.split_file import read_split


def _published(folder: Path) -> tuple[Dataset, Path]:
    split = next(folder.glob("split_zhou_*.json"))
    return read_split(split, data.known_records()[split.name]), folder


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


def test_folders_without_a_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        load_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match="no such folder or file"):
        load_dataset(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"no split_zhou_.* and no class folders in it"):
        load_dataset(tmp_path)
    for name in ("X", "Y"):
        (tmp_path / f"split_zhou_{name}.json").write_text("{}")
    with pytest.raises(DataError, match=r"several split files \(split_zhou_X.json, split_zhou_Y.json\)"):
        load_dataset(tmp_path)


def test_a_split_file_comes_before_the_name_of_the_folder(data_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data_folder, tmp_path / "imagenet")
    assert load_dataset(folder).record.name == "Colours"


def test_the_folder_may_be_the_one_commands_run_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sun397").mkdir()
    monkeypatch.chdir(tmp_path / "sun397")
    with pytest.raises(DataError, match=r"split_zhou_SUN397.json is missing"):
        load_dataset(Path())


def test_a_class_with_too_few_images_is_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="class 'red' has 6 training images, 7 are needed"):
        few_shot(dataset, 7, seed=1)


def test_a_data_set_without_training_images_is_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="Colours has no training images: it is for testing only"):
        few_shot(replace(dataset, train=()), 1, seed=1)


def test_all_given_base_classes_need_training_images(dataset: Dataset) -> None:
    some = tuple(item for item in dataset.train if item.label < 3)
    with pytest.raises(DataError, match="class 'white' has 0 training images, 1 are needed"):
        few_shot(replace(dataset, train=some, base_classes=4), 1, seed=1)


def test_new_classes_need_no_training_images(dataset: Dataset) -> None:
    names_only = replace(dataset, train=tuple(item for item in dataset.train if item.label < dataset.num_base))
    train, _ = few_shot(names_only, 4, seed=1)
    assert [item.label for item in train] == [0] * 4 + [1] * 4 + [2] * 4
    assert train == few_shot(dataset, 4, seed=1)[0][:12]


def test_few_shot_takes_at_most_four_validation_images(dataset: Dataset) -> None:
    train, val = few_shot(dataset, 5, seed=1)
    assert (len(train), len(val)) == (25, 15)
    assert len(few_shot(dataset, 2, seed=1)[1]) == 10


def test_no_shots_are_all_images(dataset: Dataset) -> None:
    assert few_shot(dataset, 0, seed=1) == (dataset.train, dataset.val)
    half = replace(dataset, train=tuple(item for item in dataset.train if item.label))
    with pytest.raises(DataError, match="class 'red' has 0 training images"):
        few_shot(half, 0, seed=1)
