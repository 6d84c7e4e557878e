"""FGVC Aircraft from files like its own."""

from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets.load import load_dataset
from tests.training.pictures import write_jpegs

NAMES = ("707-320", "Cessna 525", "Cessna 560", "F/A-18")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("\n".join(NAMES) + "\n")
    for number, split in enumerate(("train", "val", "test")):
        ids = [f"00{number}{label}" for label in range(4)]
        lines = [f"{one} {NAMES[label]}" for label, one in enumerate(ids)]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(reversed(lines)) + "\n")
        write_jpegs(folder / "images", *(f"{one}.jpg" for one in ids))
    return folder


def test_labels_follow_the_list_of_variants_and_items_that_of_images(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.class_names) == ("FGVCAircraft", NAMES)
    assert dataset.class_names[dataset.num_base - 1 : dataset.num_base + 1] == ("Cessna 525", "Cessna 560")
    assert [item.label for item in dataset.test] == [3, 2, 1, 0]
    assert (dataset.val[0].path, dataset.val[0].class_name) == (folder / "images" / "0013.jpg", "F/A-18")
    assert load_dataset(folder.rename(folder.with_name("planes"))).record.name == "FGVCAircraft"


@pytest.mark.parametrize("name", ["variants.txt", "images_variant_val.txt"])
def test_a_missing_file_is_named_with_where_to_get_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"fgvc_aircraft/{name} is missing, FGVCAircraft needs it: get it from http"):
        load_dataset(folder)


def test_missing_images_and_unknown_names_are_named(folder: Path) -> None:
    (folder / "images" / "0021.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the images named in images_variant_.* the first is .*0021.jpg"):
        load_dataset(folder)
    (folder / "images_variant_test.txt").write_text("0020 Cessna 5250\n")
    with pytest.raises(DataError, match=r"images_variant_test.txt: '0020 Cessna 5250' names no class of variants.txt"):
        load_dataset(folder)
