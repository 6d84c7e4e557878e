"""Proposed zero-shot splits from MATLAB files like those of their authors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from clipship.core.errors import DataError, MissingExtraError
from clipship.training.datasets.gzsl import clean_class_name
from clipship.training.datasets.load import load_dataset
from tests.training.pictures import write_jpegs

# As packed: classes antelope, grizzly+bear, killer+whale, zebra; grizzly+bear is unseen.
CLASSES = ("antelope", "grizzly+bear", "killer+whale", "zebra")
LABELS = (1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4)
SPLITS = {"trainval_loc": (1, 7, 2, 6, 9, 10), "test_seen_loc": (11, 3, 8), "test_unseen_loc": (5, 4)}
WHERE = {
    "awa2": "/BS/xian/data/Animals_with_Attributes2//JPEGImages/",
    "cub": "/BS/Deep_Fragments/MSc/CUB_200_2011/CUB_200_2011/images/",
    "sun": "/BS/Deep_Fragments/MSc/data/SUN/images/",
}


def _cells(texts: list[str]) -> Any:
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    return cells


def _column(numbers: tuple[int, ...]) -> Any:
    return np.array(numbers, dtype=np.float64)[:, None]  # MATLAB's numbers are doubles


def _write(folder: Path, classes: tuple[str, ...] = CLASSES, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    images = [f"{classes[label - 1]}/{number}.jpg" for number, label in enumerate(LABELS, start=1)]
    splits = {name: _column(numbers) for name, numbers in SPLITS.items()} | {
        "allclasses_names": _cells(list(classes)),
        "att": np.ones((85, len(classes))),
    }
    files = {
        "image_files": _cells([WHERE[folder.name] + image for image in images]),
        "labels": _column(LABELS),
        "features": np.ones((2048, len(LABELS))),
    }
    savemat(folder / "att_splits.mat", splits | {name: one for name, one in changes.items() if name in splits})
    savemat(folder / "res101.mat", files | {name: one for name, one in changes.items() if name in files})
    write_jpegs(folder / ("JPEGImages" if folder.name == "awa2" else "images"), *images)
    return folder


def test_seen_classes_come_first_and_are_the_base_classes(tmp_path: Path) -> None:
    folder = _write(tmp_path / "awa2")
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.generalised) == ("AWA2", True)
    assert dataset.class_names == ("antelope", "killer whale", "zebra", "grizzly bear")
    assert (dataset.base_classes, dataset.num_base) == (3, 3)
    assert [(item.path.name, item.label) for item in dataset.train] == [
        ("1.jpg", 0), ("7.jpg", 1), ("2.jpg", 0), ("6.jpg", 1), ("9.jpg", 2), ("10.jpg", 2),
    ]  # fmt: skip
    assert dataset.val == ()
    assert [(item.path.name, item.label, item.class_name) for item in dataset.test] == [
        ("11.jpg", 2, "zebra"),
        ("3.jpg", 0, "antelope"),
        ("8.jpg", 1, "killer whale"),
        ("5.jpg", 3, "grizzly bear"),
        ("4.jpg", 3, "grizzly bear"),
    ]
    assert dataset.test[3].path == folder / "JPEGImages" / "grizzly+bear" / "5.jpg"


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("cub", ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.X", "004.Y"), "Black_footed_Albatross"),
        ("sun", ("a/abbey", "a/access_road", "s/shop", "t/tent"), "a/abbey"),
    ],
)
def test_images_of_birds_and_scenes_are_below_images(
    tmp_path: Path, name: str, classes: tuple[str, ...], expected: str
) -> None:
    dataset = load_dataset(_write(tmp_path / name, classes))
    assert (dataset.record.name, dataset.class_names[0]) == (name.upper(), expected)
    assert dataset.train[0].path == tmp_path / name / "images" / classes[0] / "1.jpg"


def test_class_names_are_cleaned() -> None:
    assert clean_class_name("grizzly+bear") == "grizzly bear"
    assert clean_class_name("001.Black_footed_Albatross") == "Black_footed_Albatross"
    assert clean_class_name("access_road") == "access_road"


def test_classes_that_no_list_uses_are_left_out(tmp_path: Path) -> None:
    changes = {"trainval_loc": _column((1, 2, 9)), "test_seen_loc": _column((3, 10))}
    assert load_dataset(_write(tmp_path / "awa2", **changes)).class_names == ("antelope", "zebra", "grizzly bear")


@pytest.mark.parametrize("name", ["att_splits.mat", "res101.mat"])
def test_missing_and_damaged_files_are_named_with_where_to_get_them(tmp_path: Path, name: str) -> None:
    folder = _write(tmp_path / "awa2")
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"awa2/{name}: not a MATLAB file .*: get it again from http.*xlsa17"):
        load_dataset(folder)
    (folder / name).write_text("<html>moved</html>" * 20)
    with pytest.raises(DataError, match=f"awa2/{name}: not a MATLAB file .*: get it again from http.*xlsa17"):
        load_dataset(folder)
    (folder / name).unlink()
    with pytest.raises(
        DataError, match=rf"awa2/{name} is missing, AWA2 needs it: get it from http.*xlsa17.zip \(data/AW"
    ):
        load_dataset(folder)


def test_missing_images_are_named(tmp_path: Path) -> None:
    folder = _write(tmp_path / "awa2")
    (folder / "JPEGImages" / "zebra" / "9.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the images named in res101.mat .* first is .*zebra/9.jpg.*AwA2"):
        load_dataset(folder)


def test_a_variable_is_missing(tmp_path: Path) -> None:
    folder = _write(tmp_path / "awa2")
    savemat(folder / "res101.mat", {"labels": _column(LABELS)})
    with pytest.raises(DataError, match=r"res101.mat: no variable image_files"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": _column((*LABELS[:-1], 5))},
            "res101.mat: labels holds 5.0: it must hold whole numbers from 1 to 4",
        ),
        ({"labels": _column(LABELS[:-1])}, "11 image_files but 10 labels"),
        ({"trainval_loc": _column((0, 1))}, "att_splits.mat: trainval_loc holds 0.0: .* from 1 to 11"),
        ({"trainval_loc": np.array([[1.5]])}, "trainval_loc holds 1.5"),
        ({"trainval_loc": _cells(["a"])}, "trainval_loc holds .*a.*: it must hold whole numbers"),
        ({"trainval_loc": _column((1, 2, 3, 6, 9))}, "image 3 is in .* more than once"),
        ({"trainval_loc": _column((1, 9, 10))}, "class 'killer whale' is both seen and unseen"),
        ({"test_unseen_loc": _column((4, 2)), "trainval_loc": _column((1, 7, 9))}, "class 'antelope' is both seen"),
        ({"image_files": _cells(["/x/images/y.jpg"] * 11)}, "'/x/images/y.jpg' is no path below JPEGImages/"),
        ({"allclasses_names": _cells(["a", "b+c", "b_c", "d"])}, "'b_c' and 'b c' give the same prompt"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(_write(tmp_path / "awa2", **changes))


def test_which_data_set_it_is_follows_from_the_name_of_the_folder(tmp_path: Path) -> None:
    folder = _write(tmp_path / "awa2").rename(tmp_path / "animals")
    with pytest.raises(DataError, match=r"animals: has att_splits.mat, .*: name the folder awa2, cub, sun"):
        load_dataset(folder)


def test_scipy_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path / "awa2")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match="scipy is not installed"):
        load_dataset(folder)
