"""The arranged encoder gives the method's own features, for every kind of prompt and every kind of tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.export.encoders import ImageEncoder
from clipship.export.fused_encoder import FusedImageEncoder
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.verification.runners import onnx_session, session_function
from clipship.training.methods import Method, Task, build_method
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe

NAMES = ("star", "ring", "fish")
PROMPTED = ("vpt-shallow", "vpt-deep", "ivlp", "ivlp-synthetic", "maple", "promptsrc", "sync-clip")


def _method(clip: Clip, recipe: str) -> Method:
    """Prompts in as many layers as the recipe may have in a small model, and large enough to be missed."""
    config = replace(config_from_recipe(recipe), base_model=clip.name)
    layers = {"image_depth": 3, "text_depth": 2}.items()
    depth = {name: min(getattr(config.settings, name), most) for name, most in layers if hasattr(config.settings, name)}
    config = config.with_settings(**depth)
    method = build_method(clip, config, Task(class_names=NAMES, num_base=2, templates=("a {}.",))).eval()
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)), alpha=0.3)
    return method


def _pixels(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _assert_equal(method: Method) -> None:
    pixels = _pixels(5, method.clip.image_spec.size_px)
    with torch.no_grad():
        torch.testing.assert_close(
            FusedImageEncoder(method)(pixels), ImageEncoder(method)(pixels), atol=2e-6, rtol=1e-4
        )


@pytest.mark.parametrize("recipe", ["zero-shot", "clip-adapter", *PROMPTED])
def test_every_method(clip: Clip, recipe: str) -> None:
    _assert_equal(_method(clip, recipe))


@pytest.fixture(scope="module")
def towers(clip_folder: Path) -> dict[str, Clip]:
    """The small CLIP with each thing that open_clip's image towers can have."""
    from open_clip.transformer import LayerScale, QuickGELU

    made = {
        name: load_clip(str(clip_folder)) for name in ("average", "average-first-norm", "scales", "quick", "no-norm")
    }
    made["average"].visual.pool_type = "avg"
    made["average"].visual.final_ln_after_pool = True
    made["average-first-norm"].visual.pool_type = "avg"
    for block in made["scales"].visual.transformer.resblocks:
        block.ls_1, block.ls_2 = LayerScale(64, 0.3), LayerScale(64, 0.7)
    for block in made["quick"].visual.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    made["no-norm"].visual.ln_pre = nn.Identity()
    return made


@pytest.mark.parametrize("recipe", ["zero-shot", "sync-clip"])
@pytest.mark.parametrize("tower", ["average", "average-first-norm", "scales", "quick", "no-norm"])
def test_every_tower(towers: dict[str, Clip], tower: str, recipe: str) -> None:
    _assert_equal(_method(towers[tower], recipe))


def test_prompts_that_are_replaced_are_not_computed(clip: Clip) -> None:
    lean = FusedImageEncoder(_method(clip, "vpt-deep"))
    rows: list[int] = []
    for block in lean.blocks:
        assert isinstance(block.up, nn.Linear)
        block.up.register_forward_hook(lambda _module, given, _result: rows.append(given[0].shape[1]))
    lean(_pixels(1, 32))
    assert rows == [17, 17, 1]  # class token and 16 patches, then the class token alone


def test_the_graph_has_one_product_for_queries_keys_and_values_and_no_shapes(clip: Clip, tmp_path: Path) -> None:
    method = _method(clip, "sync-clip")
    path = tmp_path / "lean.onnx"
    onnx_from_module(
        FusedImageEncoder(method),
        _pixels(2, 32),
        path,
        input_spec=image_tensor(32),
        output_spec=embedding_tensor(32),
        metadata={},
    )
    graph: Any = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [list(node.input) for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    fused = [names for names in products if any(weights.get(name) in ([64, 192], [192, 64]) for name in names[1:])]
    fused = [names for names in fused if "patches" not in names]
    sliced = [name for node in graph.node if node.op_type == "Slice" for name in node.input[:1]]
    assert not set(sliced) & set(weights), "weights are cut when the graph is written, not when it runs"
    assert len(fused) == 2  # three blocks; the last one's single query has a product of its own
    assert kinds.count("LayerNormalization") == 9, "the last block's query has one of its own"
    assert kinds.count("Erf") == 3
    assert kinds.count("Transpose") == 4 * 3 + 1, "queries, keys, values and what they give, and the patches once"
    assert "Shape" not in kinds[kinds.index("Softmax") :], "attention asks for no shapes"
    assert kinds.count("Softmax") == 3
    assert "Conv" not in kinds, "the patch projection is a product of pixels"
    pixels = _pixels(7, 32)
    with torch.no_grad():
        expected = ImageEncoder(method)(pixels).numpy()
    np.testing.assert_allclose(session_function(onnx_session(path))(pixels.numpy()), expected, atol=2e-6)
