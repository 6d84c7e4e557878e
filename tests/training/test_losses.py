"""Every loss, and every method's total, against its formula written out in float64 NumPy, to 1e-6."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from clipship.training import losses
from clipship.training.methods import Batch, ImageSet, Method, Partners, Task, build_method, config_of
from clipship.training.methods.cocoop import CoCoOp
from clipship.training.methods.sync_clip import SyncClip
from clipship.training.model import prompts
from clipship.training.model.clip import Clip

Array = NDArray[np.float64]

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))
LABELS = [0, 1, 2, 1]
TOLERANCE = 1e-6


def _log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + float(np.log(sum(np.exp(logit - top) for logit in logits)))
    return [logit - total for logit in logits]


def _logits(features: Array, classes: Array, scale: float) -> list[list[float]]:
    return [[scale * float(one @ feature) / float(np.sqrt(feature @ feature)) for one in classes]
            for feature in features]  # fmt: skip


def _cross_entropy(logits: list[list[float]], labels: list[int]) -> float:
    return -sum(_log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)) / len(labels)


def _classification(features: Array, classes: Array, labels: list[int], scale: float) -> float:
    return _cross_entropy(_logits(features, classes, scale), labels)


def _alignment(
    synthetic: Array, real: Array, labels: list[int], margin: float = 0.0, rows: list[int] | None = None
) -> float:
    total = 0.0
    rows = list(range(len(labels))) if rows is None else rows
    for i, row in enumerate(rows):
        label = labels[row]
        own = float(np.abs(synthetic[i] - real[row]).sum()) / synthetic.shape[1]
        others = [
            float(np.abs(synthetic[i] - real[j]).sum()) / synthetic.shape[1]
            for j in range(len(labels))
            if labels[j] != label
        ]
        hinge = max(0.0, own - min(others) + margin) if others else 0.0
        total += hinge + own
    return total / len(rows)


def _cosine_distance(learned: Array, frozen: Array) -> float:
    return 1 - sum(float(a @ b) for a, b in zip(learned, frozen, strict=True)) / len(learned)


def _absolute_distance(learned: Array, frozen: Array) -> float:
    entries = [abs(float(a) - float(b)) for a, b in zip(learned.ravel(), frozen.ravel(), strict=True)]
    return sum(entries) / len(entries)


def _divergence(logits: list[list[float]], frozen_logits: list[list[float]]) -> float:
    """Sum over B and C of p0 (log p0 - log p), over B C."""
    total = 0.0
    for row, frozen_row in zip(logits, frozen_logits, strict=True):
        for log_p, log_p0 in zip(_log_softmax(row), _log_softmax(frozen_row), strict=True):
            total += float(np.exp(log_p0)) * (log_p0 - log_p)
    return total / (len(logits) * len(logits[0]))


def _unit(features: Array) -> Array:
    unit: Array = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def _near(want: float) -> object:
    return pytest.approx(want, rel=TOLERANCE, abs=1e-12)


def test_each_loss_is_its_formula() -> None:
    draw = np.random.default_rng(3)
    synthetic, real, classes = draw.normal(size=(6, 16)), draw.normal(size=(6, 16)), _unit(draw.normal(size=(5, 16)))
    labels = [0, 1, 1, 2, 0, 2]
    a, b, c = (torch.from_numpy(one) for one in (synthetic, real, classes))
    y = torch.tensor(labels)
    assert float(losses.alignment_loss(a, b, y)) == _near(_alignment(synthetic, real, labels))
    assert float(losses.alignment_loss(a, b, y, margin=0.4)) == _near(_alignment(synthetic, real, labels, 0.4))
    for rows in ([1, 2, 5], [4]):
        got = losses.alignment_loss(a[: len(rows)], b, y, rows=torch.tensor(rows))
        assert float(got) == _near(_alignment(synthetic[: len(rows)], real, labels, rows=rows))
    want = _classification(real, classes, labels, 100.0)
    assert float(losses.classification_loss(b, c, y, 100.0)) == _near(want)
    logits, frozen = draw.normal(size=(6, 5)) * 4, draw.normal(size=(6, 5)) * 4
    assert float(losses.cross_entropy(torch.from_numpy(logits), y)) == _near(_cross_entropy(logits.tolist(), labels))
    got = losses.divergence(torch.from_numpy(logits), torch.from_numpy(frozen))
    assert float(got) == _near(_divergence(logits.tolist(), frozen.tolist()))
    assert float(got) != pytest.approx(_divergence(frozen.tolist(), logits.tolist()), rel=1e-2)
    learned, reference = _unit(synthetic), _unit(real)
    pair = (torch.from_numpy(learned), torch.from_numpy(reference))
    assert float(losses.cosine_distance(*pair)) == _near(_cosine_distance(learned, reference))
    assert float(losses.absolute_distance(*pair)) == _near(_absolute_distance(learned, reference))


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_never_less_than_float32(given: torch.dtype) -> None:
    features = functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1).to(given)
    labels = torch.tensor([0, 1, 2, 0])
    values = [
        losses.classification_loss(features, features, labels, 100.0),
        losses.alignment_loss(features, features, labels),
        losses.cross_entropy(features, labels),
        losses.cosine_distance(features, features),
        losses.absolute_distance(features, features),
        losses.divergence(features, features),
    ]
    want = torch.float64 if given == torch.float64 else torch.float32
    assert {value.dtype for value in values} == {want}


def test_autocast_does_not_round_the_logits() -> None:
    features, classes = torch.randn(8, 16), functional.normalize(torch.randn(5, 16), dim=-1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    want = losses.classification_loss(features, classes, labels, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(losses.classification_loss(features, classes, labels, 100.0)) == pytest.approx(float(want), 1e-6)


def test_the_hinge_is_off_where_the_batch_has_one_class() -> None:
    synthetic = torch.randn(4, 8, requires_grad=True)
    real = torch.randn(4, 8)
    loss = losses.alignment_loss(synthetic, real, torch.ones(4, dtype=torch.long))
    assert float(loss.detach()) == pytest.approx(float((synthetic - real).abs().mean().detach()), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert synthetic.grad is not None
    assert bool(synthetic.grad.isfinite().all())


def test_the_alignment_pulls_both_sides() -> None:
    synthetic, real = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    losses.alignment_loss(synthetic, real, torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
    assert synthetic.grad is not None
    assert real.grad is not None
    assert float(real.grad.abs().sum()) > 0


# The totals: the towers in float64, every learned tensor moved away from where it starts.


@pytest.fixture
def exact(clip: Clip) -> Clip:
    clip.model.double()
    return clip


def _method(clip: Clip, name: str, **settings: object) -> Method:
    config = config_of(name, recipe="t", base_model="small", **settings)
    method = build_method(clip, config, TASK).double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return method


def _pixels(seed: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _array(tensor: Tensor) -> Array:
    assert tensor.dtype == torch.float64
    array: Array = tensor.detach().numpy()
    return array


def _frozen_text(clip: Clip, template: str, names: tuple[str, ...]) -> Array:
    """Raw features [C, D] of open_clip's own text tower."""
    tokens = clip.tokenize([template.replace("{}", name.replace("_", " ")) for name in names])
    with torch.no_grad():
        return _array(clip.model.encode_text(tokens))


