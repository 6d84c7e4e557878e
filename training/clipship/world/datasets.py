"""The downstream data sets of the built-in world, written in the CoOp layout as real JPEG files.

Nine data sets of 24 classes. A class composes two attributes ("striped star", "fish on snow", "three rings"). Its
pictures have a style that pre-training never shows (`styles`), and pre-training holds some of the compositions out. The
first half of the labels are the base classes, the rest the new ones. In six data sets every word of a new class also
occurs in a base class; in the other three none does, which is closer to data sets of photographs.

Variants for domain generalisation have test pictures of the classes of a data set in another look.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from clipship.core.errors import DataError, near
from clipship.core.files import replace_folder, write_json_atomic
from clipship.core.progress import progress
from clipship.training.datasets.load import WORLD_FILE
from clipship.training.worker_pool import worker_pool
from clipship.world.drawing.attributes import (
    AXES,
    BACKGROUNDS,
    COUNT_WORDS,
    PLURALS,
    SHAPES,
    WORLD_VERSION,
    held_out_pairs,
)
from clipship.world.drawing.scenes import Scene, SceneRequest, scene_from
from clipship.world.drawing.stencils import Bytes
from clipship.world.drawing.styles import STYLES, Frame

WORLD_FORMAT = "clipship-world"
SPLITS: tuple[str, ...] = ("train", "val", "test")
JPEG_QUALITY = 92
_SIDE_RANGE_PX = (72, 128)
_PROCESSES = 2  # that draw

_LATER_FIELDS = {"halves": "shared", "class_seed": None}
"""Fields added later; the default is not recorded, so that data sets of earlier releases stay valid."""

Halves = Literal["shared", "apart"]
Composition = tuple[str, str]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class WorldDataset:
    """One downstream data set."""

    name: str
    """Of the folder, and of the style in `styles.STYLES`."""
    image_dir: str = "images"
    """The folder that paths in the split file are relative to."""
    template: str = "a photo of a {}."
    axes: tuple[str, str]
    """The two attributes that a class composes."""
    values: tuple[tuple[str, ...], tuple[str, ...]]
    """Which words of either axis are used."""
    seed: int
    """Decides every picture and, without a `class_seed`, the classes and their order."""
    shift: float
    """How far the style is from pre-training, 0 to 1."""
    classes: int = 24
    train_per_class: int = 32
    val_per_class: int = 8
    test_per_class: int = 40
    halves: Halves = "shared"
    """Whether base classes have every word of the new ones, or none of them."""
    class_seed: int | None = None
    """Decides the classes of a variant, whose pictures have another seed."""

    def __post_init__(self) -> None:
        for axis, words in zip(self.axes, self.values, strict=True):
            if not set(words) <= set(AXES[axis]):
                raise ValueError(f"{self.name}: {sorted(set(words) - set(AXES[axis]))} are not among {AXES[axis]}")
        if not 0 <= self.shift <= 1:
            raise ValueError(f"{self.name}: shift is {self.shift}; it must be between 0 and 1")
        if self.halves not in get_args(Halves):
            raise ValueError(f"{self.name}: halves is {self.halves!r}; it must be one of {get_args(Halves)}")
        room = len(self.values[0]) // 2 * (len(self.values[1]) // 2)
        if self.halves == "apart" and room < self.num_base:
            raise ValueError(f"{self.name}: {room} compositions in the smaller half, {self.num_base} are needed")

    @property
    def split_file(self) -> str:
        """Return the name of the CoOp split file inside the folder."""
        return f"split_zhou_{self.name.title().replace('_', '')}.json"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in label order."""
        return tuple(class_name_of(self.axes, composition) for composition in compositions_of(self))

    @property
    def num_base(self) -> int:
        """Return how many classes, from the first, are base classes."""
        return -(-self.classes // 2)

    def per_class(self, split: str) -> int:
        """Return the number of pictures of a class in `train`, `val` or `test`."""
        return {"train": self.train_per_class, "val": self.val_per_class, "test": self.test_per_class}[split]


_SHAPES_A = ("circle", "square", "star", "heart", "cross", "ring", "arrow", "house")
_SHAPES_B = ("triangle", "star", "heart", "crescent", "arrow", "diamond", "fish", "flower")
_SHAPES_D = ("circle", "triangle", "heart", "cross", "ring", "house", "fish", "diamond", "crescent")
_SHAPES_C = ("circle", "triangle", "star", "heart", "cross", "crescent", "drop", "mushroom")
_HUES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")

WORLD_DATASETS: tuple[WorldDataset, ...] = (
    WorldDataset(
        name="sketches", template="a sketch of a {}.",
        axes=("colour", "shape"), values=((*_HUES, "brown"), _SHAPES_A), seed=11, shift=0.8,
    ),
    WorldDataset(
        name="prints", template="a print of a {}.",
        axes=("colour", "shape"), values=((*_HUES, "brown", "black"), _SHAPES_B), seed=12, shift=0.45,
    ),
    WorldDataset(
        name="neon", template="a neon sign of a {}.",
        axes=("colour", "shape"), values=((*_HUES, "white"), _SHAPES_C), seed=13, shift=0.4,
    ),
    WorldDataset(
        name="places", template="a painting of a {}.",
        axes=("shape", "background"), values=(_SHAPES_B, AXES["background"]), seed=14, shift=0.35,
    ),
    WorldDataset(
        name="groups", template="a stamp of {}.",
        axes=("count", "shape"), values=(COUNT_WORDS[1:], _SHAPES_D), seed=15, shift=0.3,
    ),
    WorldDataset(
        name="fabrics", template="a photo of {}.",
        axes=("colour", "texture"), values=((*_HUES, "gray"), AXES["texture"]), seed=16, shift=0.15,
    ),
    WorldDataset(
        name="games", template="a {} in a video game.",
        axes=("colour", "shape"), values=(AXES["colour"], SHAPES), halves="apart", seed=17, shift=0.45,
    ),
    WorldDataset(
        name="origami", template="a origami {}.",
        axes=("texture", "shape"), values=(AXES["texture"][:4], SHAPES), halves="apart", seed=18, shift=0.3,
    ),
    WorldDataset(
        name="renders", template="a rendering of a {}.",
        axes=("shape", "background"), values=(SHAPES, AXES["background"]), halves="apart", seed=19, shift=0.8,
    ),
)  # fmt: skip


def _variant(source: str, *, name: str, seed: int, shift: float) -> WorldDataset:
    """Return test pictures of a data set's classes in another look, with the data set's own prompt."""
    (dataset,) = (dataset for dataset in WORLD_DATASETS if dataset.name == source)
    own: dict[str, Any] = {"name": name, "seed": seed, "class_seed": dataset.seed, "shift": shift}
    return replace(dataset, train_per_class=0, val_per_class=0, **own)


WORLD_VARIANTS: tuple[WorldDataset, ...] = (
    _variant("prints", name="prints_night", seed=31, shift=0.3),
    _variant("prints", name="prints_sketched", seed=32, shift=0.8),
)


def class_name_of(axes: tuple[str, str], composition: Composition) -> str:
    """Return what people would call a composition."""
    first, second = composition
    if axes == ("shape", "background"):
        return f"{first} {BACKGROUNDS[second]}"
    if axes == ("count", "shape"):
        return f"{first} {PLURALS[second]}"
    return f"{first} {second} fabric" if axes == ("colour", "texture") else f"{first} {second}"


@cache
def compositions_of(dataset: WorldDataset) -> tuple[Composition, ...]:
    """Return the compositions of a data set in label order.

    The first draw whose halves share their words, or have them apart, as `dataset.halves` says, and both hold
    compositions that pre-training never shows (at least one in six).
    """
    seed = dataset.seed if dataset.class_seed is None else dataset.class_seed
    rng = np.random.Generator(np.random.PCG64([WORLD_VERSION, seed]))
    draw = _draw_apart if dataset.halves == "apart" else _draw_shared
    while True:
        halves = draw(dataset, rng)
        if halves is not None and all(_has_unseen(dataset.axes, half) for half in halves):
            return (*halves[0], *halves[1])


def _draw_shared(dataset: WorldDataset, rng: np.random.Generator) -> tuple[list[Composition], list[Composition]] | None:
    chosen = _some(product(*dataset.values), dataset.classes, rng)
    base, new = chosen[: dataset.num_base], chosen[dataset.num_base :]
    return (base, new) if _shares_words(base, new) else None


def _draw_apart(dataset: WorldDataset, rng: np.random.Generator) -> tuple[list[Composition], list[Composition]]:
    """Deal the words of either axis to the halves, the odd one to the base classes, then compose each half."""
    first, second = (_some(words, len(words), rng) for words in dataset.values)
    of_first, of_second = -(-len(first) // 2), -(-len(second) // 2)
    base = _some(product(first[:of_first], second[:of_second]), dataset.num_base, rng)
    return base, _some(product(first[of_first:], second[of_second:]), dataset.classes - dataset.num_base, rng)


def _some(values: Iterable[_T], count: int, rng: np.random.Generator) -> list[_T]:
    listed = list(values)
    return [listed[int(i)] for i in rng.permutation(len(listed))[:count]]


def _has_unseen(axes: tuple[str, str], half: Sequence[Composition]) -> bool:
    return len(half) <= 6 * sum(is_unseen(axes, pair) for pair in half)


def is_unseen(axes: tuple[str, str], composition: Composition) -> bool:
    """Return whether pre-training holds the composition out."""
    first, second = composition
    if axes == ("shape", "background"):  # held_out_pairs names the background first
        return (second, first) in held_out_pairs("background", "shape")
    return composition in held_out_pairs(*axes)


def _shares_words(base: Iterable[Composition], new: Iterable[Composition]) -> bool:
    base_words, new_words = ([set(words) for words in zip(*half, strict=True)] for half in (base, new))
    return all(new_side <= base_side for base_side, new_side in zip(base_words, new_words, strict=True))


def scene_of(axes: tuple[str, str], composition: Composition, rng: np.random.Generator) -> Scene:
    """Return a scene of a composition; what the class name leaves open is random."""
    words = dict(zip(axes, composition, strict=True))
    request = SceneRequest(
        shape=words.get("shape", "square"),
        colour=words.get("colour"),
        texture=words.get("texture", "plain"),
        background=words.get("background"),
        count=COUNT_WORDS.index(words.get("count", "one")) + 1,
        swatch=axes == ("colour", "texture"),
    )
    return scene_from(request, rng)


def draw_example(dataset: WorldDataset, split: str, label: int, index: int) -> Bytes:
    """Draw one picture of a data set: uint8 [H, W, 3], H and W between 72 and 128 pixels."""
    rng = np.random.Generator(np.random.PCG64([WORLD_VERSION, dataset.seed, SPLITS.index(split), label, index]))
    scene = scene_of(dataset.axes, compositions_of(dataset)[label], rng)
    height, width = (int(side) for side in rng.integers(_SIDE_RANGE_PX[0], _SIDE_RANGE_PX[1] + 1, 2))
    side = max(height, width)
    frame = Frame(side_px=side, inner=min(height, width) / side, shift=dataset.shift)
    picture = STYLES[dataset.name](scene, rng, frame)
    top, left = (side - height) // 2, (side - width) // 2
    return picture[top : top + height, left : left + width]


def picture_of(dataset: WorldDataset, split: str, label: int, index: int) -> Image.Image:
    """Return a picture as its file holds it: drawn, encoded as JPEG, not yet decoded."""
    buffer = io.BytesIO()
    Image.fromarray(draw_example(dataset, split, label, index)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer)


def write_world(out: Path, *, names: Sequence[str] | None = None) -> list[Path]:
    """Write data sets into `out/<name>/`, keep existing ones, and return their folders in the order of `names`.

    Args:
        names: of data sets or variants; None: all of `WORLD_DATASETS`.

    Raises:
        DataError: a name is unknown, or this version of the world did not write the existing folder.
    """
    datasets = list(WORLD_DATASETS) if names is None else [dataset_named(name) for name in dict.fromkeys(names)]
    missing = [dataset for dataset in datasets if not _is_written(out / dataset.name, dataset)]
    if missing:
        _write_datasets(out, missing)
    return [out / dataset.name for dataset in datasets]


def dataset_named(name: str) -> WorldDataset:
    """Return the data set or variant of that name.

    Raises:
        DataError: there is none.
    """
    known = {dataset.name: dataset for dataset in (*WORLD_DATASETS, *WORLD_VARIANTS)}
    if name not in known:
        raise DataError(f"no built-in data set is named {name!r}; {near(name, known)}")
    return known[name]


def _is_written(folder: Path, dataset: WorldDataset) -> bool:
    if not folder.exists():
        return False
    record = folder / WORLD_FILE
    if not record.is_file():
        raise DataError(f"{folder} exists and was not written by the built-in world; choose another place")
    if json.loads(record.read_text(encoding="utf-8")) != _record_of(dataset):
        raise DataError(f"{folder} was written by another version of the built-in world; remove it to write it again")
    return True


def _record_of(dataset: WorldDataset) -> dict[str, Any]:
    fields = asdict(dataset) | {"split_file": dataset.split_file}
    for name, default in _LATER_FIELDS.items():
        if fields[name] == default:
            del fields[name]
    record = {"format": WORLD_FORMAT, "generator_version": WORLD_VERSION, "dataset": fields}
    return dict(json.loads(json.dumps(record)))  # lists for tuples, as in the file


def _write_datasets(out: Path, datasets: Sequence[WorldDataset]) -> None:
    done, total = 0, sum(dataset.classes * dataset.per_class(split) for dataset in datasets for split in SPLITS)
    with progress("drawing", total) as report, worker_pool(_PROCESSES) as pool:
        for dataset in datasets:
            with replace_folder(out / dataset.name) as folder:
                for written in _write_pictures(folder, dataset, pool):
                    done += written
                    report(done, dataset.name)
                write_json_atomic(folder / dataset.split_file, _split_of(dataset))
                write_json_atomic(folder / WORLD_FILE, _record_of(dataset))


def _write_pictures(folder: Path, dataset: WorldDataset, pool: ProcessPoolExecutor) -> Iterator[int]:
    labels = range(dataset.classes)
    jobs = [pool.submit(_write_class, folder, dataset, split, label) for label in labels for split in SPLITS]
    try:
        for job in as_completed(jobs):
            yield job.result()
    finally:
        # After a full disk or Ctrl-C: start nothing more, and wait for what still writes into the folder.
        wait([job for job in jobs if not job.cancel()])


def _write_class(folder: Path, dataset: WorldDataset, split: str, label: int) -> int:
    count = dataset.per_class(split)
    for index in range(count):
        path = folder / dataset.image_dir / picture_path(dataset, split, label, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_example(dataset, split, label, index)).save(path, quality=JPEG_QUALITY)
    return count


def picture_path(dataset: WorldDataset, split: str, label: int, index: int) -> str:
    """Return the path of a picture relative to the image folder."""
    return f"{dataset.class_names[label].replace(' ', '_')}/{split}_{index:03d}.jpg"


def _split_of(dataset: WorldDataset) -> dict[str, list[tuple[str, int, str]]]:
    return {
        split: [
            (picture_path(dataset, split, label, index), label, name)
            for label, name in enumerate(dataset.class_names)
            for index in range(dataset.per_class(split))
        ]
        for split in SPLITS
    }
