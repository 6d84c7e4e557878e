"""Split files, the published few-shot lists and class halves, crops and batches."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images import ImageSpec
from clipship.training import data
from clipship.training.config import TrainConfig
from clipship.training.data import Dataset, Epoch, ImageCache, base_new_split, crop_box, few_shot, load_dataset
from clipship.training.synthetic import SyntheticSet

CONFIG = TrainConfig(recipe="test", method="coop", base_model="none", shots=2, batch_size=4, epochs=2)


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


def test_crops_stay_inside_and_keep_the_share() -> None:
    generator = random.Random(0)
    shares = []
    for _ in range(500):
        left, top, right, bottom = crop_box(90, 70, 0.3, generator)
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 70
        assert 0.72 <= (right - left) / (bottom - top) <= 1.4
        shares.append((right - left) * (bottom - top) / (90 * 70))
    assert 0.28 < min(shares) < 0.35
    assert 0.9 < max(shares) <= 1.0


def test_crops_of_extreme_images_are_central() -> None:
    assert crop_box(400, 10, 1.0, random.Random(0)) == (193, 0, 206, 10)


def test_training_pixels_follow_their_key() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    first = data.training_pixels(image, 32, CONFIG, "a")
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, data.training_pixels(image, 32, CONFIG, "a"))
    assert not np.array_equal(first, data.training_pixels(image, 32, CONFIG, "b"))


def test_a_recipe_can_keep_left_and_right() -> None:
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    still = TrainConfig(recipe="test", method="coop", base_model="none", flip=False)
    rising = [data.training_pixels(image, 16, still, str(key))[8, :, 0] for key in range(20)]
    assert all(row[-1] > row[0] for row in rising)
    mirrored = [data.training_pixels(image, 16, CONFIG, str(key))[8, :, 0] for key in range(20)]
    assert 3 < sum(bool(row[-1] < row[0]) for row in mirrored) < 17


def test_broken_images_are_named_before_training(dataset: Dataset, tmp_path: Path) -> None:
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken.png: not an image"):
        ImageCache().preload([dataset.train[0].path, broken])


def test_the_cache_keeps_what_fits(dataset: Dataset) -> None:
    paths = [item.path for item in dataset.train[:3]]
    cache = ImageCache(limit_bytes=2 * 40 * 34 * 3)
    cache.preload(paths)
    assert cache.image(paths[0]) is cache.image(paths[0])
    assert cache.image(paths[2]) is not cache.image(paths[2])
    assert np.array_equal(np.asarray(cache.image(paths[2])), np.asarray(Image.open(paths[2])))


def test_evaluation_pixels_are_the_clients(dataset: Dataset) -> None:
    spec = ImageSpec(size_px=32, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = data.evaluation_pixels([item.path for item in dataset.test[:2]], spec)
    assert (pixels.shape, pixels.dtype) == ((2, 32, 32, 3), torch.uint8)


def _epoch(dataset: Dataset, synthetic: SyntheticSet | None, epoch: int, config: TrainConfig = CONFIG) -> Epoch:
    base = [item for item in few_shot(dataset, 2, 1)[0] if item.label < dataset.num_base]
    paths = data.synthetic_paths(synthetic, dataset.class_names) if synthetic else ()
    return Epoch(base, paths, num_base=dataset.num_base, config=config, size_px=32, cache=ImageCache(), epoch=epoch)


def test_batches_pair_real_images_with_synthetic_ones(dataset: Dataset, synthetic: SyntheticSet) -> None:
    epoch = _epoch(dataset, synthetic, 1)
    assert len(epoch) == 1  # 6 images, batches of 4: the rest waits for the next epoch's order
    batch = epoch[0]
    assert batch.pixels.shape == (4, 32, 32, 3)
    assert batch.seen is not None
    assert batch.unseen is not None
    assert batch.unseen_labels is not None
    assert set(batch.unseen_labels.tolist()) <= {3, 4}
    real, seen, unseen = batch.files[:4], batch.files[4:8], batch.files[8:]
    for files, labels in ((real, batch.labels), (seen, batch.labels), (unseen, batch.unseen_labels)):
        assert [Path(file).parent.name for file in files] == [dataset.class_names[label] for label in labels]


def test_batches_repeat_for_an_epoch_and_change_with_it(dataset: Dataset, synthetic: SyntheticSet) -> None:
    first, again, later = (_epoch(dataset, synthetic, number)[0] for number in (1, 1, 2))
    assert first.files == again.files
    assert torch.equal(first.pixels, again.pixels)
    assert first.files != later.files


def test_synthetic_images_keep_their_crop_unless_redrawn(dataset: Dataset, synthetic: SyntheticSet) -> None:
    redrawn = TrainConfig(recipe="test", method="coop", base_model="none", shots=2, redraw_synthetic=True)
    path = synthetic.kept("white")[0].path
    once = [_epoch(dataset, synthetic, number)._synthetic_pixels([path], "0 seen") for number in (1, 2)]
    assert torch.equal(once[0], once[1])
    each = [_epoch(dataset, synthetic, number, redrawn)._synthetic_pixels([path], "0 seen") for number in (1, 2)]
    assert not torch.equal(each[0], each[1])


def test_a_batch_larger_than_the_data_is_one_step(dataset: Dataset) -> None:
    config = TrainConfig(recipe="test", method="coop", base_model="none", batch_size=64)
    assert len(_epoch(dataset, None, 1, config)) == 1
    assert len(_epoch(dataset, None, 1, config)[0].labels) == 6


def test_synthetic_sets_must_cover_every_class(synthetic: SyntheticSet) -> None:
    with pytest.raises(DataError, match="no images of 1 classes, the first is 'violet'"):
        data.synthetic_paths(synthetic, ["red", "violet"])