def _values(parts: dict[str, Tensor]) -> dict[str, float]:
    assert {value.dtype for value in parts.values()} == {torch.float64}
    return {name: float(value.detach()) for name, value in parts.items()}


def test_coops_total(exact: Clip) -> None:
    method = _method(exact, "coop")
    features = _array(method.image_features(_pixels(1)))
    classes = _array(method.class_features(NAMES[:3]))
    batch = Batch(real=ImageSet(images=torch.from_numpy(features), labels=torch.tensor(LABELS)))
    want = _classification(features, classes, LABELS, exact.logit_scale)
    assert _values(method.loss(batch)) == {"total": _near(want), "real": _near(want)}


def test_coops_total_with_generated_features_is_over_all_classes(exact: Clip) -> None:
    method = _method(exact, "coop")
    features, generated = _array(method.image_features(_pixels(1))), _array(method.image_features(_pixels(2)))
    batch = Batch(
        real=ImageSet(images=torch.from_numpy(features), labels=torch.tensor(LABELS)),
        generated=ImageSet(images=torch.from_numpy(generated), labels=torch.tensor([3, 4, 4, 3])),
    )
    classes = _array(method.class_features(NAMES))
    both = np.concatenate([features, generated])
    want = _classification(both, classes, [*LABELS, 3, 4, 4, 3], exact.logit_scale)
    assert _values(method.loss(batch))["total"] == _near(want)


