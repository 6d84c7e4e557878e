"""Which names are images', and the walk over folders; tests/serving/jobs/test_inputs.py has more of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import FORMATS, decode_image
from clipship.core.images.files import IMAGE_SUFFIXES, Found, files_in, is_image_name, some_image_files


def test_the_suffixes_are_those_of_the_formats_that_are_decoded() -> None:
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".webp", ".jp2", ".dib", ".pnm"} <= IMAGE_SUFFIXES
    assert not {".eps", ".pdf", ".svg", ".txt", ".ico"} & IMAGE_SUFFIXES
    assert {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES} <= set(FORMATS)
    assert [is_image_name(name) for name in ("a/b.JPG", "a.avif", "jpg", ".jpg", "a.jpg.txt")] == [
        True,
        "AVIF" in Image.OPEN,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".pfm"}))
def test_what_pillow_writes_under_a_suffix_is_decoded(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (8, 8)).save(path)
    assert decode_image(path.read_bytes()).size == (8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a/2.png", "a/1.png", "a.txt", "c/d/.e.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c" / "gone.jpg").symlink_to("nowhere")
    return tmp_path


def test_files_are_found_in_the_order_of_their_parts(folder: Path) -> None:
    found = [os.path.relpath(each.path, folder) for each in files_in(str(folder))]
    assert found == ["a/1.png", "a/2.png", "b.jpg", "c/d/.e.gif", "c/gone.jpg"]
    texts = files_in(str(folder), wanted=lambda path: path.endswith(".txt"), entered=lambda path: False)
    assert list(texts) == [Found(f"{folder}/a.txt")]
    assert list(files_in(f"{folder}/none")) == [
        Found(f"{folder}/none", error="cannot be searched: No such file or directory")
    ]


def test_some_files_are_spread_evenly(folder: Path, tmp_path: Path) -> None:
    everything = [folder / name for name in ("a/1.png", "a/2.png", "b.jpg", "c/d/.e.gif")]
    assert some_image_files(folder, 9) == everything
    assert some_image_files(folder, 2) == everything[::2]
    with pytest.raises(DataError, match=r"no such folder: give --images"):
        some_image_files(folder / "none", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in it \(looked for \.apng, "):
        some_image_files(tmp_path / "empty", 1)
