"""What each precision of an image encoder costs and gains: size, closeness, accuracy on the built-in world, speed.

    python benchmarks/precision.py clipship-tiny
    python benchmarks/precision.py ViT-B-32/random --images 32 --per-class 0

A zero-shot bundle is packed with every precision, so each has passed its gate; the numbers are those in the bundle. The
accuracy is over the data sets of the built-in world, through the class names and templates of each, by the runtime that
would serve the variant. bfloat16, which ONNX Runtime's CPU provider cannot run, is measured as `pack` emulates it too.
A model with random weights has no accuracy: --per-class 0 leaves it out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.comparison import run_in_batches
from clipship.core.images.decoding import pixels_from_image
from clipship.core.machine.runtimes import open_encoder
from clipship.core.precisions import PRECISIONS, REDUCED
from clipship.core.tables import Table, machine, write_table
from clipship.core.vocabulary import Vocabulary
from clipship.export.image_input import pictures_from_world
from clipship.export.pack import bundle_from_method
from clipship.export.precision.encoder_variants import Profile
from clipship.export.precision.half_precision import emulated_onnx
from clipship.training.methods import Method, Task, build_method
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe
from clipship.world.datasets import WORLD_DATASETS, WorldDataset, picture_of

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]
"""Pixels [N, H, W, 3], labels [N], class features [C, D]."""

HEADER = ("precision", "by", "MB", "centred cosine, mean", "least", "kept in float32", "batch 1", "batch 8", "top-1 %")
"""The speeds are ratios to the float32 file by ONNX Runtime."""


def main() -> None:
    """Pack, measure, write the table."""
    options = _options()
    clip = load_clip(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = _packed(clip, Path(scratch) / "bundle", options.images)
        sets = [_labelled(clip, dataset, options.per_class) for dataset in WORLD_DATASETS if options.per_class]
        rows = [_row(bundle, variant, _top1(bundle, variant, Path(scratch), sets)) for variant in bundle.image_encoders]
    cells = tuple(tuple(row[name] for name in HEADER) for row in rows)
    made = Table(title=f"{options.model}, {machine()}", header=HEADER, rows=cells)
    write_table(options.out, options.model.split("/")[0], rows, made)
    print(made.to_markdown())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--images", type=int, default=128, help="to calibrate and compare on")
    parser.add_argument("--per-class", type=int, default=10, help="test images of a class; 0: no accuracy")
    return parser.parse_args()


def zero_shot_of(clip: Clip) -> tuple[Method, Vocabulary]:
    """``clip`` as it is, with the class names and the template of a data set of the built-in world."""
    names = WORLD_DATASETS[0].class_names
    task = Task(class_names=names, num_base=len(names), templates=(WORLD_DATASETS[0].template,))
    method = build_method(clip, replace(config_from_recipe("zero-shot"), base_model=clip.name), task).eval()
    return method, Vocabulary(names=names)


def _packed(clip: Clip, out: Path, images: int) -> Bundle:
    method, vocabulary = zero_shot_of(clip)
    profile = Profile(precisions=REDUCED)
    shown = pictures_from_world(images)
    return bundle_from_method(method, vocabulary, shown, out, provenance={}, profile=profile)


def _row(bundle: Bundle, variant: EncoderVariant, top1: float | None) -> dict[str, str]:
    by_openvino = variant.runtime == "openvino"
    rows = [
        one
        for one in bundle.verification()["comparisons"]
        if one["form"] == variant.file
        and one["what"] == "images"
        and (one["provider"] == f"OpenVINO {variant.precision}" if by_openvino else "OpenVINO" not in one["provider"])
    ]
    speeds = [f"{variant.speed[size]:.2f}" if size in variant.speed else "-" for size in ("1", "8")]
    told = (
        variant.precision,
        "OpenVINO" if by_openvino else "ONNX Runtime" if variant.speed or variant.precision == "fp32" else "emulation",
        f"{(bundle.path / variant.file).stat().st_size / 1e6:.1f}",
        f"{min(one['mean_centred_cosine'] for one in rows):.6f}",
        f"{min(one['min_centred_cosine'] for one in rows):.6f}",
        str(len(variant.kept_fp32)),
        *speeds,
        "-" if top1 is None else f"{top1:.2f}",
    )
    return dict(zip(HEADER, told, strict=True))


def _top1(bundle: Bundle, variant: EncoderVariant, scratch: Path, sets: Sequence[Labelled]) -> float | None:
    """The mean of the variant's top-1 accuracies in per cent over ``sets``."""
    path = bundle.path / variant.file
    if variant.runtime == "onnx" and PRECISIONS[variant.precision].onnxruntime_lacks:
        path = scratch / variant.file
        emulated_onnx(bundle.path / variant.file, path)
    run = open_encoder(str(path), variant.runtime, variant.precision)
    return float(np.mean([_accuracy(run, *one) for one in sets])) if sets else None


def _labelled(clip: Clip, dataset: WorldDataset, per_class: int) -> Labelled:
    """Pixels [N, H, W, 3], labels [N] and class features [C, D] of test images of ``dataset``."""
    labels = np.repeat(np.arange(dataset.classes), per_class)
    pictures = [picture_of(dataset, "test", int(label), place % per_class) for place, label in enumerate(labels)]
    pixels = np.stack([pixels_from_image(one, clip.image_spec) for one in pictures])
    tokens = clip.tokenize([dataset.template.format(name) for name in dataset.class_names])
    with torch.inference_mode():
        features = clip.model.encode_text(tokens, normalize=True).numpy()
    return pixels, labels, features


def _accuracy(
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    features: NDArray[np.float32],
) -> float:
    given = run_in_batches(run, pixels, 32) @ features.T
    return float((given.argmax(axis=1) == labels).mean()) * 100


if __name__ == "__main__":
    main()
