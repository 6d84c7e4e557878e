import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.training.synthetic_set import SyntheticSet, folder_of, write_synthetic_set
from clipship.world.rendered_synthetic_set import draw_candidate, request_from, write_world_synthetic_set

CLASSES = ("red star", "three blue fish")


def write_small(out: Path) -> SyntheticSet:
    return write_world_synthetic_set(
        out, CLASSES, template="a photo of a {}.", candidates_per_class=5, keep_per_class=2, scorer=brightness
    )


def brightness(images: Sequence[Image.Image], prompt: str) -> NDArray[np.float32]:
    return np.asarray([np.asarray(image, np.float32).mean() / 255 for image in images], np.float32)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "set").folder


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_format(small: Path) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["format"] == "clipship-synthetic-set"
    assert manifest["format_version"] == 2
    assert manifest["class_names"] == list(CLASSES)
    assert manifest["images_per_class"] == 2
    table = pq.read_table(small / "images.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "path": "string",
        "class_name": "string",
        "prompt": "string",
        "seed": "int64",
        "score": "float",
        "kept": "bool",
        "reason": "string",
        "negative_prompt": "string",
        "pipeline": "string",
        "revision": "string",
        "scheduler": "string",
        "steps": "int32",
        "guidance": "double",
        "source": "string",
        "batch": "int64",
    }
    assert table.column("pipeline").null_count == table.num_rows, "the renderer is no pipeline"
    assert table.column("path")[0].as_py() == "images/red_star/1000000.jpg"
    assert table.column("prompt")[0].as_py() == "a photo of a red star."
    assert not list(small.parent.glob(".*")), "a temporary folder was left behind"


def test_best_scores_are_kept_and_the_rest_says_why(small: Path) -> None:
    loaded = SyntheticSet.load(small)
    for name in CLASSES:
        candidates = [image for image in loaded.images if image.class_name == name]
        kept = loaded.kept(name)
        assert len(candidates) == 5
        assert [image.score for image in kept] == sorted((c.score or 0 for c in candidates), reverse=True)[:2]
        assert all((image.reason is None) == image.kept for image in candidates)
        assert {image.reason for image in candidates if not image.kept} == {"not among the 2 best scores"}


def test_kept_files_are_what_was_scored(small: Path) -> None:
    for image in SyntheticSet.load(small).kept("red star"):
        with Image.open(image.path) as opened:
            assert opened.size == (64, 64)
            score = float(brightness([opened.convert("RGB")], "")[0])
        assert image.score == pytest.approx(score, abs=0.02)  # JPEG


def test_same_seed_same_images_other_seed_other_images(tmp_path: Path) -> None:
    def table_and_pixels(name: str, seed: int) -> tuple[list[str], bytes]:
        made = write_world_synthetic_set(
            tmp_path / name, CLASSES[:1], template="{}", candidates_per_class=2, keep_per_class=1, seed=seed
        )
        return [str(i.path.name) for i in made.images], made.images[0].path.read_bytes()

    assert table_and_pixels("a", 3) == table_and_pixels("b", 3)
    assert table_and_pixels("c", 4)[1] != table_and_pixels("a2", 3)[1]


def test_without_scorer_the_first_are_kept_unscored(tmp_path: Path) -> None:
    made = write_world_synthetic_set(
        tmp_path / "s", CLASSES[:1], template="{}", candidates_per_class=3, keep_per_class=2
    )
    assert [(image.score, image.kept, image.reason) for image in made.images] == [
        (None, True, None),
        (None, True, None),
        (None, False, "not among the first 2"),
    ]


def write_images(out: Path, class_names: list[str], written: list[tuple[str, int]], stop: bool = False) -> None:
    with write_synthetic_set(out, generator={}, template="{}", class_names=class_names, images_per_class=1) as writer:
        for class_name, seed in written:
            writer.add(Image.new("RGB", (8, 8)), class_name=class_name, prompt="", seed=seed)
        if stop:
            raise KeyboardInterrupt


def test_interrupted_write_leaves_nothing_and_keeps_the_older_set(small: Path) -> None:
    before = (small / "images.parquet").read_bytes()
    for target in (small, small.parent / "fresh"):
        with pytest.raises(KeyboardInterrupt):
            write_images(target, ["a"], [("a", 1)], stop=True)
    assert sorted(path.name for path in small.parent.iterdir()) == ["set"]
    assert (small / "images.parquet").read_bytes() == before


def test_a_deleted_candidate_is_fine_unless_it_was_kept(small: Path) -> None:
    loaded = SyntheticSet.load(small)
    next(image for image in loaded.images if not image.kept).path.unlink()
    SyntheticSet.load(small)
    loaded.kept("red star")[0].path.unlink()
    with pytest.raises(DataError, match=r"lacks images that it keeps: images/red_star/\d+\.jpg"):
        SyntheticSet.load(small)


