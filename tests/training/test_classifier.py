"""The two-line API: what it says of an image, and how it takes images."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipship.core.errors import CheckpointError, DataError, UsageError
from clipship.core.images.decoding import pixels_from_bytes, pixels_from_image
from clipship.core.images.inputs import ImageLike
from clipship.training.checkpoint import RECORD, Checkpoint, method_from_checkpoint, save_checkpoint
from clipship.training.classifier import Classifier, Prediction
from clipship.training.datasets.base import Dataset
from clipship.training.evaluation.temperature import Calibration
from clipship.training.methods import build_method, config_of
from clipship.training.model.clip import Clip

CALIBRATION = Calibration(temperature=2.5, num_images=40, classes="base", ece_before=9.0, ece_after=3.0)


def _checkpoint(clip: Clip, dataset: Dataset, name: str, calibration: Calibration | None) -> Checkpoint:
    config = config_of(name, recipe="test", base_model=clip.name)
    method = build_method(clip, config, dataset.task)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(6))
    return Checkpoint(
        config=config,
        task=dataset.task,
        dataset=dataset.record.name,
        data_digest="",
        base_model_digest=clip.digest,
        learned=method.learned(),
        calibration=None if calibration is None else asdict(calibration),
    )


@pytest.fixture
def checkpoint(clip: Clip, dataset: Dataset) -> Checkpoint:
    return _checkpoint(clip, dataset, "coop", CALIBRATION)


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run", checkpoint)
    return tmp_path / "run"


@pytest.fixture
def classifier(folder: Path) -> Classifier:
    return Classifier.load(folder)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Noise of odd sizes: nothing that a resize could leave alone."""
    random = np.random.default_rng(7)
    return [random.integers(0, 256, (33 + 5 * number, 40, 3), dtype=np.uint8) for number in range(7)]


def test_probabilities_are_those_of_the_calibrated_logits(
    clip: Clip, checkpoint: Checkpoint, classifier: Classifier, pictures: list[np.ndarray]
) -> None:
    method = method_from_checkpoint(checkpoint, clip)
    names = checkpoint.task.class_names
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(Image.fromarray(one)) for one in pictures])
        logits = method.classifier(names)(method.image_features(pixels)).double().numpy() / 2.5
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    wanted = powers / powers.sum(axis=1, keepdims=True)
    found = classifier.predict(pictures, top_k=9)
    assert classifier.calibration == CALIBRATION
    assert classifier.names == names
    assert len(found) == len(pictures)
    for prediction, row in zip(found, wanted, strict=True):
        order = sorted(range(5), key=lambda place: -row[place])
        assert [name for name, _ in prediction.top] == [names[place] for place in order]
        assert [value for _, value in prediction.top] == pytest.approx([row[place] for place in order], rel=1e-4)
        assert (prediction.label, prediction.probability) == prediction.top[0]


def test_without_a_calibration_the_methods_own_probabilities(
    clip: Clip, checkpoint: Checkpoint, pictures: list[np.ndarray]
) -> None:
    method = method_from_checkpoint(checkpoint, clip)
    plain, warm = Classifier(method), Classifier(method, calibration=CALIBRATION)
    (sharp,), (soft,) = plain.predict(pictures[:1]), warm.predict(pictures[:1])
    assert plain.calibration is None
    assert sharp.label == soft.label
    ratio = [np.log(one.top[0][1] / one.top[1][1]) for one in (sharp, soft)]
    assert ratio[0] == pytest.approx(2.5 * ratio[1])


