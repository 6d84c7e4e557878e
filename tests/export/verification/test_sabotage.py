"""Each gate of ``verify`` on a model with a mistake: what does not fail here could be shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clipship.core import tensors
from clipship.core.bundle import VocabularyFeatures
from clipship.core.comparison import Comparison, batch_sizes_up_to, verify_runner
from clipship.core.tolerances import TOLERANCES
from clipship.export.encoders import ImageEncoder
from clipship.export.image_input import pictures_from_world
from clipship.export.onnx_graph import onnx_from_module
from clipship.export.reference import Picture, image_features, pixels_of
from clipship.export.verification.runners import onnx_runner
from clipship.training.methods import Method, Task, build_method
from clipship.training.model.builtin import TINY
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe
from tests.export.conftest import method_of
from tests.export.verification import graph_mutations
from tests.export.verification.graph_mutations import Saboteur, sabotaged

NAMES = ("red circle", "blue square", "green triangle", "yellow star", "striped ring", "dots", "tree", "fish")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
SIZES = batch_sizes_up_to(40)


@dataclass(frozen=True)
class Exported:
    """A right export, and what PyTorch gives."""

    path: Path
    pixels: NDArray[np.uint8]
    expected: NDArray[np.float32]
    classifier: VocabularyFeatures

    def compared(self, path: Path, precision: str) -> tuple[Comparison, ...]:
        return verify_runner(
            onnx_runner(path, self.pixels[:1]),
            "images",
            self.pixels,
            self.expected,
            references=self.classifier,
            tolerance=TOLERANCES[precision],
            batch_sizes=SIZES,
            form=path.name,
        )


def exported(method: Method, pictures: list[Picture], path: Path) -> Exported:
    spec = method.clip.image_spec
    onnx_from_module(
        ImageEncoder(method),
        torch.zeros((2, spec.size_px, spec.size_px, 3), dtype=torch.uint8),
        path,
        input_spec=tensors.image_tensor(spec.size_px),
        output_spec=tensors.embedding_tensor(method.clip.embed_dim),
        metadata={},
    )
    pixels = pixels_of(pictures, spec)
    with torch.no_grad():
        features = method.class_features(method.task.class_names).numpy()
    classifier = VocabularyFeatures(features=features, logit_scale=method.clip.logit_scale)
    return Exported(path, pixels, image_features(method, pixels), classifier)


def tiny_method(clip: Clip) -> Method:
    task = Task(class_names=NAMES, num_base=4, templates=("a photo of a {}.",))
    return build_method(clip, config_from_recipe("zero-shot"), task).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("tiny") / "image_encoder.onnx"
    return exported(tiny_method(load_clip(TINY)), pictures_from_world(24), path)


@pytest.fixture(scope="module")
def with_outlier(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same model with one massive channel in its residual stream, as large CLIPs have them."""
    clip = load_clip(TINY)
    with torch.no_grad():
        clip.visual.ln_pre.bias[5] = 600.0
    path = tmp_path_factory.mktemp("outlier") / "image_encoder.onnx"
    return exported(tiny_method(clip), pictures_from_world(24), path)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_right_export_passes_every_gate(tiny: Exported, with_outlier: Exported, precision: str) -> None:
    for one in (tiny, with_outlier):
        comparisons = one.compared(one.path, precision)
        assert all(comparisons), list(map(str, comparisons))
        assert [row.batch_size for row in comparisons] == [1, 2, 7, 40]


ALL = PRECISIONS
MISTAKES: list[tuple[Saboteur, tuple[str, ...]]] = [
    (graph_mutations.shifted_crop, ALL),
    (graph_mutations.bgr, ALL),
    (graph_mutations.no_pixel_normalisation, ALL),
    (graph_mutations.swapped_mean_and_std, ALL),
    (graph_mutations.no_unit_length, ALL),
    (graph_mutations.transposed_head, ALL),
    (graph_mutations.dropped_positions, ALL),
    (graph_mutations.not_a_number, ALL),
    # This is as large as what bfloat16 does to large models, and so cannot be told from it.
    (graph_mutations.quick_gelu, ("fp32", "fp16")),
    # These move the features by less than float16's own rounding does: only fp32 can see them.
    (graph_mutations.tanh_gelu, ("fp32",)),
    (graph_mutations.half_weights, ("fp32",)),
    (graph_mutations.half_layer_norm, ("fp32",)),
]


@pytest.mark.parametrize(("saboteur", "precisions"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_model_fails(tiny: Exported, tmp_path: Path, saboteur: Saboteur, precisions: tuple[str, ...]) -> None:
    wrong = sabotaged(tiny.path, saboteur, tmp_path / "wrong.onnx")
    for precision in precisions:
        comparisons = tiny.compared(wrong, precision)
        assert not any(comparisons), f"{precision}: {[str(row) for row in comparisons if row]}"
        assert all(row.failures for row in comparisons)


def test_the_limits_of_reduced_precision_are_as_documented(tiny: Exported, tmp_path: Path) -> None:
    """What the table of tolerances says cannot be seen; if this fails, the text is out of date."""
    wrong = sabotaged(tiny.path, graph_mutations.tanh_gelu, tmp_path / "wrong.onnx")
    assert all(tiny.compared(wrong, "fp16"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_norm_in_float16_fails_where_there_is_an_outlier(
    with_outlier: Exported, tmp_path: Path, precision: str
) -> None:
    wrong = sabotaged(with_outlier.path, graph_mutations.half_layer_norm, tmp_path / "wrong.onnx")
    comparisons = with_outlier.compared(wrong, precision)
    assert not any(comparisons)


@pytest.mark.parametrize(
    ("saboteur", "right_sizes"),
    [
        (graph_mutations.reversed_batch, {1}),
        (graph_mutations.leaking_batch, {1}),
        (graph_mutations.first_of_the_batch, {1, 2, 7}),
        (graph_mutations.fixed_batch, {1}),
    ],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_that_depends_on_the_batch_fails(
    tiny: Exported, tmp_path: Path, saboteur: Saboteur, right_sizes: set[int], precision: str
) -> None:
    wrong = sabotaged(tiny.path, saboteur, tmp_path / "wrong.onnx")
    comparisons = tiny.compared(wrong, precision)
    assert {row.batch_size for row in comparisons if row} == right_sizes


def test_few_images_are_repeated_until_they_fill_the_batch(tiny: Exported, tmp_path: Path) -> None:
    """Of 8 golden samples a batch of 40 is made; otherwise this mistake, from the 33rd row on, would pass."""
    wrong = sabotaged(tiny.path, graph_mutations.first_of_the_batch, tmp_path / "wrong.onnx")
    few = Exported(wrong, tiny.pixels[:8], tiny.expected[:8], tiny.classifier)
    comparisons = few.compared(wrong, "fp32")
    assert [bool(row) for row in comparisons] == [True, True, True, False]
    assert {row.count for row in comparisons} == {8}


def test_prompts_left_out(clip: Clip, pictures: list[Picture], tmp_path: Path) -> None:
    prompted = method_of(clip, "sync-clip")
    plain = exported(method_of(clip, "zero-shot"), pictures[:16], tmp_path / "plain.onnx")
    expected = image_features(prompted, plain.pixels)
    for precision in PRECISIONS:
        tolerance = TOLERANCES[precision]
        runner = onnx_runner(plain.path, plain.pixels[:1])
        wrong = verify_runner(
            runner, "images", plain.pixels, expected, references=plain.classifier, tolerance=tolerance
        )
        assert not any(wrong)
