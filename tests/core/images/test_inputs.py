"""What is taken for an image, without a model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec
from clipship.core.images.inputs import bytes_or_image, image_from_array, pixels_from_any

SPEC = ImageSpec(size_px=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_paths_become_bytes_and_arrays_images(tmp_path: Path) -> None:
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    image = image_from_array(array)
    image.save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    assert bytes_or_image(tmp_path / "one.png") == bytes_or_image(str(tmp_path / "one.png")) == content
    assert bytes_or_image(content) is content
    assert bytes_or_image(image) is image
    found = bytes_or_image(array)
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(np.asarray(found), array)
    for given in (tmp_path / "one.png", content, image, array):
        np.testing.assert_array_equal(pixels_from_any(given, SPEC), pixels_from_any(array, SPEC))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an image is a int: give a path, bytes, a PIL image or an array"):
        bytes_or_image(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"an array is float32 \[2, 2, 3\]: give RGB pixels"):
        image_from_array(np.full((2, 2, 3), np.nan, np.float32))
    with pytest.raises(FileNotFoundError):
        bytes_or_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageDecodeError, match="empty file"):
        pixels_from_any(b"", SPEC)


def test_each_form_is_resized_as_asked(tmp_path: Path) -> None:
    array = (np.indices((300, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    image = Image.fromarray(array)
    image.save(tmp_path / "one.png")
    forms = (tmp_path / "one.png", (tmp_path / "one.png").read_bytes(), image, array, np.asfortranarray(array))
    spec = ImageSpec(size_px=256, mean=SPEC.mean, std=SPEC.std)  # of such stripes many sums are near a half
    fast = [pixels_from_any(given, spec, "fast") for given in forms]
    exact = [pixels_from_any(given, spec, "exact") for given in forms]
    for quick, slow in zip(fast, exact, strict=True):
        np.testing.assert_array_equal(quick, fast[0])
        np.testing.assert_array_equal(slow, exact[0])
    assert np.abs(fast[0].astype(int) - exact[0]).max() == 1


def test_an_array_that_is_no_picture_is_refused_before_it_is_resized() -> None:
    with pytest.raises(UsageError, match=r"an array is float64 \[4, 4\]: give RGB pixels"):
        pixels_from_any(np.zeros((4, 4)), SPEC)  # type: ignore[arg-type]
