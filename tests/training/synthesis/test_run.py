"""A set from the first image to the manifest: what it holds, and that no kill, full disk or small card changes it."""

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipship.core.errors import DataError, RecipeError, UsageError
from clipship.core.files import locked_folder
from clipship.training.synthesis import run as run_module
from clipship.training.synthesis.candidates import Candidate, candidates_of
from clipship.training.synthesis.class_prompts import ClassPrompts, with_images
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.image_generator import FLAGGED, ImageGenerator
from clipship.training.synthesis.run import synthesize
from clipship.training.synthetic_set import SyntheticSet

from .conftest import pixels

Variant = Callable[..., SynthesisConfig]
LIVES = Path(__file__).with_name("crash_scenarios.py")


def make(config: SynthesisConfig, class_prompts: ClassPrompts, out: Path) -> SyntheticSet:
    made = synthesize(config, class_prompts, out=out, device="cpu")
    assert made is not None
    return made


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond the limit: the kernel's refusal is what a full disk gives, EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_set_holds_what_was_asked_for(config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path) -> None:
    made = make(replace(config, negative_prompt="blue"), class_prompts, tmp_path / "set")
    assert made.class_names == ("red", "green", "blue sky")
    assert [image.seed for image in made.images] == [one.seed for one in candidates_of(config, class_prompts)]
    for name in made.class_names:
        scores = [image.score for image in made.images if image.class_name == name]
        kept = made.kept(name)
        assert [image.score for image in kept] == sorted((score for score in scores if score), reverse=True)[:2]
    image = made.images[5]
    assert (image.prompt, image.negative_prompt, image.pipeline) == ("a photo of a green.", "blue", config.pipeline)
    assert (image.scheduler, image.steps, image.guidance, image.batch) == ("DDIMScheduler", 2, 7.5, 4)
    assert image.revision == made.generator["settings"]["pipeline_revision"]
    expected = {f"images/{name}/{one.seed}.webp" for one in made.images for name in [one.path.parent.name]}
    expected |= {f"sheets/{name}.jpg" for name in ("red", "green", "blue_sky")}
    assert set(files_in(made.folder)) == expected | {"images.parquet", "manifest.json"}
    with Image.open(image.path) as opened:
        assert (opened.format, opened.size) == ("WEBP", (32, 32))


