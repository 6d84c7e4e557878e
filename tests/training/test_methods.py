"""What each method learns, and what it answers."""

import pytest
import torch

from clipship.core.errors import RecipeError
from clipship.training.clip import Clip, load_clip
from clipship.training.config import TrainConfig
from clipship.training.methods import METHODS, Batch, Method, SyncClip, Task, build_method, method_named
from clipship.training.recipes import config_from_recipe

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))


def _config(method: str, **changes: object) -> TrainConfig:
    deep: dict[str, object] = {"text_depth": 2, "image_tokens": 4, "image_depth": 3, "domain_tokens": 2}
    settings = {**(deep if method == "sync-clip" else {}), **changes}
    return TrainConfig(recipe="test", method=method, base_model="small", **settings)  # type: ignore[arg-type]


def _method(clip: Clip, name: str, **changes: object) -> Method:
    return build_method(clip, _config(name, **changes), TASK)


def test_parameter_counts_on_vit_b_16_are_the_published_ones() -> None:
    clip = load_clip("ViT-B-16/random")
    counts = {}
    for recipe in ("zero-shot", "coop", "sync-clip"):
        method = build_method(clip, config_from_recipe(recipe), TASK)
        counts[recipe] = sum(parameter.numel() for parameter in method.parameters())
    assert counts == {"zero-shot": 0, "coop": 2_048, "sync-clip": 59_904}
    assert [tuple(value.shape) for value in method.learned().values()] == [(9, 4, 512), (9, 4, 768), (9, 2, 768)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_features_are_unit_and_the_model_is_no_part_of_the_state(clip: Clip, name: str) -> None:
    method = _method(clip, name)
    assert not [key for key in method.state_dict() if "visual" in key or "transformer" in key]
    with torch.no_grad():
        images = method.image_features(torch.randn(2, 3, 32, 32))
        classes = method.class_features(NAMES)
        logits = method.logits(images, classes)
    assert (images.shape, classes.shape, logits.shape) == ((2, 24), (5, 24), (2, 5))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(logits, clip.logit_scale * images @ classes.T)


@torch.no_grad()
def test_zero_shot_is_open_clips(clip: Clip) -> None:
    prompts = clip.tokenize(["a photo of a red.", "a photo of a green grass."])
    want = clip.model.encode_text(prompts, normalize=True)
    torch.testing.assert_close(_method(clip, "zero-shot").class_features(NAMES[:2]), want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_several_templates_are_averaged_and_renormalised(clip: Clip) -> None:
    method = _method(clip, "zero-shot", templates=("a {}.", "one {}!"))
    each = [
        clip.model.encode_text(clip.tokenize([form.format("red")]), normalize=True) for form in ("a {}.", "one {}!")
    ]
    want = torch.nn.functional.normalize(each[0] + each[1], dim=-1)
    torch.testing.assert_close(method.class_features(["red"]), want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(METHODS))
def test_class_features_are_the_text_features_of_the_templates(clip: Clip, name: str) -> None:
    """``text_features`` over full-length tokens is what is exported; ``class_features`` cuts padding."""
    method = _method(clip, name)
    tokens = clip.tokenize([method.templates[0].replace("{}", one.replace("_", " ")) for one in NAMES])
    torch.testing.assert_close(method.class_features(NAMES), method.text_features(tokens), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_coop_starts_as_zero_shot_with_its_words(clip: Clip) -> None:
    zero_shot, coop = _method(clip, "zero-shot"), _method(clip, "coop")
    assert coop.templates == ("X X X X {}.",)
    torch.testing.assert_close(coop.class_features(NAMES), zero_shot.class_features(NAMES), rtol=1e-5, atol=1e-6)


def test_many_classes_pass_in_chunks_with_the_same_gradients(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for chunk in (128, 2):
        monkeypatch.setattr("clipship.training.methods.base._CHUNK", chunk)
        method = _method(clip, "coop")
        method.class_features(NAMES).square().mul(torch.arange(24.0)).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(next(method.parameters()).grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_synthetic_path_shares_all_but_the_first_tokens(clip: Clip) -> None:
    method = _method(clip, "sync-clip")
    assert isinstance(method, SyncClip)
    real, synthetic = method.image_prompts(), method.synthetic_image_prompts()
    assert real.shape == synthetic.shape == (3, 4, 32)
    assert torch.equal(real[:, 2:], synthetic[:, 2:])
    assert bool((real[:, :2] != synthetic[:, :2]).all())


def test_sync_clip_learns_every_prompt(clip: Clip) -> None:
    method = _method(clip, "sync-clip", synthetic_weight=0.2, align_weight=0.5)
    images = torch.randn(3, 3, 32, 32)
    batch = Batch(
        pixels=images, labels=torch.tensor([0, 1, 2]), files=(), seen=images + 0.1, unseen=images - 0.1,
        unseen_labels=torch.tensor([3, 4, 3]),
    )  # fmt: skip
    method.loss(batch)["total"].backward()  # type: ignore[no-untyped-call]
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad.abs().sum(dim=-1) > 0).all()), f"{name}: a token gets no gradient"


def test_sync_clip_works_where_all_classes_are_real(clip: Clip) -> None:
    method = build_method(clip, _config("sync-clip"), Task(class_names=NAMES, num_base=5, templates=TASK.templates))
    images = torch.randn(3, 3, 32, 32)
    parts = method.loss(Batch(pixels=images, labels=torch.tensor([0, 1, 4]), files=(), seen=images))
    assert bool(parts["total"].isfinite())


def test_the_first_prompts_follow_the_seed(clip: Clip) -> None:
    first, again, other = (_method(clip, "sync-clip", seed=seed).learned()["real_tokens"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(0.02, rel=0.2)


def test_deep_prompts_need_the_layers(clip: Clip) -> None:
    with pytest.raises(RecipeError, match=r"prompts in 9 layers, but the image tower of .* has 3"):
        _method(clip, "sync-clip", image_depth=9)


def test_sync_clip_without_image_prompts_is_refused(clip: Clip) -> None:
    with pytest.raises(RecipeError, match="set image_tokens and image_depth"):
        _method(clip, "sync-clip", image_depth=0, image_tokens=0, domain_tokens=0)


def test_unknown_methods_get_the_near_names() -> None:
    with pytest.raises(RecipeError, match="did you mean sync-clip"):
        method_named("synclip")
