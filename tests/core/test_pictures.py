"""What is taken for an image, without a model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images import ImageDecodeError, ImageSpec
from clipship.core.pictures import bytes_or_image, image_from_array, pixels_from_any

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