def test_a_whole_set_is_left_alone_and_others_are_refused(
    config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(replace(config, image_format="jpeg", candidates=2), class_prompts, tmp_path)
    assert {image.path.suffix for image in made.images} == {".jpg"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "unfinished.json").write_text("left by a kill behind the manifest")
    monkeypatch.setattr(run_module, "ImageGenerator", None)  # nothing is loaded
    again = replace(config, image_format="jpeg", candidates=2, batch_size=1)
    assert make(again, class_prompts, tmp_path).images == made.images
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == {
        path: time for path, time in before.items() if path != tmp_path
    }
    with pytest.raises(DataError, match=r"\(steps 2 -> 4; guidance 7.5 -> 2.0\): give the same ones, or another --out"):
        make(replace(again, steps=4, guidance=2.0), class_prompts, tmp_path)
    fewer = replace(class_prompts, class_names=("red", "green"))
    with pytest.raises(DataError, match=r"\(class_names - 'blue sky'\)"):
        make(again, fewer, tmp_path)


def test_progress_counts_images_and_says_the_rate(
    config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        assert (title, total) == ("synthesizing", 15)
        yield lambda done, note="": seen.append((done, note))

    monkeypatch.setattr(run_module, "progress", progress)
    make(config, class_prompts, tmp_path)
    assert [done for done, _ in seen] == [0, 4, 8, 12, 15]
    assert all(note.endswith(" images/s") and float(note.split()[0]) > 0 for _, note in seen[1:])


def test_flagged_images_are_recorded_and_made_with_the_next_seed(
    strict_pipeline: Path, smaller: Variant, class_prompts: ClassPrompts, tmp_path: Path
) -> None:
    config = smaller(pipeline=str(strict_pipeline), tries=2, keep=5)
    made = make(config, class_prompts, tmp_path)
    flagged = [image for image in made.images if image.reason == FLAGGED]
    assert 3 <= len(flagged) <= 25
    assert not any(image.kept or image.path.exists() or image.score is not None for image in flagged)
    first = {one.seed for one in candidates_of(config, class_prompts)}
    second = {image.seed for image in made.images} - first
    assert second == {image.seed + 1 for image in flagged if image.seed in first}
    kept = {name: len(made.kept(name)) for name in made.class_names}
    assert sum(kept.values()) == len(made.images) - len(flagged)
    assert min(kept.values()) < 5, "a class with fewer images than asked for is fine"


def test_a_set_without_one_usable_image_is_no_set(
    config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ImageGenerator.make
    monkeypatch.setattr(
        ImageGenerator,
        "make",
        lambda self, batch: [replace(one, image=None, reason=FLAGGED) for one in plain(self, batch)],
    )
    with pytest.raises(DataError, match="none of 30 images can be used, the first is flagged"):
        make(replace(config, tries=2), class_prompts, tmp_path)


def test_kills_and_further_processes_change_nothing(
    strict_pipeline: Path, smaller: Variant, classes: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = smaller(pipeline=str(strict_pipeline))
    settings = {"config": config.to_json(), "classes": str(classes), "lasts": [1, 9, 26, 44, 31, 57], "port": port}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run = subprocess.run([sys.executable, LIVES, "sets", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["lives"] >= 4, "it was killed in the midst of it"
    assert result["ranks"] == [True, True]
    whole = files_in(tmp_path / "whole")
    assert len(whole) > 15
    assert files_in(tmp_path / "killed") == whole
    assert files_in(tmp_path / "shared") == whole


def test_a_full_disk_keeps_what_is_done(config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path) -> None:
    config = replace(config, image_format="jpeg", quality=100)
    expected = files_in(make(config, class_prompts, tmp_path / "expected").folder)
    sizes = [len(expected[one.file_path(config)]) for one in candidates_of(config, class_prompts)]
    largest_done = max(sizes[:4])
    assert max(sizes) > largest_done > 1500, "the record of a batch fits, an image of a later one does not"
    out = tmp_path / "full"
    with file_size_limit(largest_done), pytest.raises(OSError, match="File too large"):
        make(config, class_prompts, out)
    done = {name: content for name, content in files_in(out).items() if name.startswith("images/")}
    assert 4 <= len(done) < 15
    assert done.items() <= expected.items(), "nothing half-written has a final name"
    with pytest.raises(DataError, match="is not finished"):
        SyntheticSet.load(out)
    make(config, class_prompts, out)
    assert files_in(out) == expected


def test_a_small_card_gets_smaller_batches(
    config: SynthesisConfig,
    class_prompts: ClassPrompts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = make(config, class_prompts, tmp_path / "large")
    plain, most = ImageGenerator.make, 1

    def cramped(self: ImageGenerator, batch: Sequence[Candidate]) -> Any:
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch)

    monkeypatch.setattr(ImageGenerator, "make", cramped)
    found = make(config, class_prompts, tmp_path / "small")
    assert "4 images are too many for cpu: batches of half the size" in capsys.readouterr().err
    assert [image.batch for image in found.images] == list(range(15))
    for one, other in zip(found.images, expected.images, strict=True):
        assert np.abs(pixels(Image.open(one.path)) - pixels(Image.open(other.path))).max() <= 8  # WebP of +-1
    most = 0
    with pytest.raises(RecipeError, match="one image of 32 px is too much for cpu: give a smaller --size"):
        make(replace(config, seed=2), class_prompts, tmp_path / "none")


def test_near_duplicates_are_dropped(config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path) -> None:
    made = make(replace(config, duplicates=0.5), class_prompts, tmp_path)  # images of random weights are much alike
    assert {len(made.kept(name)) for name in made.class_names} == {1}
    best = made.kept("red")[0]
    others = [image.reason or "" for image in made.images if image.class_name == "red" and image != best]
    assert all(reason.startswith(f"near-duplicate of {best.seed} (cosine 0.") for reason in others)


def test_real_images_are_noted_and_other_classes_come_from_text(
    smaller: Variant, data_folder: Path, class_prompts: ClassPrompts, tmp_path: Path
) -> None:
    config = smaller(strength=0.5, shots=2, filter="none")
    given = with_images(replace(class_prompts, class_names=("red", "green")), data_folder, config)
    given = replace(given, sources={"red": given.sources["red"]})
    made = make(config, given, tmp_path)
    sources = {name: {one.source for one in made.images if one.class_name == name} for name in made.class_names}
    assert sources == {"red": {str(path) for path in given.sources["red"]}, "green": {None}}
    assert all(image.score is None for image in made.images)
    assert [len(made.kept(name)) for name in made.class_names] == [2, 2]


def test_strength_and_real_images_need_each_other(
    smaller: Variant, data_folder: Path, class_prompts: ClassPrompts, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="needs real images: give --images DIR"):
        make(smaller(strength=0.5), class_prompts, tmp_path / "a")
    with pytest.raises(RecipeError, match="real images need a strength"):
        make(smaller(), replace(class_prompts, sources={"red": (tmp_path / "a.png",)}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bad_names_and_other_runs_are_told_before_anything_is_made(
    config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path
) -> None:
    (tmp_path / "busy").mkdir()
    with (
        locked_folder(tmp_path / "busy", "held"),
        pytest.raises(UsageError, match="another clipship synthesize works there"),
    ):
        make(config, class_prompts, tmp_path / "busy")
    long = replace(class_prompts, prompts={**class_prompts.prompts, "red": ("x" * 50,)})
    with pytest.raises(DataError, match=r"class 'red': .* takes 40"):
        make(config, long, tmp_path / "long")
    assert not list((tmp_path / "long").iterdir())


def test_the_table_is_what_the_format_says(
    config: SynthesisConfig, class_prompts: ClassPrompts, tmp_path: Path
) -> None:
    make(replace(config, filter="none", candidates=2, keep=1), class_prompts, tmp_path)
    table = pq.read_table(tmp_path / "images.parquet")
    assert table.column("negative_prompt").null_count == 6
    assert table.column("reason").to_pylist() == [None, "not among the first 1"] * 3
