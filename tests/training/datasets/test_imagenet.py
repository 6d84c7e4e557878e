"""ImageNet and its variants from trees of a few classes."""

from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.training.datasets.load import few_shot, load_dataset
from tests.training.pictures import write_jpegs

WNIDS = ("n01", "n02", "n03", "n04")
NAMES = ("tench", "great white shark", "missile", "missile_")
VAL_V2 = "imagenetv2-matched-frequency-format-val"


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("n01 tench\nn02 great white shark\nn03 missile\nn04 missile\n")
    return folder


def _imagenet(root: Path, *splits: str, name: str = "imagenet") -> Path:
    folder = _folder(root, name)
    for split in splits:
        for wnid in WNIDS:
            write_jpegs(folder / "images" / split / wnid, f"{wnid}_9.JPEG", f"{wnid}_10.JPEG", f"{wnid}_2.JPEG")
    return folder


def test_imagenet_is_tested_on_its_validation_images(tmp_path: Path) -> None:
    folder = _imagenet(tmp_path, "train", "val")
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.num_base) == ("ImageNet", 2)
    assert dataset.class_names == NAMES
    assert dataset.val == dataset.test
    assert [item.label for item in dataset.train] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert dataset.test[4].path == folder / "images" / "val" / "n02" / "n02_2.JPEG"
    assert dataset.train[0].path.name == "n01_10.JPEG"  # sorted names, not the order of the directory


def test_names_that_come_twice_keep_their_prompt_tokens(tmp_path: Path) -> None:
    import open_clip

    dataset = load_dataset(_imagenet(tmp_path, "train", "val"))
    prompts = [dataset.record.template.replace("{}", name.replace("_", " ")) for name in dataset.class_names]
    tokens = open_clip.get_tokenizer("ViT-B-16")(prompts)
    assert prompts[2] != prompts[3]
    assert tokens[2].equal(tokens[3])
    assert not tokens[1].equal(tokens[2])


def test_order_is_that_of_wordnet_ids_whatever_that_of_the_file(tmp_path: Path) -> None:
    folder = _imagenet(tmp_path, "val", name="mine")
    (folder / "classnames.txt").write_text("n04 d\nn02 b\nn01 a\nn03 c\n")
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.class_names) == ("ImageNet", ("a", "b", "c", "d"))


def test_imagenet_without_training_images_is_for_testing_only(tmp_path: Path) -> None:
    dataset = load_dataset(_imagenet(tmp_path, "val"))
    assert (dataset.train, len(dataset.test)) == ((), 12)
    with pytest.raises(DataError, match="ImageNet has no training images"):
        few_shot(dataset, 1, seed=1)


def test_listed_images_are_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _imagenet(tmp_path, "train", "val")
    asked: list[Path] = []
    ask = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> object:
        asked.append(path)
        return ask(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)
    load_dataset(folder)
    assert asked
    assert not [path for path in asked if path.suffix == ".JPEG"]


def test_imagenet_v2_numbers_the_lines_of_the_class_names(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "imagenetv2")
    (folder / "classnames.txt").write_text("".join(f"n{9000 - k} name {k}\n" for k in range(11)))
    for number in range(11):
        write_jpegs(folder / VAL_V2 / str(number), f"{number}.jpeg")
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.train, dataset.val) == ("ImageNetV2", (), ())
    assert [(item.path.name, item.label, item.class_name) for item in dataset.test] == [
        (f"{k}.jpeg", k, f"name {k}") for k in range(11)
    ]


def test_imagenet_sketch_has_all_classes(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "imagenet-sketch")
    write_jpegs(folder / "images", *(f"{wnid}/sketch_{k}.JPEG" for wnid in WNIDS for k in range(2)))
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.class_names) == ("ImageNetSketch", NAMES)
    assert [item.label for item in dataset.test] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [("imagenet-adversarial", "imagenet-a", "ImageNetA"), ("imagenet-rendition", "imagenet-r", "ImageNetR")],
)
def test_imagenet_a_and_r_have_the_classes_of_their_folders(
    tmp_path: Path, name: str, images: str, expected: str
) -> None:
    folder = _folder(tmp_path, name)
    write_jpegs(folder / images, "n02/x.jpg", "n03/y.jpg")
    (folder / images / "README.txt").write_text("200 classes")
    dataset = load_dataset(folder)
    assert (dataset.record.name, dataset.class_names) == (expected, ("great white shark", "missile"))
    assert [(item.label, item.class_name) for item in dataset.test] == [(0, "great white shark"), (1, "missile")]
    assert load_dataset(folder.rename(tmp_path / "other")).record.name == expected
    write_jpegs(tmp_path / "other" / images, "n99/z.jpg")
    with pytest.raises(DataError, match=r"n99 has no line in classnames.txt"):
        load_dataset(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("imagenet", "images/val"),
        ("imagenetv2", VAL_V2),
        ("imagenet-sketch", "images"),
        ("imagenet-adversarial", "imagenet-a"),
        ("imagenet-rendition", "imagenet-r"),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path, name: str, missing: str) -> None:
    folder = _folder(tmp_path, name)
    with pytest.raises(DataError, match=f"{name}/{missing} is missing, ImageNet.* needs it: get it from http.*CoOp"):
        load_dataset(folder)
    (folder / "classnames.txt").unlink()
    with pytest.raises(DataError, match=f"{name}/classnames.txt is missing, ImageNet.* needs it: get it from http"):
        load_dataset(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_is_missing(tmp_path: Path, split: str) -> None:
    folder = _imagenet(tmp_path, "train", "val")
    (folder / "images" / split / "n03").rename(folder / "n03")
    with pytest.raises(DataError, match=f"images/{split}/n03 is missing, ImageNet needs it"):
        load_dataset(folder)


@pytest.mark.parametrize("line", ["n05", "n04 again"])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    folder = _imagenet(tmp_path, "val")
    with (folder / "classnames.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=f"classnames.txt: '{line}' has no name or comes twice"):
        load_dataset(folder)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "imagenet-rendition")
    write_jpegs(folder / "imagenet-r", "n02/x.jpg")
    with pytest.raises(DataError, match="imagenet-r: 1 classes: there must be at least 2"):
        load_dataset(folder)
