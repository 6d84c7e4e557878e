"""SHIP: its loss against the formula in NumPy, what it generates, when it warns, and runs that learn from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint
from clipship.training.datasets.base import Dataset
from clipship.training.loop.loop import RunOptions, train
from clipship.training.methods import Batch, ImageSet, Task, build_method, config_of
from clipship.training.methods.prompted import ContextSettings
from clipship.training.methods.ship import (
    ShipGenerator,
    ShipSettings,
    posterior_divergence,
    reconstruction_loss,
    variance_within_classes,
)
from clipship.training.model.clip import Clip
from clipship.training.model.prompts import text_features
from clipship.training.recipes import config_from_recipe

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))
CONFIG = config_of(
    "ship", recipe="test", base_model="small", context_init="", encoder_width=32, decoder_width=40,
    decoder_slope=0.2, kl_weight=0.3, shots=3, epochs=2, batch_size=9, optimizer="adamw", schedule="constant",
    warmup_epochs=0, feature_views=2,
)  # fmt: skip
DIM = 24


def _method(clip: Clip, **changes: object) -> ShipGenerator:
    method = build_method(clip, CONFIG.with_settings(**changes), TASK)
    assert isinstance(method, ShipGenerator)
    return method


def _unit(rows: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, DIM, generator=draw), dim=-1)


def _widened(method: ShipGenerator) -> ShipGenerator:
    """A generator that has learned something: weights well away from their first 0.02."""
    with torch.no_grad():
        for layer in (method.encoder, method.mean, method.decoder_in, method.decoder_out):
            layer.weight.mul_(20)
    return method


def test_each_loss_is_its_formula() -> None:
    draw = np.random.default_rng(2)
    made, real, mean, log_variance = (draw.normal(size=(6, 10)) for _ in range(4))
    want = sum(float(((a - b) ** 2).sum()) for a, b in zip(made, real, strict=True)) / 6
    as_tensors = [torch.from_numpy(one) for one in (made, real, mean, log_variance)]
    assert float(reconstruction_loss(as_tensors[0], as_tensors[1])) == pytest.approx(want, rel=1e-6)
    variance = np.exp(log_variance)
    want = float((0.5 * (variance + mean**2 - 1 - np.log(variance))).sum()) / 6
    assert float(posterior_divergence(as_tensors[2], as_tensors[3])) == pytest.approx(want, rel=1e-6)


def test_the_total_is_the_sum_of_its_parts_and_everything_learns(clip: Clip) -> None:
    method = _widened(_method(clip))
    features, labels = _unit(6, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    mean, log_variance = method.posterior(features)
    noise = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1 << 32))
    made = method.decoded(mean + (log_variance / 2).exp() * noise, labels, NAMES)
    parts = method.loss(Batch(real=ImageSet(images=features, labels=labels)))
    reconstruction = float(((made - features).detach().double().numpy() ** 2).sum()) / 6
    assert float(parts["reconstruction"]) == pytest.approx(reconstruction, rel=1e-5)
    assert float(parts["kl"]) == pytest.approx(float(posterior_divergence(mean, log_variance).detach()), rel=1e-6)
    assert float(parts["total"].detach()) == pytest.approx(reconstruction + 0.3 * float(parts["kl"]), rel=1e-5)
    parts["total"].backward()  # type: ignore[no-untyped-call]
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@torch.no_grad()
def test_one_vector_is_added_to_every_token_of_a_prompt(clip: Clip) -> None:
    method = _widened(_method(clip))
    latent, labels = torch.randn(3, DIM), torch.tensor([4, 0, 4])
    hidden = torch.nn.functional.leaky_relu(latent @ method.decoder_in.weight.T, 0.2)
    shifts = hidden @ method.decoder_out.weight.T
    got = method.decoded(latent, labels, NAMES)
    for row, (label, shift) in enumerate(zip(labels.tolist(), shifts, strict=True)):
        tokens = clip.tokenize([f"X X X X {NAMES[label].replace('_', ' ')}."])
        want = text_features(clip, tokens, method.context + shift)
        torch.testing.assert_close(got[row], torch.nn.functional.normalize(want, dim=-1)[0], rtol=1e-4, atol=1e-5)


def test_the_first_tensors_are_the_published_ones(clip: Clip) -> None:
    method = _method(clip, encoder_width=512)
    assert float(method.encoder.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not method.encoder.bias.any()
    assert float(method.context.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert torch.equal(_method(clip).context, _method(clip).context)


def test_building_leaves_the_global_generator_alone(clip: Clip) -> None:
    before = torch.get_rng_state()
    method = _method(clip)
    method.loss(Batch(real=ImageSet(images=_unit(1, 1), labels=torch.tensor([0]))))
    assert torch.equal(torch.get_rng_state(), before)


def test_many_rows_pass_in_chunks_with_the_same_result(clip: Clip) -> None:
    results = []
    for chunk in (128, 4):
        method = _widened(_method(clip, text_chunk=chunk))
        batch = Batch(real=ImageSet(images=_unit(9, 1), labels=torch.tensor([0, 1, 2] * 3)))
        total = method.loss(batch)["total"]
        total.backward()  # type: ignore[no-untyped-call]
        results.append((total.detach(), method.encoder.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_the_noise_goes_on_where_the_state_was_saved(clip: Clip) -> None:
    batch = Batch(real=ImageSet(images=_unit(2, 1), labels=torch.tensor([0, 1])))
    method = _method(clip)
    totals = [float(method.loss(batch)["total"].detach()) for _ in range(3)]
    assert len(set(totals)) == 3
    again = _method(clip)
    again.loss(batch)
    other = _method(clip)
    other.load_state_dict(again.state_dict())
    assert float(other.loss(batch)["total"].detach()) == totals[1]


def test_generated_features_follow_their_generator(clip: Clip) -> None:
    method = _widened(_method(clip))
    labels = torch.tensor([0, 1, 1, 0, 1])
    first, again, other = (
        method.generate(labels, ("a new one", "black"), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (5, DIM)
    assert not first.requires_grad
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    empty = method.generate(torch.empty(0, dtype=torch.long), NAMES, torch.Generator())
    assert empty.shape == (0, DIM)


def test_variance_within_classes_is_its_formula() -> None:
    features, labels = np.random.default_rng(1).normal(size=(7, 5)), np.array([4, 0, 4, 0, 0, 4, 2])
    spread = [((features[labels == one] - features[labels == one].mean(axis=0)) ** 2).sum() for one in (0, 2, 4)]
    got = variance_within_classes(torch.from_numpy(features), torch.from_numpy(labels))
    assert got == pytest.approx(sum(spread) / 7, rel=1e-6)
    assert variance_within_classes(torch.empty(0, 5), torch.empty(0, dtype=torch.long)) == 0


class _Source:
    def train(self, views: int) -> ImageSet:
        return ImageSet(images=_unit(12, 7), labels=torch.arange(3).repeat(4))

    def validation(self) -> ImageSet:
        raise AssertionError("a generator has nothing to choose")

    def generated(self, per_class: int) -> ImageSet | None:
        raise AssertionError("a generator learns from real features")


def test_a_collapsed_posterior_warns_and_a_healthy_one_does_not(clip: Clip, capsys: pytest.CaptureFixture[str]) -> None:
    collapsed = _method(clip)
    collapsed.end(_Source())
    (line,) = capsys.readouterr().err.splitlines()
    assert "posterior has collapsed" in line
    assert "lower kl_weight" in line
    healthy = _widened(_method(clip))
    with torch.no_grad():
        healthy.decoder_out.weight.mul_(20)
    healthy.end(_Source())
    assert capsys.readouterr().err == ""
    assert healthy.notes["kl"] > np.log(2) > collapsed.notes["kl"]
    assert healthy.notes["generated_variance"] > 0.05 * healthy.notes["real_variance"]


def test_copies_of_one_feature_warn_even_where_the_posterior_is_far_from_the_prior(
    clip: Clip, capsys: pytest.CaptureFixture[str]
) -> None:
    method = _widened(_method(clip))
    with torch.no_grad():
        method.decoder_out.weight.zero_()
    method.end(_Source())
    assert "collapsed" in capsys.readouterr().err
    assert method.notes["kl"] > np.log(2)


def test_a_run_learns_a_generator_and_resumes_to_the_bit(
    clip: Clip, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, base_model=clip.name, epochs=3)
    options = RunOptions(device="cpu", save_every_s=0)
    whole = train(config, dataset, out=tmp_path / "whole", clip=clip, options=options)
    assert {"kl", "real_variance", "generated_variance"} <= set(whole.notes)
    calls = 0
    loss = ShipGenerator.loss

    def failing(self: ShipGenerator, batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(ShipGenerator, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, out=tmp_path / "cut", clip=clip, options=options)
    monkeypatch.setattr(ShipGenerator, "loss", loss)
    resumed = train(config, dataset, out=tmp_path / "cut", clip=clip, options=replace(options, resume=True))
    assert all(torch.equal(whole.learned[name], value) for name, value in resumed.learned.items())
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("name", ["coop", "clip-adapter", "tip-adapter-f"])
def test_methods_learn_from_a_generator(clip: Clip, dataset: Dataset, tmp_path: Path, name: str) -> None:
    generator = replace(CONFIG, base_model=clip.name)
    own = {"cache_views": 2, "generated_shots": 4} if name == "tip-adapter-f" else {}
    config = config_of(
        name, recipe="test", base_model=clip.name, generator=generator, shots=3, epochs=2, batch_size=9,
        feature_views=2, warmup_epochs=0, **own,
    )  # fmt: skip
    train(config, dataset, out=tmp_path / "run", clip=clip, options=RunOptions(device="cpu"))
    method = method_from_checkpoint(load_checkpoint(tmp_path / "run"), clip)
    fresh = build_method(clip, config, dataset.task).learned()
    assert any(not torch.equal(fresh[key], value) for key, value in method.learned().items())
    if name == "tip-adapter-f":
        assert len(method.learned()["keys"]) == 3 * 3 + 2 * 4


def test_context_is_learned_for_names_alone_from_a_generator_of_another_data_set(
    clip: Clip, dataset: Dataset, tmp_path: Path
) -> None:
    source = replace(CONFIG, base_model=clip.name, classes="all")
    options = RunOptions(device="cpu")
    train(source, dataset, out=tmp_path / "generator", clip=clip, options=options)
    config = config_of(
        "coop", recipe="test", base_model=clip.name, generator=source, classes="none", epochs=2, shots=3,
        batch_size=5, feature_views=2, warmup_epochs=0,
    )  # fmt: skip
    checkpoint = train(
        config, dataset, out=tmp_path / "run", generator=tmp_path / "generator", clip=clip, options=options
    )
    assert checkpoint.task.num_base == 0
    fresh = build_method(clip, config, checkpoint.task).learned()["context"]
    assert not torch.equal(fresh, checkpoint.learned["context"])


def test_published_settings() -> None:
    generator = config_from_recipe("ship")
    assert (generator.learning_rate, generator.weight_decay, generator.batch_size, generator.epochs) == (
        1e-3, 0.01, 256, 50,
    )  # fmt: skip
    assert (generator.schedule, generator.warmup_epochs, generator.min_crop) == ("constant", 0, 0.5)
    assert generator.settings == ShipSettings(
        text_tokens=4, context_init="", encoder_width=2048, decoder_width=4096, decoder_slope=0.0, kl_weight=1.0
    )
    imagenet = config_from_recipe("ship-imagenet")
    assert imagenet.settings == replace(generator.settings, encoder_width=4096, decoder_slope=0.2)
    assert imagenet.epochs == 10
    coop = config_from_recipe("ship-coop")
    assert coop.generator == generator
    assert (coop.learning_rate, coop.momentum, coop.weight_decay, coop.batch_size) == (2e-3, 0, 0, 256)
    assert (coop.schedule, coop.warmup_epochs, coop.epochs) == ("step-cosine", 0, 200)
    assert coop.settings == ContextSettings(context_init="a photo of a")


@pytest.mark.parametrize("name", ["ship-coop", "ship-clip-adapter", "ship-tip-adapter-f", "ship-coop-cross"])
def test_a_recipe_and_its_generator_are_for_one_model(name: str) -> None:
    for recipe in (name, f"{name}-tiny"):
        config = config_from_recipe(recipe)
        assert config.generator is not None
        assert config.generator.base_model == config.base_model
        assert config.classes == ("none" if "cross" in name else "base")
        assert config.generator.classes == ("all" if "cross" in name else "base")
