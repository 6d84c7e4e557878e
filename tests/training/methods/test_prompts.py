"""CoCoOp's images and classes in one batch, the shared context, MaPLe's coupling, PromptSRC's frozen side."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clipship.core.errors import RecipeError, UsageError
from clipship.training.config import TrainConfig
from clipship.training.methods import Method, Task, build_method, config_of
from clipship.training.methods.cocoop import CoCoOp
from clipship.training.methods.maple import Maple
from clipship.training.methods.reference import Reference
from clipship.training.model import prompts
from clipship.training.model.clip import Clip

NAMES = ("red", "green_grass", "blue", "white", "black")
TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.",))


def _config(method: str, **settings: object) -> TrainConfig:
    return config_of(method, recipe="test", base_model="small", **settings)


def _cocoop(clip: Clip, **settings: object) -> CoCoOp:
    method = build_method(clip, _config("cocoop", meta_reduction=4, **settings), TASK)
    assert isinstance(method, CoCoOp)
    return method


def _features(count: int, dim: int = 24) -> Tensor:
    return functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(2)), dim=-1)


def _one_image_at_a_time(method: CoCoOp, features: Tensor) -> Tensor:
    """The slow reference: each image shifts the context, and every class name goes through the whole text tower."""
    clip, logits = method.clip, []
    net = method.meta_net.state_dict()
    for feature in features:
        hidden = functional.relu(net["0.weight"] @ feature + net["0.bias"])
        shift = net["2.weight"] @ hidden + net["2.bias"]
        context = torch.stack([token + shift for token in method.context[0]])[None]
        for name in NAMES:
            tokens = clip.tokenize([f"X X X X {name.replace('_', ' ')}."])
            one = prompts.text_features(clip, tokens, context)[0]
            logits.append(clip.logit_scale * (one @ feature) / one.norm())
    return torch.stack(logits).view(len(features), len(NAMES))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 512])
@pytest.mark.parametrize("shared", [True, False])
def test_cocoop_is_one_image_at_a_time(clip: Clip, chunk: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared:
        monkeypatch.setattr(prompts, "can_share_context", lambda clip: False)
    method, features = _cocoop(clip, text_chunk=chunk), _features(7)
    got = method.classifier(NAMES)(features)
    torch.testing.assert_close(got, _one_image_at_a_time(method, features), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cocoop_depends_on_the_image_through_its_text(clip: Clip) -> None:
    method = _cocoop(clip)
    features = _features(3)
    contexts = method.contexts(features)
    assert contexts.shape == (3, 1, 4, 48)
    shift = contexts - method.context
    torch.testing.assert_close(shift, shift[:, :, :1].expand_as(shift), rtol=1e-4, atol=1e-6)
    assert float((contexts[0] - contexts[1]).abs().max()) > 1e-3


def test_cocoops_chunks_have_the_same_gradients(clip: Clip) -> None:
    gradients = []
    for chunk in (512, 10, 2):
        method = _cocoop(clip, text_chunk=chunk)
        logits = method.classifier(NAMES)(_features(4))
        functional.cross_entropy(logits, torch.tensor([0, 1, 2, 4])).backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in method.parameters()])
    for one in gradients[1:]:
        torch.testing.assert_close(one, gradients[0], rtol=1e-4, atol=1e-5)


def test_never_more_pairs_at_once_than_the_chunk(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = prompts.contextual_text_features

    def counted(clip: Clip, tokens: Tensor, contexts: Tensor) -> Tensor:
        seen.append(len(tokens) * len(contexts))
        return original(clip, tokens, contexts)

    monkeypatch.setattr(prompts, "contextual_text_features", counted)
    with torch.no_grad():
        _cocoop(clip, text_chunk=12).classifier(NAMES)(_features(7))
        assert (max(seen), sum(seen), len(seen)) == (10, 35, 4)
        seen.clear()
        _cocoop(clip, text_chunk=3).classifier(NAMES)(_features(7))
        assert (max(seen), sum(seen)) == (3, 35)


def test_cocoop_has_no_class_features_and_says_why(clip: Clip) -> None:
    method = _cocoop(clip)
    with pytest.raises(UsageError, match="only together with an image"):
        method.class_features(NAMES)
    assert "no vocabulary to pack" in method.not_exportable
    with pytest.raises(RecipeError, match="text_depth=2: must be 1: cocoop has prompts in one layer"):
        _cocoop(clip, text_depth=2)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_a_shared_context_is_every_row_by_itself(clip: Clip, depth: int, count: int) -> None:
    tokens = clip.tokenize(["X X X red star.", "X X X blue.", "X X X a long green grass name."])
    contexts = torch.randn(count, depth, 3, 48, generator=torch.Generator().manual_seed(depth))
    got = prompts.contextual_text_features(clip, tokens, contexts)
    assert got.shape == (count, 3, 24)
    for context, rows in zip(contexts, got, strict=True):
        torch.testing.assert_close(rows, prompts.text_features(clip, tokens, context), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pool_type", ["argmax", "eos", "last"])
def test_a_context_for_every_row_is_every_row_by_itself(
    clip: Clip, pool_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"pool_type" if hasattr(clip.text, "pool_type") else "text_pool_type": pool_type}
    names["eos_id" if hasattr(clip.text, "eos_id") else "text_eos_id"] = clip.tokenizer.eot_token_id
    for name, value in names.items():
        monkeypatch.setattr(clip.text, name, value)
    tokens = clip.tokenize(["X X X red star.", "X X X blue.", "X X X a long green grass name."])
    contexts = torch.randn(3, 3, 48, generator=torch.Generator().manual_seed(3))
    got = prompts.pairwise_text_features(clip, tokens, contexts)
    for row, context in enumerate(contexts):
        want = prompts.text_features(clip, tokens[row : row + 1], context[None])
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_maples_image_prompts_are_one_linear_map_a_layer(clip: Clip, depth: int) -> None:
    method = build_method(clip, _config("maple", text_tokens=2, text_depth=depth), TASK)
    assert isinstance(method, Maple)
    got = method.image_prompts()
    assert got.shape == (depth, 2, 32)
    for layer in range(depth):
        want = functional.linear(method.context[layer], method.coupling_weight[layer].T, method.coupling_bias[layer])
        torch.testing.assert_close(got[layer], want)
    bound = 48**-0.5  # PyTorch's own range for a linear layer of 48 inputs
    assert 0.9 * bound < float(method.coupling_weight.detach().abs().max()) <= bound


def test_maples_maps_after_the_first_start_equal(model_folder: object) -> None:
    from clipship.training.model.clip import load_clip
    from clipship.training.recipes import config_from_recipe

    tiny = load_clip("clipship-tiny")
    method = build_method(tiny, config_from_recipe("maple-tiny").with_settings(text_depth=3), TASK)
    weight = method.learned()["coupling_weight"]
    assert torch.equal(weight[1], weight[2])
    assert not torch.equal(weight[0], weight[1])


def test_maple_takes_no_image_settings() -> None:
    with pytest.raises(TypeError, match=r"image_depth|image_tokens"):
        _config("maple", text_tokens=2, image_tokens=2, image_depth=1)


def test_a_context_longer_than_its_words_is_refused(clip: Clip) -> None:
    with pytest.raises(RecipeError, match="has 4 tokens, the recipe 5"):
        build_method(clip, _config("coop", text_tokens=5), TASK)


@torch.no_grad()
def test_references_are_frozen_features_averaged_before_they_are_normalised(clip: Clip) -> None:
    forms = ("a {}.", "many {} here!")
    reference = Reference(clip, _config("promptsrc", reference_templates=forms, templates=("the {}.",)), TASK)
    raw = [clip.model.encode_text(clip.tokenize([form.format("red"), form.format("blue")])) for form in forms]
    want = functional.normalize(raw[0] + raw[1], dim=-1)
    torch.testing.assert_close(reference.class_features(("red", "blue")), want, rtol=1e-5, atol=1e-6)
    assert not list(reference.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["kgcoop", "promptsrc"])
def test_without_reference_templates_the_data_sets_are_taken(clip: Clip, name: str) -> None:
    settings = {"image_tokens": 2, "image_depth": 1} if name == "promptsrc" else {}
    method = build_method(clip, _config(name, **settings), TASK)
    reference: Method = method.reference  # type: ignore[assignment]
    zero_shot = build_method(clip, _config("zero-shot"), TASK)
    torch.testing.assert_close(reference.class_features(NAMES), zero_shot.class_features(NAMES))
