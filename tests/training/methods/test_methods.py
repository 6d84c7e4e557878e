"""What each method learns, and what it answers."""

from dataclasses import replace

import pytest
import torch

from clipship.core.errors import RecipeError
from clipship.training.config import TrainConfig
from clipship.training.methods import (
    METHODS,
    Batch,
    ImageSet,
    Method,
    Partners,
    Task,
    build_method,
    config_of,
    method_named,
)
from clipship.training.methods.prompted import ContextSettings
from clipship.training.methods.sync_clip import SyncClip
from clipship.training.model.clip import Clip, load_clip
from clipship.training.recipes import config_from_recipe

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))


# What each method with learned prompts needs beside the defaults; the model has 3 image and 2 text layers.
SETTINGS: dict[str, dict[str, object]] = {
    "zero-shot": {},
    "coop": {},
    "cocoop": {"meta_reduction": 4},
    "kgcoop": {"text_consistency": 8.0},
    "vpt": {"image_tokens": 4, "image_depth": 3},
    "ivlp": {"text_depth": 2, "image_tokens": 4, "image_depth": 3},
    "ivlp-synthetic": {"text_depth": 2, "image_tokens": 4, "image_depth": 3, "synthetic_weight": 0.25},
    "maple": {"text_tokens": 2, "text_depth": 2},
    "promptsrc": {
        **{"text_depth": 2, "image_tokens": 4, "image_depth": 3},
        **{"text_consistency": 25.0, "image_consistency": 10.0, "logit_consistency": 1.0},
    },
    "sync-clip": {"text_depth": 2, "image_tokens": 4, "image_depth": 3, "domain_tokens": 2},
}
WITH_CLASS_FEATURES = sorted({*SETTINGS} - {"cocoop"})


def _config(method: str, **changes: object) -> TrainConfig:
    settings = {**SETTINGS[method], **changes}
    return config_of(method, recipe="test", base_model="small", **settings)


def _method(clip: Clip, name: str, **changes: object) -> Method:
    return build_method(clip, _config(name, **changes), TASK)


def _batch(method: Method) -> Batch:
    draw = torch.Generator().manual_seed(5)
    pixels, labels = torch.randn(3, 3, 32, 32, generator=draw), torch.tensor([0, 1, 2])
    if method.image_side_frozen:
        with torch.no_grad():
            return Batch(real=ImageSet(images=method.image_features(pixels), labels=labels))
    if not method.needs_synthetic:
        return Batch(real=ImageSet(images=pixels, labels=labels))
    return Batch(
        real=ImageSet(images=pixels, labels=labels),
        synthetic_base=Partners(images=pixels + 0.1, labels=labels, rows=torch.arange(3), share=1.0),
        synthetic_new=ImageSet(images=pixels - 0.1, labels=torch.tensor([3, 4, 3])),
    )


PUBLISHED_COUNTS = {
    "zero-shot": 0,
    "coop": 4 * 512,
    "cocoop": 4 * 512 + (512 * 32 + 32) + (32 * 512 + 512),  # 35,360 in MaPLe's table of complexities
    "kgcoop": 4 * 512,
    "vpt-shallow": 8 * 768,
    "vpt-deep": 12 * 8 * 768,
    "ivlp": 9 * 4 * (512 + 768),
    "ivlp-maple": 12 * 2 * (512 + 768),
    "ivlp-synthetic": 9 * 4 * (512 + 768),
    "maple": 9 * 2 * 512 + 9 * (512 * 768 + 768),  # published as 3.55 M
    "maple-cross": 3 * 2 * 512 + 3 * (512 * 768 + 768),
    "promptsrc": 9 * 4 * (512 + 768),
    "sync-clip": 59_904,
}


def test_parameter_counts_on_vit_b_16_are_the_published_ones() -> None:
    clip = load_clip("ViT-B-16/random")
    counts = {}
    for recipe in PUBLISHED_COUNTS:
        method = build_method(clip, config_from_recipe(recipe), TASK)
        counts[recipe] = sum(parameter.numel() for parameter in method.parameters())
    assert counts == PUBLISHED_COUNTS
    assert (counts["coop"], counts["cocoop"], counts["promptsrc"], counts["maple"]) == (2048, 35_360, 46_080, 3_555_072)
    shapes = {name: tuple(value.shape) for name, value in method.learned().items()}
    assert shapes == {"context": (9, 4, 512), "real_tokens": (9, 4, 768), "synthetic_tokens": (9, 2, 768)}


@pytest.mark.parametrize("name", WITH_CLASS_FEATURES)
def test_features_are_unit_and_logits_are_scaled_cosines(clip: Clip, name: str) -> None:
    method = _method(clip, name)
    with torch.no_grad():
        images = method.image_features(torch.randn(2, 3, 32, 32))
        classes = method.class_features(NAMES)
        logits = method.logits(images, classes)
        assert torch.equal(method.classifier(NAMES)(images), logits)
    assert (images.shape, classes.shape, logits.shape) == ((2, 24), (5, 24), (2, 5))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(logits, clip.logit_scale * images @ classes.T)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_frozen_model_is_no_part_of_the_state(clip: Clip, name: str) -> None:
    method = _method(clip, name)
    assert {*method.state_dict()} == {key for key, _ in method.named_parameters()}
    frozen = {parameter.data_ptr() for parameter in clip.model.parameters()}
    assert frozen.isdisjoint(parameter.data_ptr() for parameter in method.parameters())


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
@pytest.mark.parametrize("name", WITH_CLASS_FEATURES)
def test_class_features_are_the_text_features_of_the_templates(clip: Clip, name: str) -> None:
    """``text_features`` over full-length tokens is what is exported; ``class_features`` cuts padding."""
    method = _method(clip, name)
    tokens = clip.tokenize([method.templates[0].replace("{}", one.replace("_", " ")) for one in NAMES])
    torch.testing.assert_close(method.class_features(NAMES), method.text_features(tokens), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("name", "template"), [("coop", "X X X X {}."), ("kgcoop", "X X X X {}."),
                                                ("ivlp", "X X X X {}."), ("maple", "X X of a {}.")])  # fmt: skip
