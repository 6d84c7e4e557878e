"""Caches and linear probes in the bundle: the packed classifier, run by ONNX Runtime, against PyTorch's own.

The graph is the one that a server runs; PyTorch's side is the method's ``classifier(names)`` and a softmax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from clipship.core.bundle import Bundle, Manifest, read_bundle, write_manifest
from clipship.core.classification import VocabularyFeatures
from clipship.core.cli.main import main
from clipship.core.errors import BundleError, CheckFailed, DataError, UsageError
from clipship.core.vocabulary import Vocabulary
from clipship.export.pack import bundle_from_method
from clipship.export.reference import Picture, image_features, pixels_of, validate_classifier
from clipship.serving.repository.classifier_graph import classifier_graph
from clipship.training.evaluation.inference import distinguishable_names
from clipship.training.methods import Method, Task, build_method
from clipship.training.model.clip import Clip
from clipship.training.recipes import config_from_recipe
from tests.export.conftest import NAMES, write_checkpoint

TASK = Task(class_names=NAMES, num_base=3, templates=("a photo of a {}.", "a drawing of {}."))
RECIPES = ("tip-adapter", "tip-adapter-f", "ship-tip-adapter-f", "linear-probe")
SHOTS = 4
TEMPERATURE = 1.75


def trained(clip: Clip, recipe: str, pictures: Sequence[Picture]) -> Method:
    """A method whose cache holds features of ``pictures`` with a large vote, or whose weights are not small."""
    config = replace(config_from_recipe(recipe), base_model=clip.name)
    if "tip" in recipe:
        config = config.with_settings(shots=SHOTS, generated_shots=2, cache_alpha=9.0, cache_beta=4.5)
    method = build_method(clip, config, TASK).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if "tip" in recipe:
            keys = method.state_dict()["keys"]
            keys.copy_(torch.from_numpy(image_features(method, pixels_of(pictures[: len(keys)], clip.image_spec))))
        for tensor in method.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=0.05)
    return method


@pytest.fixture(scope="module", params=RECIPES)
def packed(
    request: pytest.FixtureRequest, clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Method, Bundle]:
    method = trained(clip, request.param, pictures)
    out = tmp_path_factory.mktemp("bundles") / request.param
    vocabulary = Vocabulary(names=distinguishable_names(method))
    return method, bundle_from_method(method, vocabulary, pictures, out, provenance={}, temperature=TEMPERATURE)


def by_the_graph(vocabulary: Vocabulary, features: VocabularyFeatures, embedding: NDArray[np.float32]) -> Any:
    """Probabilities [N, C] in the order of the vocabulary."""
    graph = classifier_graph(vocabulary, features, len(vocabulary))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    scores, indices = session.run(["scores", "indices"], {"embedding": embedding})
    probabilities = np.empty_like(scores)
    np.put_along_axis(probabilities, indices, scores, axis=1)
    return probabilities


def by_pytorch(method: Method, names: Sequence[str], embedding: NDArray[np.float32], temperature: float) -> Any:
    with torch.no_grad():
        logits = method.classifier(names)(torch.from_numpy(embedding)).double()
    return torch.softmax(logits / temperature, dim=1).numpy()


def embeddings(method: Method, pictures: Sequence[Picture]) -> NDArray[np.float32]:
    return image_features(method, pixels_of(pictures[:40], method.clip.image_spec))


def test_the_packed_classifier_is_pytorchs_to_1e_5(packed: tuple[Method, Bundle], pictures: list[Picture]) -> None:
    method, bundle = packed
    embedding = embeddings(method, pictures)
    expected = by_pytorch(method, bundle.vocabulary.names, embedding, TEMPERATURE)
    given = by_the_graph(bundle.vocabulary, bundle.vocabulary_features(), embedding)
    np.testing.assert_allclose(given, expected, atol=1e-5, rtol=0)
    assert np.abs(expected - by_pytorch(method, bundle.vocabulary.names, embedding, 1.0)).max() > 0.01
    plain = replace(bundle.vocabulary_features(), bias=None, cache=None)
    assert np.abs(expected - plain.probabilities(embedding)).max() > 0.01, "the cache or bias does not matter"


def test_the_golden_scores_are_pytorchs(packed: tuple[Method, Bundle]) -> None:
    method, bundle = packed
    golden = bundle.golden()
    expected = by_pytorch(method, bundle.vocabulary.names, golden.embedding, TEMPERATURE)
    np.testing.assert_allclose(golden.scores, np.take_along_axis(expected, golden.indices, 1), atol=1e-5, rtol=0)


def test_the_manifest_says_what_the_classifier_has(packed: tuple[Method, Bundle], tmp_path: Path) -> None:
    method, bundle = packed
    parts = ("bias",) if method.closed_vocabulary else ("cache",)
    assert bundle.manifest.classifier_parts == parts
    content = json.loads((bundle.path / "manifest.json").read_text())
    assert content["format_version"] == 2, "a reader of version 1 would leave the parts out without a word"
    assert Manifest.from_json(content) == bundle.manifest
    with pytest.raises(BundleError, match=r"classifier_parts \['future'\]"):
        Manifest.from_json({**content, "classifier_parts": ["future"]})


NAME_LISTS = {
    "another order": ("green fish", "red star", "blue_ring"),
    "fewer": ("green fish", "red star"),
    "other names too": ("a new one", "green fish", "red star", "tree", "another"),
    "none of the cached": ("a new one", "another"),
}


@pytest.mark.parametrize("names", NAME_LISTS.values(), ids=NAME_LISTS.keys())
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_names_in_any_order(recipe: str, names: tuple[str, ...], clip: Clip, pictures: list[Picture]) -> None:
    method = trained(clip, recipe, pictures)
    if method.closed_vocabulary and not set(names) <= set(TASK.base_names):
        with pytest.raises(DataError, match=r"'a new one'.*: a linear probe knows the 3 classes"):
            method.exported_classifier(names)
        return
    features = method.exported_classifier(names)
    validate_classifier(method, names, features)
    embedding = embeddings(method, pictures)
    given = by_the_graph(Vocabulary(names=names), features.tempered(TEMPERATURE), embedding)
    np.testing.assert_allclose(given, by_pytorch(method, names, embedding, TEMPERATURE), atol=1e-5, rtol=0)


def test_synonyms_share_a_class(clip: Clip, pictures: list[Picture], tmp_path: Path) -> None:
    """Against PyTorch's features and votes of the single words, put together here."""
    method = trained(clip, "tip-adapter", pictures)
    words = {"thing": ("red star", "green fish"), "blue_ring": ("blue_ring",), "plant": ("tree", "a bush")}
    vocabulary = Vocabulary(names=tuple(words), synonyms=tuple(words.values()))
    bundle = bundle_from_method(method, vocabulary, pictures, tmp_path / "bundle", provenance={})
    assert read_bundle(bundle.path).vocabulary.synonyms == tuple(words.values())
    assert (bundle.path / "labels.txt").read_text().splitlines() == list(words)
    embedding = embeddings(method, pictures)
    with torch.no_grad():
        features = torch.from_numpy(embedding).double()
        columns = []
        for each in words.values():
            mean = method.class_features(each).double().mean(dim=0)
            votes = method.classifier(each)(features.float()) - method.logits(
                features.float(), method.class_features(each)
            )
            columns.append(clip.logit_scale * features @ (mean / mean.norm()) + votes.double().sum(dim=1))
        expected = torch.softmax(torch.stack(columns, dim=1), dim=1).numpy()
    given = by_the_graph(bundle.vocabulary, bundle.vocabulary_features(), embedding)
    np.testing.assert_allclose(given, expected, atol=1e-5, rtol=0)


