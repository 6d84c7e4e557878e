"""``clipship pack`` and ``clipship verify`` from the command line: results, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from clipship.core.bundle import read_bundle
from clipship.core.cli.main import main
from clipship.core.precisions import Tolerance
from clipship.core.tolerances import TOLERANCES
from clipship.export.reference import Picture
from clipship.training.model.clip import Clip
from tests.export.conftest import method_of, write_checkpoint
from tests.strangers import own, run_as_stranger


@pytest.fixture(scope="module")
def checkpoint(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "coop", method_of(clip, "coop"))


@pytest.fixture(scope="module")
def images(pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for picture in pictures:
        (folder / picture.name).write_bytes(picture.data)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "coop"
    (out.parent / "names.txt").write_text("a fresh name\nanother\n")
    names = str(out.parent / "names.txt")
    assert main(["pack", str(checkpoint), "--vocabulary", names, "--images", str(images), "--out", str(out)]) == 0
    return out


def test_pack_takes_the_given_vocabulary(bundle: Path) -> None:
    opened = read_bundle(bundle)
    assert opened.vocabulary.names == ("a fresh name", "another")
    assert opened.vocabulary_features().features.shape == (2, 32)
    assert opened.manifest.provenance["config"]["recipe"] == "coop"


def test_verify_with_the_checkpoint(
    bundle: Path, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--checkpoint", str(checkpoint), "--images", str(images), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] is True
    assert max(one["count"] for one in content["comparisons"]) == 104


def test_verify_says_no_with_exit_code_1(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(max_abs=-1.0, top1_agreement=1.0))
    assert main(["verify", str(bundle)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"(4 of 5|8 of 9) comparisons are out of tolerance", error), "9 where OpenVINO is installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{absent}", "--out", "{out}"], "no checkpoint there"),
        (["pack", "{checkpoint}", "--images", "{absent}", "--out", "{out}"], "no such folder"),
        (["pack", "{checkpoint}", "--images", "{empty}", "--out", "{out}"], "no images in it"),
        (["pack", "{checkpoint}", "--vocabulary", "{absent}", "--out", "{out}"], "no such file"),
        (["pack", "{checkpoint}", "--out", "{images}"], "exists and is no bundle"),
        (["verify", "{absent}"], "no bundle there"),
        (["verify", "{bundle}", "--checkpoint", "{empty}"], "no checkpoint there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    bundle: Path,
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"absent": tmp_path / "absent", "empty": tmp_path / "empty", "out": tmp_path / "out"}
    places |= {"checkpoint": checkpoint, "images": images, "bundle": bundle}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("clipship: ")
    assert not (tmp_path / "out").exists()


def test_a_bundle_with_one_byte_changed(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / "image_encoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "image_encoder.onnx").write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    assert "image_encoder.onnx has changed since it was packed" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "0.png").write_bytes(b"")
    assert main(["pack", str(checkpoint), "--images", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "0.png: empty file (0 bytes): verify with images that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pack_and_verify_without_a_home(checkpoint: Path, images: Path, stranger_folder: Path) -> None:
    """OpenVINO asks for a home when it is imported, ONNX Runtime for a cache: neither is missed, nor spoken of."""
    for name, folder in (("run", checkpoint), ("images", images)):
        shutil.copytree(folder, stranger_folder / name)
    (stranger_folder / "tmp").mkdir()
    own(stranger_folder)
    pack = ["pack", "run", "--images", "images", "--out", "bundle"]
    for verb in (pack, ["verify", "bundle"]):
        command = [sys.executable, "-m", "clipship", *verb]
        done = run_as_stranger(command, cwd=stranger_folder, TMPDIR=str(stranger_folder / "tmp"), HOME="/")
        assert done.returncode == 0, done.stderr
        assert done.stderr in ("", "verifying with 104 images of images\n")
    assert {variant.runtime for variant in read_bundle(stranger_folder / "bundle").image_encoders} >= {"onnx"}
