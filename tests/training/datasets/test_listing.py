"""CSV and Parquet lists of images."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from clipship.core.errors import DataError
from clipship.training.datasets.load import load_dataset
from tests.training.pictures import write_jpegs

ROWS = [("x/3.jpg", "dog", "train"), ("1.jpg", "007", "test"), ("2.jpg", "dog", "val"), ("x/0.jpg", "007", "train")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_jpegs(tmp_path / "mine", *(path for path, *_ in ROWS))


def _write(path: Path, columns: dict[str, object]) -> Path:
    write = parquet.write_table if path.suffix == ".parquet" else csv.write_csv
    write(pa.table(columns), path)
    return path


def _columns() -> dict[str, object]:
    path, label, split = zip(*ROWS, strict=True)
    return {"width": [1, 2, 3, 4], "split": split, "label": label, "path": path}


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "LIST.CSV"])
def test_a_list_with_splits_keeps_the_order_of_its_rows(folder: Path, name: str) -> None:
    dataset = load_dataset(_write(folder / name, _columns()))
    assert (dataset.record.name, dataset.record.template) == (name.split(".")[0], "a photo of a {}.")
    assert dataset.class_names == ("007", "dog")
    assert [(item.path, item.label) for item in dataset.train] == [(folder / "x/3.jpg", 1), (folder / "x/0.jpg", 0)]
    assert [item.path.name for item in (*dataset.val, *dataset.test)] == ["2.jpg", "1.jpg"]


def test_a_list_without_splits_is_split_as_a_tree_is(tmp_path: Path) -> None:
    names = [f"{label}/{number}.jpg" for label in ("b", "a") for number in range(10)]
    write_jpegs(tmp_path / "tree", *names)
    listed = load_dataset(_write(tmp_path / "tree" / "l.csv", {"path": names, "label": [one[0] for one in names]}))
    tree = load_dataset(tmp_path / "tree")
    assert (listed.train, listed.val, listed.test) == (tree.train, tree.val, tree.test)


def test_paths_may_be_absolute_and_labels_of_other_types(folder: Path, tmp_path: Path) -> None:
    paths = [str(folder / path) for path, *_ in ROWS]
    label = pa.array(["b", "b", "a", "a"]).dictionary_encode()
    columns = {"path": paths, "label": label, "split": ["train", "test", "train", "test"]}
    dataset = load_dataset(_write(tmp_path / "l.parquet", columns))
    assert (dataset.class_names, dataset.train[0].path) == (("a", "b"), folder / "x/3.jpg")
    numbers = load_dataset(_write(tmp_path / "n.parquet", columns | {"label": [7, 8, 7, 8]}))
    assert numbers.class_names == ("7", "8")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ("x/3.jpg", "", "2.jpg", "x/0.jpg")}, "row 2 has no path"),
        ({"label": ("dog", "007", " ", "007")}, "row 3 has no label"),
        ({"split": ("train", "test", "val", "")}, "row 4 has no split"),
        ({"split": ("train", "test", "valid", "train")}, "row 3 has split 'valid': give train, val, test"),
        ({"path": ("x/3.jpg", "1.jpg", "2.jpg", "1.jpg")}, "row 4 lists 1.jpg again, as row 2"),
        ({"label": ("dog",) * 4}, r"1 classes \(dog\)"),
        ({"label": ("dog", "Dog", "dog", "Dog")}, "'Dog' and 'dog' give the same prompt"),
        ({"path": ("x/3.jpg", "no.jpg", "2.jpg", "x/0.jpg")}, "1 of the images named in .* the first is .*no.jpg"),
    ],
)
def test_bad_rows_are_numbered(folder: Path, suffix: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(_write(folder / f"list{suffix}", _columns() | changes))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["path", "label"])
def test_a_missing_column_is_named(folder: Path, suffix: str, column: str) -> None:
    columns = _columns()
    del columns[column]
    with pytest.raises(DataError, match=f"no column '{column}' among .*split"):
        load_dataset(_write(folder / f"list{suffix}", columns))


def test_empty_cells_of_parquet_may_be_null(folder: Path) -> None:
    with pytest.raises(DataError, match="row 1 has no label"):
        load_dataset(_write(folder / "list.parquet", _columns() | {"label": [None, "a", "b", "c"]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", "", "cannot be read as .csv"),
        ("l.csv", "path,label\na.jpg,a,b\n", "cannot be read as .csv"),
        ("l.csv", "path,label\n", r"0 classes \(none\)"),
        ("l.csv", "path,label,label\na.jpg,a,b\n", "two columns are named 'label'"),
        ("l.parquet", "path,label\n", "cannot be read as .parquet"),
        ("l.txt", "path,label\n", "l.txt: not a list of images: give a folder or a file that ends in .csv, .parquet"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / name)