def test_a_linear_probe_names_all_that_it_does_not_know(clip: Clip, pictures: list[Picture], tmp_path: Path) -> None:
    method = trained(clip, "linear-probe", pictures)
    names = Vocabulary(names=("red star", "tree", "bush"))
    with pytest.raises(DataError, match="class 'tree', 'bush': a linear probe knows the 3 classes"):
        bundle_from_method(method, names, pictures, tmp_path / "bundle", provenance={})
    two = Vocabulary(names=("a", "b"), synonyms=(("red star", "blue_ring"), ("green fish",)))
    with pytest.raises(UsageError, match="one weight a class"):
        bundle_from_method(method, two, pictures, tmp_path / "bundle", provenance={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["cocoop", "ship"])
def test_what_cannot_be_packed_says_why(recipe: str, clip: Clip, pictures: list[Picture], tmp_path: Path) -> None:
    config = replace(config_from_recipe(recipe), base_model=clip.name)
    reason = {"cocoop": "computes other class features for every image", "ship": "is no classifier"}[recipe]
    method = build_method(clip, config, TASK)
    with pytest.raises(UsageError, match=f"{recipe} cannot be packed: .*{reason}"):
        bundle_from_method(method, Vocabulary(names=NAMES), pictures, tmp_path / "bundle", provenance={})


@pytest.mark.parametrize("sabotage", ["labels", "alpha", "features"])
def test_a_wrong_classifier_is_not_packed(sabotage: str, clip: Clip, pictures: list[Picture]) -> None:
    method = trained(clip, "tip-adapter", pictures)
    right = method.exported_classifier(NAMES)
    assert right.cache is not None
    wrong = {
        "labels": replace(right, cache=replace(right.cache, labels=right.cache.labels[::-1].copy())),
        "alpha": replace(right, cache=replace(right.cache, alpha=1.001 * right.cache.alpha)),
        "features": replace(right, features=right.features[::-1].copy()),
    }[sabotage]
    validate_classifier(method, NAMES, right)
    with pytest.raises(CheckFailed, match="differs from PyTorch"):
        validate_classifier(method, NAMES, wrong)


def test_a_bundle_whose_parts_are_not_those_of_its_manifest_is_refused(
    packed: tuple[Method, Bundle], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(packed[1].path, folder)
    write_manifest(folder, replace(packed[1].manifest, classifier_parts=()))
    with pytest.raises(BundleError, match="the manifest says none"):
        read_bundle(folder).vocabulary_features()


def test_pack_takes_the_classes_a_linear_probe_has_learned(clip: Clip, pictures: list[Picture], tmp_path: Path) -> None:
    """From the command line."""
    method = trained(clip, "linear-probe", pictures)
    run, images, out = tmp_path / "run", tmp_path / "images", tmp_path / "bundle"
    images.mkdir()
    for picture in pictures[:8]:
        (images / picture.name).write_bytes(picture.data)
    write_checkpoint(run, method)
    given = ["pack", str(run), "--images", str(images), "--out", str(out)]
    assert main(given) == 0
    bundle = read_bundle(out)
    assert bundle.vocabulary.names == TASK.base_names
