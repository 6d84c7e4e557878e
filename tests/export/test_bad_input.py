"""What must not end in a bundle: random weights by accident, a full disk, a pack that is killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipship.core.bundle import read_bundle
from clipship.core.cli.main import main
from clipship.export.reference import Picture
from clipship.training.model.clip import Clip, has_random_weights
from tests.export.conftest import method_of, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "coop", method_of(clip, "coop"))


@pytest.fixture(scope="module")
def images(pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for picture in pictures[:8]:
        (folder / picture.name).write_bytes(picture.data)
    return folder


def arguments(checkpoint: Path, images: Path, out: Path) -> list[str]:
    return ["pack", str(checkpoint), "--images", str(images), "--out", str(out)]


def test_random_weights_are_refused_unless_asked_for(
    clip: Clip, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for, the next refusal is met: the checkpoint was not trained on that model."""
    random = write_checkpoint(tmp_path / "run", method_of(clip, "coop"), "ViT-B-32/random")
    given = arguments(random, images, tmp_path / "bundle")
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clipship: base model ViT-B-32/random: its weights are random")
    assert "--allow-random-weights" in line
    assert main([*given, "--allow-random-weights"]) == 2
    assert "the checkpoint was trained on ViT-B-32/random with digest" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_folder_called_random_has_weights_of_its_own(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "random").symlink_to(clip_folder)
    assert not has_random_weights(str(tmp_path / "random"))
    assert has_random_weights("ViT-B-32/random")
    assert not has_random_weights("ViT-B-32/openai")
    assert not has_random_weights("clipship-tiny")


def run_pack(given: list[str], prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipship", *given]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)


def old_bundle(out: Path) -> None:
    """A bundle's manifest and a file: enough to be replaced, and to be seen when it is damaged."""
    out.mkdir()
    (out / "manifest.json").write_text('{"format": "clipship-bundle"}')
    (out / "precious").write_text("as it was")


@pytest.mark.parametrize("limit_bytes", [30_000, 400_000], ids=["at the first file", "in the middle"])
def test_a_disk_that_fills_up_leaves_the_old_bundle(
    limit_bytes: int, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    """A limit on the size of files makes real writes fail, wherever they are made."""
    out = tmp_path / "bundle"
    old_bundle(out)
    limits = (limit_bytes, limit_bytes)
    process = run_pack(arguments(checkpoint, images, out), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    last = error.splitlines()[-1]
    assert last.startswith("clipship: ")
    assert "no space left; nothing half-written was kept: free some space" in last
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "precious").read_text() == "as it was"


def test_a_small_disk(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """A real file system of 300 kB, where it can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        process = run_pack(arguments(checkpoint, images, disk / "bundle"))
        _, error = process.communicate(timeout=300)
        assert (process.returncode, list(disk.iterdir())) == (1, [])
        assert "no space left" in error.splitlines()[-1]
    finally:
        subprocess.run(["umount", disk], check=True)


MOMENTS = ("image_encoder.onnx", "vocabulary.safetensors", "golden/golden.safetensors")
"""Files whose appearance says how far a pack has come."""


@pytest.mark.slow
def test_a_killed_pack_leaves_no_bundle_and_the_next_one_cleans_up(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    given = arguments(checkpoint, images, out)
    for moment in MOMENTS:
        process = run_pack(given)
        while not list(tmp_path.glob(f".bundle.{process.pid}-*.part/{moment}")):
            assert process.poll() is None, f"it ended before {moment} was there"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists(), moment
        assert len(list(tmp_path.glob(".bundle.*.part"))) == 1, "left-overs of the one before were not removed"
    process = run_pack(given)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert read_bundle(out).verification()["passed"] is True
