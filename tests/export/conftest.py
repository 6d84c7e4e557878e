"""A small CLIP with random weights in open_clip's own folder format, and methods with prompts that matter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from clipship.core.bundle import Bundle
from clipship.core.comparison import Verification, golden_samples
from clipship.export import pack
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.reference import Picture, samples_from_pictures, validate_base_model, verify_text
from clipship.export.verification.verify import verify_bundle
from clipship.training.checkpoint import Checkpoint, save_checkpoint
from clipship.training.methods import Method, Task, build_method
from clipship.training.model.clip import Clip, digest_of_tensors, load_clip
from clipship.training.recipes import config_from_recipe

NAMES = ("red star", "blue_ring", "green fish", "Straße", "tree")


RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
"""The installed ONNX Runtime's version."""
OPSETS = (18, 20, 23) if RUNTIME >= (1, 23) else (18, 20)
"""The opsets that it reads."""


@pytest.fixture(scope="session", autouse=True)
def equal_exports_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A graph that was exported before is copied: PyTorch's exporter takes seconds, and many tests pack alike.

    Equal are exports of one class with one structure, one set of tensors and one set of arguments.
    """
    folder = tmp_path_factory.mktemp("exports")
    export = onnx_from_module

    def exported_once(module: nn.Module, sample: torch.Tensor, path: Path, **arguments: Any) -> None:
        method = cast(Method, module.method)
        towers = (method.clip.visual, method.clip.text)
        settings = [
            [f"{name}={value}" for name, value in sorted(vars(tower).items()) if isinstance(value, str | int | float)]
            for tower in towers
        ]
        tensors = digest_of_tensors({**module.state_dict(), **method.state_dict(), "sample": sample})
        what = (type(module), repr(module), settings, method.name, method.config, tensors, sorted(arguments.items()))
        kept = folder / hashlib.sha256(repr(what).encode()).hexdigest()
        if not kept.is_dir():
            kept.mkdir()
            try:
                export(module, sample, kept / path.name, **arguments)
            except BaseException:
                shutil.rmtree(kept)
                raise
        for file in kept.iterdir():
            shutil.copyfile(file, path.with_name(file.name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "onnx_from_module", exported_once)
        yield


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from open_clip import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("small-clip")
    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
    }
    preprocessing = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocessing}))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Clip:
    return load_clip(str(clip_folder))


def method_of(clip: Clip, recipe: str) -> Method:
    """A method whose learned tensors are large enough that leaving them out of an export would be seen."""
    config = replace(config_from_recipe(recipe), base_model=clip.name)
    if recipe == "sync-clip":
        config = config.with_settings(text_depth=2, image_depth=3)
    task = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.", "a drawing of {}."))
    method = build_method(clip, config, task).eval()
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)), alpha=0.3)
    return method


def verify_against_method(bundle: Bundle, method: Method, pictures: list[Picture]) -> Verification:
    """All that the bundle offers against PyTorch running ``method``, as ``verify --checkpoint`` compares it."""
    validate_base_model(bundle, method)
    samples = [golden_samples(bundle), samples_from_pictures(bundle, pictures, method)]
    return verify_bundle(bundle, samples) + verify_text(bundle, method)


def write_checkpoint(folder: Path, method: Method, base_model: str | None = None) -> Path:
    """``method`` as ``clipship train`` leaves it, or as if it had learned on ``base_model``."""
    saved = Checkpoint(
        config=replace(method.config, base_model=base_model or method.clip.name),
        task=method.task,
        dataset="random",
        data_digest="0" * 64,
        base_model_digest=method.clip.digest,
        learned=method.learned(),
    )
    save_checkpoint(folder, saved)
    return folder


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    import io

    rng = np.random.default_rng(11)
    made = []
    for position in range(104):
        height, width = rng.integers(20, 90, 2)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((int(width), int(height))).save(buffer, "JPEG" if position % 2 else "PNG")
        made.append(Picture(name=f"{position}.{'jpg' if position % 2 else 'png'}", data=buffer.getvalue()))
    return made
