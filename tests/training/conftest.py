"""A real open_clip model of a few layers, a data set of a few coloured squares, and a synthetic set of the same."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipship.training.datasets.base import Dataset
from clipship.training.datasets.load import load_dataset
from clipship.training.model.clip import Clip, load_clip
from clipship.training.synthetic_set import SyntheticSet, write_synthetic_set

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue_sky": (40, 60, 220),
    "white": (240, 240, 240),
    "black": (9, 9, 9),
}
SPLITS = {"train": 6, "val": 3, "test": 4}

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


def write_model(folder: Path, model_cfg: dict[str, object] = MODEL, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        custom = "custom_text" in model_cfg
        model = (open_clip.model.CustomTextCLIP if custom else open_clip.CLIP)(
            **{key: value for key, value in model_cfg.items() if key != "custom_text"}
        )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def coloured(colour: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 26, (40, 34, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def write_data(folder: Path) -> Path:
    split: dict[str, list[tuple[str, int, str]]] = {}
    for name, count in SPLITS.items():
        split[name] = [
            (f"{colour}/{name}_{number}.png", label, colour)
            for label, colour in enumerate(COLOURS)
            for number in range(count)
        ]
    seed = 0
    for entries in split.values():
        for relative, _, colour in entries:
            path = folder / "images" / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            coloured(COLOURS[colour], seed := seed + 1).save(path)
    (folder / "split_zhou_Colours.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models of a few thousand weights are slower on several threads, much slower where the cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features are kept between runs; a test's own go with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPSHIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def clip(model_folder: Path) -> Clip:
    return load_clip(str(model_folder))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def dataset(data_folder: Path) -> Dataset:
    return load_dataset(data_folder)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    with write_synthetic_set(
        folder, generator={"kind": "test"}, template="a photo of a {}.", class_names=list(COLOURS), images_per_class=3
    ) as writer:
        for name, colour in COLOURS.items():
            for seed in range(3):
                writer.add(coloured(colour, 1000 + seed), class_name=name, prompt=f"a photo of a {name}.", seed=seed)
    return SyntheticSet.load(folder)


KEPT, LOW, REFUSED = None, "not among the best scores", "not an image of anything"
UNEVEN: dict[str, list[tuple[int, float | None, str | None]]] = {
    "red": [(0, None, REFUSED), (1, 0.1, LOW), (2, 0.7, KEPT), (3, 0.9, KEPT)],
    "green": [(1, 0.6, KEPT)],
    "white": [(0, 0.5, KEPT), (1, 0.1, LOW), (4, 0.6, KEPT), (5, 0.8, KEPT)],
    "black": [(0, None, REFUSED)],
}
"""Seed, score and reason of the synthetic images of a class."""


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    """A set with another number of images for every class, for two of them none."""
    folder = tmp_path_factory.mktemp("synthetic") / "uneven"
    with write_synthetic_set(
        folder, generator={"kind": "test"}, template="a photo of a {}.", class_names=list(COLOURS), images_per_class=3
    ) as writer:
        for name, images in UNEVEN.items():
            for seed, score, reason in images:
                picture = coloured(COLOURS[name], 2000 + seed)
                writer.add(picture, class_name=name, prompt=name, seed=seed, score=score, reason=reason)
    return SyntheticSet.load(folder)


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The published CoOp splits and few-shot lists; tests that need them skip where they are not."""
    root = Path(os.environ.get("CLIPSHIP_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (root / "coop").is_dir():
        pytest.skip("no published splits here: set CLIPSHIP_TEST_DATA")
    return root