def test_cocoops_total(exact: Clip) -> None:
    method = _method(exact, "cocoop", meta_reduction=4, text_chunk=7)
    assert isinstance(method, CoCoOp)
    features = _array(method.image_features(_pixels(1)))
    net = {name: _array(value) for name, value in method.meta_net.state_dict().items()}
    rows = []
    tokens = exact.tokenize([f"X X X X {name.replace('_', ' ')}." for name in NAMES[:3]])
    for feature in features:
        hidden = np.maximum(net["0.weight"] @ feature + net["0.bias"], 0)
        shift = net["2.weight"] @ hidden + net["2.bias"]
        context = torch.from_numpy(_array(method.context) + shift)
        classes = _unit(_array(prompts.text_features(exact, tokens, context)))
        rows.append([exact.logit_scale * float(one @ feature) for one in classes])
    batch = Batch(real=ImageSet(images=torch.from_numpy(features), labels=torch.tensor(LABELS)))
    assert _values(method.loss(batch))["total"] == _near(_cross_entropy(rows, LABELS))


@pytest.mark.parametrize("template", ["a photo of a {}.", "some {}, a type of thing."])
def test_kgcoops_total(exact: Clip, template: str) -> None:
    method = _method(exact, "kgcoop", text_consistency=8.0, reference_templates=(template,))
    features = _array(method.image_features(_pixels(1)))
    classes = _array(method.class_features(NAMES[:3]))
    real = _classification(features, classes, LABELS, exact.logit_scale)
    text = _cosine_distance(classes, _unit(_frozen_text(exact, template, NAMES[:3])))
    assert text > 1e-3
    batch = Batch(real=ImageSet(images=torch.from_numpy(features), labels=torch.tensor(LABELS)))
    want = {"total": _near(real + 8.0 * text), "real": _near(real), "text": _near(text)}
    assert _values(method.loss(batch)) == want


IMAGE_METHODS: dict[str, dict[str, object]] = {
    "vpt": {"image_tokens": 4, "image_depth": 3},
    "ivlp": {"text_depth": 2, "image_tokens": 4, "image_depth": 3},
    "maple": {"text_tokens": 2, "text_depth": 2},
}


@pytest.mark.parametrize("name", sorted(IMAGE_METHODS))
def test_totals_of_prompted_images(exact: Clip, name: str) -> None:
    method = _method(exact, name, **IMAGE_METHODS[name])
    with torch.no_grad():
        raw = _array(prompts.image_features(exact, _pixels(1), method.image_prompts()))
    classes = _array(method.class_features(NAMES[:3]))
    if name == "vpt":
        np.testing.assert_allclose(classes, _unit(_frozen_text(exact, TASK.templates[0], NAMES[:3])), rtol=1e-9)
    want = _classification(raw, classes, LABELS, exact.logit_scale)
    values = _values(method.loss(Batch(real=ImageSet(images=_pixels(1), labels=torch.tensor(LABELS)))))
    assert values == {"total": _near(want), "real": _near(want)}


def test_promptsrcs_total(exact: Clip) -> None:
    templates = ("a photo of a {}.", "many {}!")
    method = _method(
        exact, "promptsrc", text_depth=2, image_tokens=4, image_depth=3, text_consistency=25.0,
        image_consistency=10.0, logit_consistency=1.5, reference_templates=templates,
    )  # fmt: skip
    scale = exact.logit_scale
    classes = _array(method.class_features(NAMES[:3]))
    frozen_classes = _unit(sum((_frozen_text(exact, form, NAMES[:3]) for form in templates), np.zeros((3, 24))) / 2)
    with torch.no_grad():
        raw = _array(prompts.image_features(exact, _pixels(1), method.image_prompts()))
        frozen_raw = _array(exact.model.encode_image(_pixels(1)))
    want = {
        "real": _classification(raw, classes, LABELS, scale),
        "text": _absolute_distance(classes, frozen_classes),
        "image": _absolute_distance(_unit(raw), _unit(frozen_raw)),
        "logits": _divergence(_logits(raw, classes, scale), _logits(frozen_raw, frozen_classes, scale)),
    }
    assert min(want.values()) > 1e-3
    total = want["real"] + 25 * want["text"] + 10 * want["image"] + 1.5 * want["logits"]
    values = _values(method.loss(Batch(real=ImageSet(images=_pixels(1), labels=torch.tensor(LABELS)))))
    assert values == {"total": _near(total), **{part: _near(value) for part, value in want.items()}}


