"""Crops, the image cache and the batches of an epoch."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import ImageSpec
from clipship.training.config import TrainConfig
from clipship.training.datasets.base import Dataset
from clipship.training.datasets.load import few_shot
from clipship.training.inputs import batches
from clipship.training.inputs.batches import Epoch, ImageCache, crop_box
from clipship.training.inputs.synthetic import synthetic_paths
from clipship.training.methods import Batch, Partners, config_of
from clipship.training.synthetic_set import SyntheticSet

CONFIG = config_of("coop", recipe="test", base_model="none", shots=2, batch_size=4, epochs=2)


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
    first = batches.training_pixels(image, 32, CONFIG, "a")
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, batches.training_pixels(image, 32, CONFIG, "a"))
    assert not np.array_equal(first, batches.training_pixels(image, 32, CONFIG, "b"))


def test_a_recipe_can_keep_left_and_right() -> None:
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    still = config_of("coop", recipe="test", base_model="none", flip=False)
    rising = [batches.training_pixels(image, 16, still, str(key))[8, :, 0] for key in range(20)]
    assert all(row[-1] > row[0] for row in rising)
    mirrored = [batches.training_pixels(image, 16, CONFIG, str(key))[8, :, 0] for key in range(20)]
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
    pixels = batches.evaluation_pixels([item.path for item in dataset.test[:2]], spec)
    assert (pixels.shape, pixels.dtype) == ((2, 32, 32, 3), torch.uint8)


def _epoch(dataset: Dataset, synthetic: SyntheticSet | None, epoch: int, config: TrainConfig = CONFIG) -> Epoch:
    base = [item for item in few_shot(dataset, 2, 1)[0] if item.label < dataset.num_base]
    paths = synthetic_paths(synthetic, dataset.class_names, config) if synthetic else ()
    return Epoch(base, paths, num_base=dataset.num_base, config=config, size_px=32, cache=ImageCache(), epoch=epoch)


def test_batches_pair_real_images_with_synthetic_ones(dataset: Dataset, synthetic: SyntheticSet) -> None:
    epoch = _epoch(dataset, synthetic, 1)
    assert len(epoch) == 1  # 6 images, batches of 4: the rest waits for the next epoch's order
    batch = epoch[0]
    real, partners, new = batch.real, batch.synthetic_base, batch.synthetic_new
    assert partners is not None
    assert new is not None
    assert real.images.shape == (4, 32, 32, 3)
    assert set(new.labels.tolist()) <= {3, 4}
    for files, images in ((batch.files[:4], real), (batch.files[4:8], partners), (batch.files[8:], new)):
        assert [Path(file).parent.name for file in files] == [dataset.class_names[label] for label in images.labels]
    assert torch.equal(partners.labels, real.labels)


def test_batches_repeat_for_an_epoch_and_change_with_it(dataset: Dataset, synthetic: SyntheticSet) -> None:
    first, again, later = (_epoch(dataset, synthetic, number)[0] for number in (1, 1, 2))
    assert first.files == again.files
    assert torch.equal(first.real.images, again.real.images)
    assert first.files != later.files


def test_synthetic_images_keep_their_crop_unless_redrawn(dataset: Dataset, synthetic: SyntheticSet) -> None:
    redrawn = config_of("coop", recipe="test", base_model="none", shots=2, redraw_synthetic=True)
    path = synthetic.kept("white")[0].path
    once = [_epoch(dataset, synthetic, number)._synthetic_pixels([path], "0 seen") for number in (1, 2)]
    assert torch.equal(once[0], once[1])
    each = [_epoch(dataset, synthetic, number, redrawn)._synthetic_pixels([path], "0 seen") for number in (1, 2)]
    assert not torch.equal(each[0], each[1])


def test_a_batch_larger_than_the_data_is_one_step(dataset: Dataset) -> None:
    config = config_of("coop", recipe="test", base_model="none", batch_size=64)
    assert len(_epoch(dataset, None, 1, config)) == 1
    assert len(_epoch(dataset, None, 1, config)[0].real) == 6


def test_a_class_without_synthetic_images_has_no_partners(dataset: Dataset, uneven: SyntheticSet) -> None:
    config = replace(CONFIG, batch_size=6)
    for number in range(1, 6):
        batch = _epoch(dataset, uneven, number, config)[0]
        assert batch.synthetic_base is not None
        assert batch.synthetic_new is not None
        real, synthetic = batch.files[:6], batch.files[6:]
        with_images = [row for row, label in enumerate(batch.real.labels.tolist()) if label != 2]
        assert batch.synthetic_base.rows.tolist() == with_images
        assert (len(batch.synthetic_base), batch.synthetic_base.share) == (4, 4 / 6)
        partners = [Path(synthetic[place]).parent.name for place in range(4)]
        assert partners == [Path(real[row]).parent.name for row in with_images]
        assert batch.synthetic_new.labels.tolist() == [3] * 6, "the other new class has none"


def test_partners_stay_with_their_images_in_the_parts_of_a_batch(dataset: Dataset, uneven: SyntheticSet) -> None:
    batch = _epoch(dataset, uneven, 1, replace(CONFIG, batch_size=6))[0]
    parts = [batch.part(number, 4) for number in range(4)]  # 1, 2, 1 and 2 real images
    assert [len(part) for part in parts] == [1, 2, 1, 2]
    whole, with_partners = _partners(batch), [part for part in parts if len(_partners(part))]
    assert torch.equal(torch.cat([_partners(part).images for part in with_partners]), whole.images)
    assert torch.equal(torch.cat([_partners(part).labels for part in with_partners]), whole.labels)
    shares = [len(part) / 6 * part.partner_weight / len(_partners(part)) for part in with_partners]
    assert shares == pytest.approx([1 / 4] * len(shares)), "each of the four partners counts the same"
    halves = batch.part(0, 2)
    again = [halves.part(number, 3) for number in range(3)]
    assert torch.equal(torch.cat([_partners(part).labels for part in again]), _partners(halves).labels)


def _partners(batch: Batch) -> Partners:
    assert batch.synthetic_base is not None
    return batch.synthetic_base


def test_where_every_class_has_images_every_row_has_a_partner(dataset: Dataset, synthetic: SyntheticSet) -> None:
    batch = _epoch(dataset, synthetic, 1)[0]
    assert _partners(batch).rows.tolist() == [0, 1, 2, 3]
    assert (_partners(batch).share, batch.partner_weight, batch.part(0, 2).partner_weight) == (1.0, 1.0, 1.0)