def test_contexts_start_as_zero_shot_with_their_words(clip: Clip, name: str, template: str) -> None:
    """Words of the context that no token is learned for stay in the prompt, as in MaPLe's code."""
    zero_shot, method = _method(clip, "zero-shot"), _method(clip, name, text_depth=1)
    assert method.templates == (template,)
    torch.testing.assert_close(method.class_features(NAMES), zero_shot.class_features(NAMES), rtol=1e-5, atol=1e-6)


def test_many_classes_pass_in_chunks_with_the_same_gradients(clip: Clip) -> None:
    gradients = []
    for chunk in (128, 2):
        method = _method(clip, "coop", text_chunk=chunk)
        method.class_features(NAMES).square().mul(torch.arange(24.0)).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(next(method.parameters()).grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*SETTINGS} - {"zero-shot"}))
def test_gradients_reach_every_learned_tensor(clip: Clip, name: str) -> None:
    weights = {"synthetic_weight": 0.2, "align_weight": 0.5} if name == "sync-clip" else {}
    method = _method(clip, name, **weights)
    parts = method.loss(_batch(method))
    parts["total"].backward()  # type: ignore[no-untyped-call]
    assert not [part for part, value in parts.items() if part != "total" and value.requires_grad]
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        if key.startswith("meta_net"):  # a hidden unit that is off for every image of the batch learns nothing
            assert bool(parameter.grad.any()), key
        else:
            assert bool((parameter.grad.abs().sum(dim=-1) > 0).all()), f"{key}: a token gets no gradient"
    assert not [parameter for parameter in clip.model.parameters() if parameter.grad is not None]


def test_the_synthetic_path_shares_all_but_the_first_tokens(clip: Clip) -> None:
    method = _method(clip, "sync-clip")
    assert isinstance(method, SyncClip)
    real, synthetic = method.image_prompts(), method.synthetic_image_prompts()
    assert real.shape == synthetic.shape == (3, 4, 32)
    assert torch.equal(real[:, 2:], synthetic[:, 2:])
    assert bool((real[:, :2] != synthetic[:, :2]).all())


def test_sync_clip_works_where_all_classes_are_real(clip: Clip) -> None:
    method = build_method(clip, _config("sync-clip"), Task(class_names=NAMES, num_base=5, templates=TASK.templates))
    images = torch.randn(3, 3, 32, 32)
    labels = torch.tensor([0, 1, 4])
    partners = Partners(images=images, labels=labels, rows=torch.arange(3), share=1.0)
    parts = method.loss(Batch(real=ImageSet(images=images, labels=labels), synthetic_base=partners))
    assert bool(parts["total"].isfinite())


@pytest.mark.parametrize("name", sorted({*SETTINGS} - {"zero-shot"}))
def test_the_first_tensors_follow_the_seed_alone(clip: Clip, name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        before = torch.get_rng_state()
        first = _method(clip, name, seed=1).learned()
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        torch.manual_seed(8)
        again, other = (_method(clip, name, seed=seed).learned() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    from_words = {"context"} if len(first.get("context", ())) == 1 else set()
    assert {key for key in first if torch.equal(first[key], other[key])} == from_words


def test_prompts_are_drawn_in_one_order(clip: Clip) -> None:
    """What a seed draws is part of a recipe: context first, then real tokens, then synthetic ones."""
    learned = _method(clip, "sync-clip", seed=3).learned()
    draw = torch.Generator().manual_seed(3)
    text, real, synthetic = (
        torch.randn(*shape, generator=draw) * 0.02 for shape in ((2, 4, 48), (3, 4, 32), (3, 2, 32))
    )
    assert torch.equal(learned["context"][1], text[1])
    assert torch.equal(learned["real_tokens"], real)
    assert torch.equal(learned["synthetic_tokens"], synthetic)
    assert torch.equal(_method(clip, "ivlp", seed=3).learned()["image_context"], real)


@pytest.mark.parametrize("name", ["vpt", "ivlp", "ivlp-synthetic", "promptsrc", "sync-clip"])
def test_deep_prompts_need_the_layers(clip: Clip, name: str) -> None:
    with pytest.raises(RecipeError, match=r"prompts in 9 layers, but the image tower of .* has 3"):
        _method(clip, name, image_depth=9)


@pytest.mark.parametrize("name", ["vpt", "ivlp", "ivlp-synthetic", "promptsrc", "sync-clip"])
def test_image_prompts_are_not_left_out_in_silence(name: str) -> None:
    for setting in ("image_depth", "image_tokens"):
        with pytest.raises(RecipeError, match=f"{setting}=0: must be at least 1"):
            _config(name, **{setting: 0})


def test_settings_of_another_method_are_refused(clip: Clip) -> None:
    config = replace(_config("ivlp"), settings=ContextSettings())
    with pytest.raises(RecipeError, match="recipe test: method ivlp takes IvlpSettings, not ContextSettings"):
        build_method(clip, config, TASK)


def test_methods_are_found_in_their_modules() -> None:
    assert set(METHODS) == {
        *SETTINGS, "clip-adapter", "tip-adapter", "tip-adapter-f", "linear-probe", "ship",
    }  # fmt: skip
    assert all(method_named(name).name == name for name in METHODS)


def test_unknown_methods_get_the_near_names() -> None:
    with pytest.raises(RecipeError, match="did you mean sync-clip"):
        method_named("synclip")