def test_paths_bytes_pil_images_and_arrays_are_one(
    classifier: Classifier, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    array = pictures[0]
    (path := tmp_path / "one.png").write_bytes(_png(array))
    with Image.open(path) as lazy:
        mixed: list[ImageLike] = [array, path, str(path), _png(array), Image.fromarray(array), lazy]
        found = classifier.predict(mixed)
    found += classifier.predict(np.stack([array, array])) + classifier.predict(iter([path]))
    assert len(found) == 9
    assert {tuple(name for name, _ in one.top) for one in found} == {tuple(name for name, _ in found[0].top)}
    assert [one.probability for one in found] == pytest.approx([found[0].probability] * 9, rel=1e-5)


def test_pixels_are_those_that_serving_sends(
    classifier: Classifier, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    features = "clipship.training.classifier.features_of_pixels"
    original = classifier.method.image_features
    normalize = classifier.method.clip.normalize

    def kept(method: object, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.numpy())
        return original(normalize(pixels)).detach()

    monkeypatch.setattr(features, kept)
    spec = classifier.method.clip.image_spec
    turned = io.BytesIO()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pictures[1]).save(turned, "JPEG", exif=rotated)
    classifier.predict([pictures[0], turned.getvalue()])
    np.testing.assert_array_equal(seen[0][0], pixels_from_image(Image.fromarray(pictures[0]), spec))
    np.testing.assert_array_equal(seen[0][1], pixels_from_bytes(turned.getvalue(), spec))


def test_the_size_of_a_batch_changes_nothing(classifier: Classifier, pictures: list[np.ndarray]) -> None:
    wanted = classifier.predict(pictures)
    for size in (1, 3, 7):
        found = classifier.predict(pictures, batch_size=size)
        assert [one.label for one in found] == [one.label for one in wanted]
        assert [one.probability for one in found] == pytest.approx([one.probability for one in wanted], rel=1e-4)
    assert classifier.predict([]) == []


def test_images_are_read_batch_by_batch(classifier: Classifier, pictures: list[np.ndarray]) -> None:
    taken = []

    def source() -> Iterator[np.ndarray]:
        for number, picture in enumerate(pictures):
            taken.append(number)
            yield picture
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        classifier.predict(source(), batch_size=2)
    assert taken == list(range(7))


def test_the_top_classes_are_as_many_as_asked_for(classifier: Classifier, pictures: list[np.ndarray]) -> None:
    (whole,), (two,) = classifier.predict(pictures[:1], top_k=5), classifier.predict(pictures[:1], top_k=2)
    assert two == Prediction(label=whole.label, probability=whole.probability, top=whole.top[:2])
    assert sum(value for _, value in whole.top) == pytest.approx(1)


def test_any_names_for_an_open_vocabulary(folder: Path, pictures: list[np.ndarray]) -> None:
    classifier = Classifier.load(folder, names=["lighthouse", "steam engine"], device="cpu")
    (found,) = classifier.predict(pictures[:1])
    assert {name for name, _ in found.top} == {"lighthouse", "steam engine"}
    assert sum(value for _, value in found.top) == pytest.approx(1)
    one = Classifier.load(folder, names=["lighthouse"])
    assert one.predict(pictures[:1])[0].top == (("lighthouse", 1.0),)


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no class names"), (["a", "a"], "occurs twice"), ([" "], "non-empty"), ("cat", "give a list of names")],
)
def test_odd_names_are_refused(folder: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classifier.load(folder, names=names)


def test_a_closed_vocabulary_chooses_from_its_own_classes(
    clip: Clip, dataset: Dataset, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    save_checkpoint(tmp_path / "probe", _checkpoint(clip, dataset, "linear-probe", None))
    whole = Classifier.load(tmp_path / "probe")
    assert whole.names == dataset.class_names[:3]
    pair = Classifier.load(tmp_path / "probe", names=dataset.class_names[1:3])
    assert {name for name, _ in pair.predict(pictures[:1])[0].top} == set(dataset.class_names[1:3])
    with pytest.raises(DataError, match="class 'cat'"):
        Classifier.load(tmp_path / "probe", names=["red", "cat"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((8, 8, 3), np.nan, np.float32), r"image 2: an array is float32 \[8, 8, 3\]: give RGB pixels, uint8"),
        (np.full((8, 8, 3), 0.5), "image 2: an array is float64"),
        (np.zeros((8, 8, 3), np.int64), "image 2: an array is int64"),
        (np.zeros((8, 8), np.uint8), r"image 2: an array is uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"image 2: an array is uint8 \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), r"image 2: an array is uint8 \[0, 8, 3\]"),
        (None, "image 2: an image is a NoneType: give a path"),
        (b"", r"image 2: empty file \(0 bytes\)"),
        (b"GIF89a", "image 2: (corrupt|not an image)"),
        ("nowhere.png", r"image 2 \(nowhere.png\): cannot be read: No such file"),
        (Path("."), r"image 2 \(.\): cannot be read: Is a directory"),
    ],
)
def test_a_bad_image_is_named(
    classifier: Classifier, pictures: list[np.ndarray], array: np.ndarray, message: str
) -> None:
    for size in (1, 32):
        with pytest.raises(DataError, match=f"^{message}"):
            classifier.predict([pictures[0], pictures[1], array], batch_size=size)


def test_floating_point_files_are_refused_whatever_they_hold(classifier: Classifier, tmp_path: Path) -> None:
    values = np.full((9, 9), 0.5, np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tiff")
    with pytest.raises(DataError, match=r"image 0 \(.*nan.tiff\): floating-point pixels: save the image with 8 or 16"):
        classifier.predict([tmp_path / "nan.tiff"])
    with pytest.raises(DataError, match="image 0: floating-point pixels"):
        classifier.predict([Image.fromarray(values)])


def test_a_pil_image_whose_file_is_cut_is_named(
    classifier: Classifier, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    content = _png(pictures[0])
    (cut := tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(cut) as lazy, pytest.raises(DataError, match=r"^image 0: cannot be read: "):
        classifier.predict([lazy])


def test_a_single_image_is_no_list(classifier: Classifier, pictures: list[np.ndarray]) -> None:
    for single in (pictures[0], "cat.png", b"", Path("cat.png"), Image.fromarray(pictures[0])):
        with pytest.raises(UsageError, match=r"give a list, \[image\]"):
            classifier.predict(single)  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"top_k": 0}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(classifier: Classifier, numbers: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        classifier.predict([], **numbers)


def test_the_base_model_may_have_moved(
    folder: Path, model_folder: Path, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    wanted = Classifier.load(folder).predict(pictures)
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    record = json.loads((folder / RECORD).read_text())
    record["config"]["base_model"] = str(tmp_path / "gone")
    (folder / RECORD).write_text(json.dumps(record))
    assert Classifier.load(str(folder), base_model=str(moved)).predict(pictures) == wanted


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        Classifier.load(tmp_path)