def test_sync_clips_total(exact: Clip) -> None:
    method = _method(
        exact, "sync-clip", text_depth=2, image_tokens=4, image_depth=3, domain_tokens=2, synthetic_weight=0.3,
        align_weight=0.7,
    )  # fmt: skip
    assert isinstance(method, SyncClip)
    pixels, partners, new = (_pixels(seed) for seed in (1, 2, 3))
    parts = method.loss(_synthetic_batch([0, 1, 2, 3], new=True))
    with torch.no_grad():
        real = _array(prompts.image_features(exact, pixels, method.image_prompts()))
        pairs = _array(prompts.image_features(exact, partners, method.synthetic_image_prompts()))
        others = _array(prompts.image_features(exact, new, method.synthetic_image_prompts()))
    classes, scale = _array(method.class_features(NAMES)), exact.logit_scale
    want = {
        "real": _classification(real, classes[:3], LABELS, scale),
        "synthetic": _classification(pairs, classes, LABELS, scale)
        + _classification(others, classes, NEW_LABELS, scale),
        "align": _alignment(pairs, real, LABELS),
    }
    total = want["real"] + 0.3 * want["synthetic"] + 0.7 * want["align"]
    assert _values(parts) == {"total": _near(total), **{part: _near(value) for part, value in want.items()}}


SYNTHETIC_METHODS: dict[str, dict[str, object]] = {
    "sync-clip": {"domain_tokens": 2, "synthetic_weight": 0.3, "align_weight": 0.7},
    "ivlp-synthetic": {"synthetic_weight": 0.3},
}
NEW_LABELS = [3, 4, 4, 3]


def _synthetic_method(clip: Clip, name: str) -> Method:
    return _method(clip, name, text_depth=2, image_tokens=4, image_depth=3, **SYNTHETIC_METHODS[name])


def _synthetic_batch(rows: list[int], new: bool) -> Batch:
    """A batch whose real images in ``rows`` have synthetic partners."""
    labels = torch.tensor(LABELS)
    return Batch(
        real=ImageSet(images=_pixels(1), labels=labels),
        synthetic_base=Partners(
            images=_pixels(2)[rows], labels=labels[rows], rows=torch.tensor(rows), share=len(rows) / 4
        ) if rows else None,
        synthetic_new=ImageSet(images=_pixels(3), labels=torch.tensor(NEW_LABELS)) if new else None,
    )  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 3], [2], []])
@pytest.mark.parametrize("name", sorted(SYNTHETIC_METHODS))
def test_totals_with_as_many_synthetic_images_as_there_are(exact: Clip, name: str, rows: list[int], new: bool) -> None:
    method, batch = _synthetic_method(exact, name), _synthetic_batch(rows, new)
    own = method.synthetic_image_prompts() if isinstance(method, SyncClip) else method.image_prompts()
    with torch.no_grad():
        real = _array(prompts.image_features(exact, batch.real.images, method.image_prompts()))
        pairs = _array(prompts.image_features(exact, _pixels(2), own))[rows]
        others = _array(prompts.image_features(exact, _pixels(3), own))[: 4 * new]
    classes, scale = _array(method.class_features(NAMES)), exact.logit_scale
    labels = [LABELS[row] for row in rows]
    want = {"real": _classification(real, classes[:3], LABELS, scale), "synthetic": 0.0}
    if name == "sync-clip":  # a mean for each of the two kinds of classes
        want["synthetic"] += _classification(pairs, classes, labels, scale) if rows else 0.0
        want["synthetic"] += _classification(others, classes, NEW_LABELS, scale) if new else 0.0
        want["align"] = _alignment(pairs, real, LABELS, rows=rows) if rows else 0.0
    elif rows or new:  # one mean over all
        both = np.concatenate([pairs, others])
        want["synthetic"] = _classification(both, classes, [*labels, *NEW_LABELS][: len(both)], scale)
    total = want["real"] + 0.3 * want["synthetic"] + 0.7 * want.get("align", 0.0)
    expected = {"total": _near(total), **{part: _near(value) for part, value in want.items()}}
    assert _values(method.loss(batch)) == expected


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 3], [2]])
@pytest.mark.parametrize("name", sorted(SYNTHETIC_METHODS))
def test_parts_of_a_batch_have_the_synthetic_loss_of_the_whole(exact: Clip, name: str, rows: list[int]) -> None:
    method, batch = _synthetic_method(exact, name), _synthetic_batch(rows, new=True)
    want = float(method.loss(batch)["synthetic"])
    for count in (2, 3, 4):
        parts = [batch.part(number, count) for number in range(count)]
        got = sum(float(method.loss(part)["synthetic"]) * len(part) / 4 for part in parts)
        assert got == _near(want), f"{count} parts"