def test_folders_that_are_no_set_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        SyntheticSet.load(tmp_path / "nothing")
    edit_manifest(small, format_version=3)
    with pytest.raises(DataError, match="version 3 is not 'clipship-synthetic-set' version 1 or 2"):
        SyntheticSet.load(small)
    edit_manifest(small, format_version=2, format="other")
    with pytest.raises(DataError, match="clipship-synthetic-set"):
        SyntheticSet.load(small)
    with pytest.raises(DataError, match="is not a synthetic set"):
        write_small(small)
    (small / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        SyntheticSet.load(small)


def test_sets_of_version_1_are_read(small: Path) -> None:
    loaded = SyntheticSet.load(small)
    path = small / "images.parquet"
    pq.write_table(pq.read_table(path).select(list(range(7))), path)
    with pytest.raises(DataError, match="lacks the columns batch, guidance, negative_prompt"):
        SyntheticSet.load(small)
    edit_manifest(small, format_version=1)
    assert SyntheticSet.load(small) == loaded


def test_a_class_may_have_no_image(tmp_path: Path) -> None:
    write_images(tmp_path / "set", ["dog", "cat"], [("dog", 1)])
    loaded = SyntheticSet.load(tmp_path / "set")
    assert len(loaded.kept("dog")) == 1
    assert loaded.kept("cat") == []


def test_an_unfinished_set_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(DataError, match="is not finished; run the same clipship synthesize again to continue"):
        SyntheticSet.load(tmp_path)


def test_damaged_tables_are_refused(small: Path) -> None:
    path = small / "images.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["kept"]), path)
    with pytest.raises(DataError, match="lacks the columns kept"):
        SyntheticSet.load(small)
    outside = pa.array(["../secret.jpg"] * table.num_rows)
    pq.write_table(table.set_column(0, "path", outside), path)
    with pytest.raises(DataError, match="outside the set"):
        SyntheticSet.load(small)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a Parquet file"):
        SyntheticSet.load(small)


def test_writer_refuses_unknown_classes_repeated_seeds_and_shared_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean dog"):
        write_images(tmp_path / "a", ["dog"], [("dogs", 1)])
    with pytest.raises(DataError, match="two images of seed 1"):
        write_images(tmp_path / "a", ["dog"], [("dog", 1), ("dog", 1)])
    with pytest.raises(DataError, match="would share"):
        write_images(tmp_path / "a", ["a b", "a/b"], [])
    assert not list(tmp_path.iterdir())


def test_unknown_class_is_refused_with_near_names(small: Path) -> None:
    with pytest.raises(DataError, match="did you mean red star"):
        SyntheticSet.load(small).kept("red stars")


def test_folder_names_are_safe() -> None:
    assert folder_of("fish on snow") == "fish_on_snow"
    assert folder_of("../up") == "_up"
    assert folder_of("AC/DC: 50%") == "AC_DC__50_"
    assert folder_of("..") == "_"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("striped star", {"texture": "striped", "shape": "star"}),
        ("star_in_the_night_sky", {"shape": "star", "background": "night"}),
        ("a large red fish on snow", {"size": "large", "colour": "red", "shape": "fish", "background": "snow"}),
        ("four crosses", {"count": 4, "shape": "cross"}),
        ("red wavy fabric", {"colour": "red", "texture": "wavy", "swatch": True}),
        ("dotted", {"texture": "dotted", "swatch": True}),
    ],
)
def test_class_names_are_understood(name: str, expected: dict[str, object]) -> None:
    request = request_from(name)
    assert {key: value for key, value in vars(request).items() if value not in (None, False, 1)} | {
        key: value for key, value in vars(request).items() if value is True
    } == expected


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("golden retriever", "cannot draw 'golden'"),
        ("red blue star", "two values for colour"),
        ("star on the moon", "cannot draw 'on'"),
        ("red star fabric", "a pattern and for a thing"),
        ("the", "nothing to draw"),
    ],
)
def test_class_names_that_cannot_be_drawn_are_refused_before_anything_is_written(
    name: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=complaint):
        write_world_synthetic_set(tmp_path / "out", ["red star", name], template="{}")
    assert not (tmp_path / "out").exists()


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep_per_class is 5"):
        write_world_synthetic_set(tmp_path / "o", ["red star"], template="{}", keep_per_class=5, candidates_per_class=4)


def test_candidates_show_the_class() -> None:
    pictures = [np.asarray(draw_candidate("red fabric", seed), np.float32).mean((0, 1)) for seed in range(4)]
    assert all(red > 1.3 * max(green, blue) for red, green, blue in pictures)
