"""SYNC-CLIP's three losses against their formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clipship.training.clip import Clip
from clipship.training.config import TrainConfig
from clipship.training.losses import alignment_loss, classification_loss
from clipship.training.methods import Batch, SyncClip, Task
from clipship.training.prompts import image_features

Array = NDArray[np.float64]


def _cross_entropy(features: Array, classes: Array, labels: list[int], scale: float) -> float:
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        logits = [scale * float(feature @ one) / float(np.sqrt(feature @ feature)) for one in classes]
        top = max(logits)
        total -= logits[label] - top - float(np.log(sum(np.exp(logit - top) for logit in logits)))
    return total / len(labels)


def _alignment(synthetic: Array, real: Array, labels: list[int], margin: float = 0.0) -> float:
    total = 0.0
    for i, label in enumerate(labels):
        own = float(np.abs(synthetic[i] - real[i]).sum()) / synthetic.shape[1]
        others = [
            float(np.abs(synthetic[i] - real[j]).sum()) / synthetic.shape[1]
            for j in range(len(labels))
            if labels[j] != label
        ]
        hinge = max(0.0, own - min(others) + margin) if others else 0.0
        total += hinge + own
    return total / len(labels)


def _unit(features: Array) -> Array:
    unit: Array = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def test_each_loss_is_its_formula() -> None:
    draw = np.random.default_rng(3)
    synthetic, real, classes = draw.normal(size=(6, 16)), draw.normal(size=(6, 16)), _unit(draw.normal(size=(5, 16)))
    labels = [0, 1, 1, 2, 0, 2]
    as_tensor = [torch.from_numpy(one).float() for one in (synthetic, real, classes)]
    got = alignment_loss(as_tensor[0], as_tensor[1], torch.tensor(labels))
    assert float(got) == pytest.approx(_alignment(synthetic, real, labels), rel=1e-6)
    got = alignment_loss(as_tensor[0], as_tensor[1], torch.tensor(labels), margin=0.4)
    assert float(got) == pytest.approx(_alignment(synthetic, real, labels, 0.4), rel=1e-6)
    got = classification_loss(as_tensor[1], as_tensor[2], torch.tensor(labels), 100.0)
    assert float(got) == pytest.approx(_cross_entropy(real, classes, labels, 100.0), rel=1e-6)


def test_the_hinge_is_off_where_the_batch_has_one_class() -> None:
    synthetic = torch.randn(4, 8, requires_grad=True)
    real = torch.randn(4, 8)
    loss = alignment_loss(synthetic, real, torch.ones(4, dtype=torch.long))
    assert float(loss.detach()) == pytest.approx(float((synthetic - real).abs().mean().detach()), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert synthetic.grad is not None
    assert bool(synthetic.grad.isfinite().all())


def test_the_alignment_pulls_both_sides() -> None:
    synthetic, real = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    alignment_loss(synthetic, real, torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
    assert synthetic.grad is not None
    assert real.grad is not None
    assert float(real.grad.abs().sum()) > 0


def test_sync_clips_total_is_the_sum_of_its_formulas(clip: Clip) -> None:
    names = ("red", "green", "blue", "white", "black")
    config = TrainConfig(
        recipe="t", method="sync-clip", base_model=clip.name, text_depth=2, image_tokens=4, image_depth=3,
        domain_tokens=2, synthetic_weight=0.3, align_weight=0.7,
    )  # fmt: skip
    method = SyncClip(clip, config, Task(class_names=names, num_base=3, templates=("a photo of a {}.",)))
    draw = torch.Generator().manual_seed(1)
    pixels, seen, unseen = (torch.randn(4, 3, 32, 32, generator=draw) for _ in range(3))
    labels, unseen_labels = [0, 1, 2, 1], [3, 4, 4, 3]
    parts = method.loss(
        Batch(pixels=pixels, labels=torch.tensor(labels), files=(), seen=seen, unseen=unseen,
              unseen_labels=torch.tensor(unseen_labels))
    )  # fmt: skip
    with torch.no_grad():
        real_path, synthetic_path = method.image_prompts(), method.synthetic_image_prompts()
        real = image_features(clip, pixels, real_path).double().numpy()
        pairs = image_features(clip, seen, synthetic_path).double().numpy()
        others = image_features(clip, unseen, synthetic_path).double().numpy()
        classes = method.class_features(names).double().numpy()
    scale = clip.logit_scale
    want_real = _cross_entropy(real, classes[:3], labels, scale)
    want_synthetic = _cross_entropy(pairs, classes, labels, scale) + _cross_entropy(
        others, classes, unseen_labels, scale
    )
    want_align = _alignment(pairs, real, labels)
    assert float(parts["real"]) == pytest.approx(want_real, rel=2e-6)
    assert float(parts["synthetic"]) == pytest.approx(want_synthetic, rel=2e-6)
    assert float(parts["align"]) == pytest.approx(want_align, rel=2e-6)
    total = want_real + 0.3 * want_synthetic + 0.7 * want_align
    assert float(parts["total"].detach()) == pytest.approx(total, rel=2e-6)
