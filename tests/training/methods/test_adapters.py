"""CLIP-Adapter, Tip-Adapter and the linear probe: against their formulas in NumPy, and through the training loop."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipship.core.errors import DataError, RecipeError
from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint
from clipship.training.config import TrainConfig
from clipship.training.datasets.base import Dataset
from clipship.training.loop.loop import RunOptions, train
from clipship.training.methods import Batch, ImageSet, Method, Task, build_method, config_of
from clipship.training.methods.clip_adapter import ClipAdapterSettings
from clipship.training.methods.tip_adapter import ALPHAS, BETAS, TipAdapter, TipAdapterF, TipAdapterSettings
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe

Array = NDArray[np.float64]

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))
GENERATOR = config_of("ship", recipe="test", base_model="small")
DIM = 24


def _config(method: str, **changes: object) -> TrainConfig:
    return config_of(method, recipe="test", base_model="small", shots=2, **changes)


def _unit(rows: int, seed: int) -> Tensor:
    features = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(features, dim=-1).float()


class _Source:
    """Samples from memory; asking for anything else fails."""

    def __init__(self, *, validation: ImageSet, train: ImageSet | None = None, shots: int = 2) -> None:
        labels = torch.arange(3).repeat(shots)  # not in the order of the cache
        self._train = ImageSet(images=_unit(len(labels), 5), labels=labels) if train is None else train
        self._validation = validation
        self.views: list[int] = []

    def train(self, views: int) -> ImageSet:
        self.views.append(views)
        return self._train

    def validation(self) -> ImageSet:
        return self._validation

    def generated(self, per_class: int) -> ImageSet | None:
        labels = torch.tensor([3, 4]).repeat_interleave(per_class)
        return ImageSet(images=_unit(len(labels), 6), labels=labels)


NO_VALIDATION = ImageSet(images=torch.empty(0, DIM), labels=torch.empty(0, dtype=torch.long))


def _filled(clip: Clip, name: str = "tip-adapter", **changes: object) -> TipAdapter:
    method = build_method(clip, _config(name, **changes), TASK)
    assert isinstance(method, TipAdapter)
    method.begin(_Source(validation=NO_VALIDATION))
    return method


def _double(method: Method, name: str) -> Array:
    value: Array = method.state_dict()[name].double().numpy()
    return value


def _text(method: Method, names: Sequence[str]) -> Array:
    value: Array = method.class_features(names).double().numpy()
    return value


def _cross_entropy(logits: Array, labels: list[int]) -> float:
    terms = [float(np.log(np.exp(row - row[label]).sum())) for row, label in zip(logits, labels, strict=True)]
    return sum(terms) / len(terms)


def test_the_adapter_is_its_formula(clip: Clip) -> None:
    method = build_method(clip, _config("clip-adapter", adapter_ratio=0.3), TASK)
    features, labels = _unit(4, 1), [0, 1, 2, 1]
    down, up = _double(method, "down"), _double(method, "up")
    assert (down.shape, up.shape) == ((6, 24), (24, 6))
    plain = features.double().numpy()
    mixed = 0.3 * np.maximum(np.maximum(plain @ down.T, 0) @ up.T, 0) + 0.7 * plain
    adapted = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    np.testing.assert_allclose(method.adapted(features).detach().numpy(), adapted, atol=1e-6)
    total = method.loss(Batch(real=ImageSet(images=features, labels=torch.tensor(labels))))["total"]
    want = _cross_entropy(clip.logit_scale * adapted @ _text(method, NAMES[:3]).T, labels)
    assert float(total.detach()) == pytest.approx(want, rel=1e-6)


def test_the_adapter_does_not_care_how_long_a_feature_is(clip: Clip) -> None:
    method = build_method(clip, _config("clip-adapter"), TASK)
    torch.testing.assert_close(method.adapted(7 * _unit(3, 1)), method.adapted(_unit(3, 1)))


def test_an_adapter_narrower_than_one_is_refused(clip: Clip) -> None:
    with pytest.raises(RecipeError, match=r"adapter_reduction=25: .* has 24 joint dimensions"):
        build_method(clip, _config("clip-adapter", adapter_reduction=25), TASK)


def test_parameter_counts_on_vit_b_16() -> None:
    clip = load_clip("ViT-B-16/random")
    counts = {}
    for recipe in ("clip-adapter", "tip-adapter", "tip-adapter-f", "linear-probe", "ship"):
        method = build_method(clip, config_from_recipe(recipe), TASK)
        counts[recipe] = sum(parameter.numel() for parameter in method.parameters())
    assert counts == {
        "clip-adapter": 2 * 512 * 128,
        "tip-adapter": 0,
        "tip-adapter-f": 3 * 16 * 512,
        "linear-probe": 3 * 513,
        "ship": 7_349_760,
    }


@pytest.mark.parametrize("names", [NAMES, ("black", "blue", "a new one"), ("unknown",)])
def test_cache_logits_are_their_formula_for_any_names(clip: Clip, names: tuple[str, ...]) -> None:
    method = _filled(clip, cache_alpha=1.7, cache_beta=3.0)
    features = _unit(4, 2)
    keys = _double(method, "keys")
    logits = clip.logit_scale * features.double().numpy() @ _text(method, names).T
    for key, label in zip(keys, [0, 0, 1, 1, 2, 2], strict=True):
        if NAMES[label] in names:
            votes = 1.7 * np.exp(-3.0 * (1 - features.double().numpy() @ key))
            logits[:, names.index(NAMES[label])] += votes
    got = method.classifier(names)(features)
    np.testing.assert_allclose(got.detach().numpy(), logits, rtol=1e-5, atol=1e-5)


def test_keys_are_the_mean_views_in_the_order_of_the_classes(clip: Clip) -> None:
    method = build_method(clip, _config("tip-adapter", cache_views=7), TASK)
    source = _Source(validation=NO_VALIDATION)
    method.begin(source)
    assert source.views == [7]
    assert torch.equal(method.state_dict()["keys"], source.train(7).images[[0, 3, 1, 4, 2, 5]])


def test_generated_keys_follow_the_real_ones(clip: Clip) -> None:
    method = _filled(clip, generator=GENERATOR, generated_shots=3)
    assert torch.equal(method.keys[6:], _unit(6, 6))
    assert method.key_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert sorted(method.state_dict()) == ["alpha", "beta", "keys"]


def test_a_cache_needs_every_image_it_was_made_for(clip: Clip) -> None:
    method = build_method(clip, _config("tip-adapter"), TASK)
    with pytest.raises(DataError, match="9 images for a cache of 6 keys"):
        method.begin(_Source(validation=NO_VALIDATION, shots=3))


def test_only_the_keys_learn_and_at_the_configured_weights(clip: Clip) -> None:
    method = _filled(clip, "tip-adapter-f", cache_alpha=1.7, cache_beta=3.0)
    assert isinstance(method, TipAdapterF)
    features, labels = _unit(3, 3), [0, 1, 2]
    parts = method.loss(Batch(real=ImageSet(images=features, labels=torch.tensor(labels))))
    parts["total"].backward()  # type: ignore[no-untyped-call]
    assert [name for name, _ in method.named_parameters()] == ["keys"]
    assert method.keys.grad is not None
    assert bool((method.keys.grad.abs().sum(dim=1) > 0).all())
    logits = method.classifier(NAMES[:3])(features).detach().double().numpy()
    assert float(parts["total"].detach()) == pytest.approx(_cross_entropy(logits, labels), rel=1e-6)


def test_the_search_takes_the_best_on_validation_and_the_smallest_of_equals(clip: Clip) -> None:
    method = _filled(clip)
    validation = ImageSet(images=_unit(9, 8), labels=torch.tensor([0, 1, 2] * 3))
    plain = clip.logit_scale * validation.images.double().numpy() @ _text(method, NAMES[:3]).T
    affinity = validation.images.double().numpy() @ _double(method, "keys").T
    votes = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    found = {
        (alpha, beta): int(
            ((plain + alpha * np.exp(-beta * (1 - affinity)) @ votes).argmax(axis=1) == validation.labels.numpy()).sum()
        )
        for alpha in ALPHAS
        for beta in BETAS
    }
    best = max(found.values())
    assert min(found.values()) < best, "nothing to choose from"
    want = min(weights for weights, correct in found.items() if correct == best)
    method.end(_Source(validation=validation))
    assert (float(method.alpha), float(method.beta)) == pytest.approx(want)
    assert method.notes["validation_accuracy"] == pytest.approx(100 * best / 9)


def test_without_validation_images_the_settings_stay(clip: Clip) -> None:
    method = _filled(clip, cache_alpha=1.25, cache_beta=2.5)
    method.end(_Source(validation=NO_VALIDATION))
    assert method.notes == {"cache_alpha": 1.25, "cache_beta": 2.5}


def test_the_searched_grid_is_the_published_one() -> None:
    assert (len(ALPHAS), len(BETAS), ALPHAS[0], BETAS[0]) == (20, 200, 0.1, 0.1)
    assert (ALPHAS[-1], BETAS[-1]) == pytest.approx((2.855, 6.9655))


def test_a_linear_probe_is_its_formula_and_starts_from_nothing(clip: Clip) -> None:
    method = build_method(clip, _config("linear-probe"), TASK)
    features, labels = _unit(4, 1), [0, 1, 2, 2]
    batch = Batch(real=ImageSet(images=features, labels=torch.tensor(labels)))
    assert float(method.loss(batch)["total"].detach()) == pytest.approx(np.log(3), rel=1e-6)
    draw = torch.Generator().manual_seed(1)
    for parameter in method.parameters():
        parameter.data.normal_(std=0.1, generator=draw)
    weight, bias = _double(method, "weight"), _double(method, "bias")
    logits = clip.logit_scale * (features.double().numpy() @ weight.T + bias)
    assert float(method.loss(batch)["total"].detach()) == pytest.approx(_cross_entropy(logits, labels), rel=1e-6)
    swapped = method.classifier(("blue", "red"))(features).detach().numpy()
    np.testing.assert_allclose(swapped, logits[:, [2, 0]], rtol=1e-5)


def test_a_linear_probe_refuses_classes_it_has_not_seen(clip: Clip) -> None:
    method = build_method(clip, _config("linear-probe"), TASK)
    with pytest.raises(DataError, match="class 'white': a linear probe knows the 3 classes it was trained on"):
        method.classifier(("red", "white"))


@pytest.mark.parametrize("name", ["clip-adapter", "tip-adapter-f", "linear-probe", "coop"])
def test_generated_features_alone_are_enough(clip: Clip, name: str) -> None:
    task = replace(TASK, num_base=0)
    own = {"generated_shots": 2} if name == "tip-adapter-f" else {}
    method = build_method(clip, _config(name, classes="none", generator=GENERATOR, **own), task)
    nothing = ImageSet(images=torch.empty(0, DIM), labels=torch.empty(0, dtype=torch.long))
    everything = ImageSet(images=_unit(10, 4), labels=torch.arange(5).repeat_interleave(2))
    method.begin(_Generated(nothing, everything))
    for features in (torch.empty(0, DIM), torch.empty(0)):
        generated = ImageSet(images=_unit(4, 9), labels=torch.tensor([0, 4, 2, 1]))
        batch = Batch(real=ImageSet(images=features, labels=nothing.labels), generated=generated)
        total = method.loss(batch)["total"]
        total.backward()  # type: ignore[no-untyped-call]
        assert bool(total.isfinite())


class _Generated(_Source):
    def __init__(self, nothing: ImageSet, everything: ImageSet) -> None:
        super().__init__(validation=nothing, train=nothing)
        self._everything = everything

    def generated(self, per_class: int) -> ImageSet | None:
        return self._everything


TRAINED: dict[str, dict[str, object]] = {
    "clip-adapter": {"epochs": 3, "batch_size": 6},
    "tip-adapter": {"cache_views": 2},
    "tip-adapter-f": {"epochs": 3, "batch_size": 6, "cache_views": 2, "optimizer": "adamw", "learning_rate": 1e-3},
    "linear-probe": {"epochs": 3, "batch_size": 6},
}


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_run_learns_is_stored_and_loads(clip: Clip, dataset: Dataset, tmp_path: Path, name: str) -> None:
    config = replace(_config(name, feature_views=2, **TRAINED[name]), base_model=clip.name)
    before = build_method(clip, config, dataset.task).learned()
    train(config, dataset, out=tmp_path / "run", clip=clip, options=RunOptions(device="cpu"))
    checkpoint = load_checkpoint(tmp_path / "run")
    method = method_from_checkpoint(checkpoint, clip)
    assert any(not torch.equal(before[key], value) for key, value in method.learned().items())
    if isinstance(method, TipAdapter):
        assert "alpha and beta on validation images" in checkpoint.selection
        assert float(method.alpha) == pytest.approx(checkpoint.notes["cache_alpha"])


def test_published_settings() -> None:
    adapter, cache = config_from_recipe("clip-adapter"), config_from_recipe("tip-adapter-f")
    assert adapter.settings == ClipAdapterSettings(adapter_reduction=4, adapter_ratio=0.2)
    assert (adapter.optimizer, adapter.learning_rate, adapter.batch_size, adapter.epochs) == ("sgd", 2e-3, 32, 200)
    assert (cache.optimizer, cache.learning_rate, cache.adam_epsilon, cache.epochs) == ("adamw", 1e-3, 1e-4, 20)
    assert (cache.schedule, cache.batch_size, cache.min_crop) == ("step-cosine", 256, 0.5)
    assert cache.settings == TipAdapterSettings(cache_alpha=1.17, cache_beta=1.0, cache_views=10, generated_shots=16)
    assert config_from_recipe("tip-adapter").epochs == 0


@pytest.mark.parametrize("name", ["tip-adapter", "tip-adapter-f"])
def test_a_cache_needs_a_number_of_shots(clip: Clip, name: str) -> None:
    with pytest.raises(RecipeError, match="shots=0: a cache has the same number of keys a class"):
        build_method(clip, replace(_config(name), shots=0), TASK)
