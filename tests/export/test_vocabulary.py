"""``clipship vocab``: features against PyTorch's, everything else bit for bit, nothing changed by halves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clipship.core.bundle import Bundle, read_bundle, write_manifest_content
from clipship.core.classification import Cache, VocabularyFeatures
from clipship.core.cli.main import main
from clipship.core.vocabulary import Vocabulary
from clipship.export.pack import bundle_from_method
from clipship.export.reference import Picture
from clipship.export.verification.verify import verify_bundle
from clipship.export.vocab import edit, encode
from clipship.export.vocab.edit import add_classes, remove_classes
from clipship.training.methods import Method
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of

NEW = ("violet whale", "blue_whale", "Grüße", "日本", "a name with 3 digits: 123")


Packed = Callable[[str], Path]
"""A recipe to a bundle of the small CLIP with it, packed once."""


@pytest.fixture(scope="module")
def packed(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    @cache
    def pack(recipe: str) -> Path:
        out = tmp_path_factory.mktemp("bundles") / recipe
        bundle_from_method(method_of(clip, recipe), Vocabulary(names=NAMES), pictures[:8], out, provenance={})
        return out

    return pack


@pytest.fixture(params=["zero-shot", "sync-clip"])
def method(request: pytest.FixtureRequest, clip: Clip) -> Method:
    """Two templates without prompts, and learned prompts."""
    return method_of(clip, request.param)


@pytest.fixture
def bundle(packed: Packed, method: Method, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed(method.name), tmp_path / "bundle"))


@pytest.fixture
def one(packed: Packed, tmp_path: Path) -> Path:
    """A bundle of one kind, for what does not depend on it."""
    return Path(shutil.copytree(packed("zero-shot"), tmp_path / "bundle"))


def expected_features(method: Method, names: tuple[str, ...]) -> NDArray[np.float32]:
    with torch.no_grad():
        return method.class_features(names).numpy()


def classifier_replaced(
    path: Path, change: Callable[[VocabularyFeatures], VocabularyFeatures], **others: NDArray[Any]
) -> Path:
    """The bundle at ``path`` with another classifier, and tensors beside it, as a packer would have written it."""
    from safetensors.numpy import save

    before = read_bundle(path)
    classifier = change(before.vocabulary_features())
    (path / "vocabulary.safetensors").write_bytes(save(classifier.tensors() | others))
    content = json.loads((path / "manifest.json").read_text())
    version = 2 if classifier.parts else 1
    write_manifest_content(path, {**content, "format_version": version, "classifier_parts": list(classifier.parts)})
    return path


def with_cache(classifier: VocabularyFeatures) -> VocabularyFeatures:
    keys = np.random.default_rng(3).standard_normal((7, classifier.features.shape[1])).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    cache = Cache(keys=keys, labels=np.array([0, 0, 1, 2, 2, 3, 4]), alpha=2.0, beta=5.5)
    return VocabularyFeatures(features=classifier.features, logit_scale=classifier.logit_scale, cache=cache)


def as_linear_probe(classifier: VocabularyFeatures) -> VocabularyFeatures:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(classifier.features.shape).astype(np.float32)
    return VocabularyFeatures(features=weight, logit_scale=2.0, bias=weight[:, 0].copy())


def run(*arguments: str | Path) -> int:
    return main(["vocab", *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("clipship: ")
    return lines[-1]


def same_files(first: Bundle, second: Bundle) -> set[str]:
    return {name for name in first.files if first.files[name] == second.files.get(name)}


# Adding


def test_added_features_are_pytorchs_and_kept_ones_stay_bit_for_bit(bundle: Path, method: Method) -> None:
    old = read_bundle(bundle).vocabulary_features()
    add_classes(bundle, {name: (name,) for name in NEW})
    after = read_bundle(bundle)
    assert after.vocabulary.names == NAMES + NEW
    new = after.vocabulary_features()
    assert new.features[: len(NAMES)].tobytes() == old.features.tobytes()
    assert new.logit_scale == old.logit_scale
    np.testing.assert_allclose(new.features[len(NAMES) :], expected_features(method, NEW), atol=1e-5, rtol=0)
    assert np.abs(new.features[-1] - new.features[-2]).max() > 1e-3, "the features of different names must differ"


def test_what_does_not_depend_on_the_vocabulary_is_kept(one: Path) -> None:
    before = read_bundle(one)
    change = add_classes(one, {name: (name,) for name in NEW})
    after = read_bundle(one)
    changed = {"vocabulary.safetensors", "labels.txt", "golden/golden.safetensors", "verification.json"}
    assert before.files.keys() == after.files.keys()
    assert before.files.keys() - same_files(before, after) == changed
    assert (change.bundle.digest, change.bundle.files) == (after.digest, after.files)
    assert after.digest != before.digest
    assert (one / "labels.txt").read_text(encoding="utf-8").splitlines() == list(NAMES + NEW)
    assert {path.name for path in one.parent.iterdir()} == {"bundle"}, "nothing is left beside it"
    assert len({path.stat().st_mode for path in one.rglob("*") if path.is_file()}) == 1


def test_golden_answers_are_those_of_the_new_vocabulary(bundle: Path, method: Method) -> None:
    before = read_bundle(bundle).golden()
    add_classes(bundle, {name: (name,) for name in NEW})
    opened = read_bundle(bundle)
    golden = opened.golden()
    with torch.no_grad():
        logits = method.classifier(NAMES + NEW)(torch.from_numpy(golden.embedding))
        scores, indices = torch.softmax(logits, dim=1).sort(dim=1, descending=True, stable=True)
    np.testing.assert_allclose(golden.scores, scores[:, :5].numpy(), atol=1e-5)
    np.testing.assert_array_equal(golden.indices[:, 0], indices[:, 0].numpy())
    assert golden.embedding.tobytes() == before.embedding.tobytes()
    assert golden.pixels.tobytes() == before.pixels.tobytes()
    assert verify_bundle(opened)


def test_verification_says_what_was_recomputed_and_checked(one: Path) -> None:
    digest, before = read_bundle(one).digest, read_bundle(one).verification()
    add_classes(one, {"one more": ("one more",)})
    remove_classes(one, ["red star"])
    content = read_bundle(one).verification()
    assert content["passed"] is True
    assert content["comparisons"] == before["comparisons"]
    add, remove = content["vocabulary_changes"]
    assert (add["verb"], add["classes_before"], add["classes_after"]) == ("add", 5, 6)
    assert add["from_digest"] == digest
    assert add["check"]["count"] == 5
    assert add["check"]["max_abs"] <= 1e-5
    assert (remove["verb"], remove["classes_after"]) == ("remove", 5)


def test_a_new_bundle_leaves_the_old_one_and_shares_its_encoders(one: Path, tmp_path: Path) -> None:
    before = read_bundle(one)
    out = tmp_path / "other"
    assert run("add", one, "--name", "violet whale", "--out", out) == 0
    assert read_bundle(one).digest == before.digest
    assert read_bundle(out).vocabulary.names == (*NAMES, "violet whale")
    assert (out / "image_encoder.onnx").samefile(one / "image_encoder.onnx")
    shutil.rmtree(one)
    assert verify_bundle(read_bundle(out))


def test_unknown_keys_of_the_manifest_are_kept(one: Path) -> None:
    content = json.loads((one / "manifest.json").read_text())
    write_manifest_content(one, {**content, "from_a_later_version": [1, 2]})
    add_classes(one, {"violet whale": ("violet whale",)})
    assert json.loads((one / "manifest.json").read_text())["from_a_later_version"] == [1, 2]


def test_names_of_a_file_and_json(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("# ours\nviolet whale\n\n  blue whale \n", encoding="utf-8")
    assert run("add", one, "--name", "first", "--from", tmp_path / "names.txt", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["names"] == ["first", "violet whale", "blue whale"]
    assert content["digest"] == read_bundle(one).digest
    assert read_bundle(one).vocabulary.names[len(NAMES) :] == ("first", "violet whale", "blue whale")


def test_a_class_of_several_words_is_their_mean(one: Path, clip: Clip, tmp_path: Path) -> None:
    words = {"whale": ["whale", "sea giant"], "plain": ["plain"]}
    (tmp_path / "more.json").write_text(json.dumps({"classes": words}))
    assert run("add", one, "--from", tmp_path / "more.json") == 0
    opened = read_bundle(one)
    each = expected_features(method_of(clip, "zero-shot"), ("whale", "sea giant", "plain"))
    mean = each[:2].mean(axis=0)
    features = opened.vocabulary_features().features
    np.testing.assert_allclose(features[-2], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(features[-1], each[2], atol=1e-5)
    assert opened.vocabulary.synonyms[-2:] == (("whale", "sea giant"), ("plain",))
    assert run("add", one, "--name", "sea giant") == 2, "a word of another class"
    assert run("remove", one, "--name", "whale") == 0
    assert read_bundle(one).vocabulary.synonyms == ()


def test_words_that_the_encoder_cannot_tell_apart_are_said(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("add", one, "--name", "Red  Star", "--name", "x_y", "--name", "x y", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["same_to_the_encoder"] == [["red star", "Red  Star"], ["x_y", "x y"]]
    assert "the text encoder cannot tell 'x_y' from 'x y'" in captured.err


# Refusals


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["add", "{bundle}"], ["no class names given"]),
        (["add", "{bundle}", "--from", "{absent}"], ["no such file"]),
        (["add", "{absent}", "--name", "x"], ["no bundle there"]),
        (["add", "{bundle}", "--name", "x", "--out", "{foreign}"], ["exists and is no bundle"]),
        (
            ["add", "{bundle}", *(part for name in ("a", "b", "a", "c", "b") for part in ("--name", name))],
            ["2 names are given more than once: 'a', 'b'"],
        ),
        (
            ["add", "{bundle}", "--name", "tree", "--name", "new", "--name", "red star"],
            ["2 names are in the bundle already: 'tree', 'red star'"],
        ),
        (
            ["add", "{bundle}", "--name", "long " * 16, "--name", "one\x85two", "--name", " "],
            [f"{'long ' * 16!r}", "'one\\x85two'", "' '", "3 names are not one line"],
        ),
        (
            ["add", "{bundle}", "--name", "an " * 30 + "x", "--name", "new", "--name", "on " * 20 + "y"],
            ["2 names are too long for the text encoder, with up to 38 tokens where it takes 20", "an x'", "on y'"],
        ),
        (
            [
                "add",
                "{bundle}",
                "--name",
                "x<start&#95;of&#95;text>",
                "--name",
                "<END&#95;OF&lowbar;TEXT>",
                "--name",
                "z",
            ],
            ["2 names hold CLIP's start or end token: 'x<start&#95;of&#95;text>', '<END&#95;OF&lowbar;TEXT>'"],
        ),
        (
            ["remove", "{bundle}", "--name", "red stat", "--name", "zebra", "--name", "tree"],
            ["2 names are not in the bundle: 'red stat' (did you mean 'red star'?), 'zebra': see clipship vocab list"],
        ),
        (
            ["remove", "{bundle}", *(part for name in NAMES for part in ("--name", name))],
            ["all 5 classes would go: a bundle needs at least one"],
        ),
        (["rename", "{bundle}", "--name", "treee", "bush"], ["'treee' (did you mean 'tree'?)"]),
        (["rename", "{bundle}", "--name", "tree", "red star"], ["1 name is in the bundle already: 'red star'"]),
        (["rename", "{bundle}", "--name", "tree", "a", "--name", "tree", "b"], ["'tree': renamed more than once"]),
        (["rename", "{bundle}", "--name", "tree", "a", "--name", "red star", "a"], ["'a': a new name more than once"]),
        (["rename", "{bundle}", "--name", "tree", "very " * 20 + "tall"], ["1 name is too long"]),
        (["list", "{absent}"], ["no bundle there"]),
        (["diff", "{bundle}", "{absent}"], ["no bundle there"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    arguments: list[str], messages: list[str], one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = read_bundle(one).digest
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("irreplaceable")
    places = {"bundle": one, "absent": tmp_path / "absent", "foreign": tmp_path / "foreign"}
    assert run(*(argument.format(**places) if argument[0] == "{" else argument for argument in arguments)) == 2
    line = error_of(capsys)
    assert all(message in line for message in messages), line
    assert read_bundle(one).digest == digest
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "foreign"}


def test_a_bundle_of_an_older_version_is_told_so(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one / "tokenizer.json").unlink()
    write_manifest_content(one, json.loads((one / "manifest.json").read_text()))
    assert run("add", one, "--name", "new") == 2
    assert "it has no tokenizer.json, because an older version packed it: pack the checkpoint again" in error_of(capsys)
    assert run("remove", one, "--name", "tree") == 0, "what encodes nothing needs no tokenizer"


def test_features_that_the_text_encoder_does_not_give_are_a_failed_check(
    one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sabotage: one value of one kept class, off by a little more than the tolerance."""

    def changed(classifier: VocabularyFeatures) -> VocabularyFeatures:
        features = classifier.features.copy()
        features[3, 5] += 2e-5
        return VocabularyFeatures(features=features, logit_scale=classifier.logit_scale)

    digest = read_bundle(classifier_replaced(one, changed)).digest
    assert run("add", one, "--name", "new") == 1
    assert "differ by 2.0e-05 from the bundle's (at most 1e-05)" in error_of(capsys)
    assert read_bundle(one).digest == digest


def test_a_sabotaged_tokenizer_is_a_failed_check(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = one / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "merges": content["merges"][:1000]}))
    write_manifest_content(one, json.loads((one / "manifest.json").read_text()))
    assert run("add", one, "--name", "new") == 1
    assert "from the bundle's" in error_of(capsys)


# Removing and renaming


def test_removed_classes_leave_the_others_bit_for_bit(one: Path) -> None:
    before = read_bundle(one).vocabulary_features().features
    assert run("remove", one, "--name", "blue_ring", "--name", "tree") == 0
    after = read_bundle(one)
    assert after.vocabulary.names == ("red star", "green fish", "Straße")
    assert after.vocabulary_features().features.tobytes() == before[[0, 2, 3]].tobytes()
    assert after.golden().scores.shape[1] == 3


def test_a_renamed_class_has_the_new_names_features_at_its_place(one: Path, clip: Clip) -> None:
    before = read_bundle(one).vocabulary_features().features
    assert run("rename", one, "--name", "Straße", "Road", "--name", "red star", "sun") == 0
    after = read_bundle(one)
    assert after.vocabulary.names == ("sun", "blue_ring", "green fish", "Road", "tree")
    features = after.vocabulary_features().features
    assert features[[1, 2, 4]].tobytes() == before[[1, 2, 4]].tobytes()
    expected = expected_features(method_of(clip, "zero-shot"), ("sun", "Road"))
    np.testing.assert_allclose(features[[0, 3]], expected, atol=1e-5)
    assert np.abs(features[[0, 3]] - before[[0, 3]]).max() > 1e-3


def test_two_classes_can_swap_names_and_all_can_get_new_ones(one: Path) -> None:
    before = read_bundle(one).vocabulary_features().features
    assert run("rename", one, "--name", "tree", "red star", "--name", "red star", "tree") == 0
    swapped = read_bundle(one)
    assert swapped.vocabulary.names == ("tree", "blue_ring", "green fish", "Straße", "red star")
    np.testing.assert_allclose(swapped.vocabulary_features().features[[4, 0]], before[[0, 4]], atol=1e-5)
    pairs = [part for name in swapped.vocabulary.names for part in ("--name", name, f"{name} two")]
    assert run("rename", one, *pairs) == 0
    assert read_bundle(one).vocabulary.names == tuple(f"{name} two" for name in swapped.vocabulary.names)


def test_a_class_with_words_of_its_own_keeps_them_under_another_name(one: Path, tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(json.dumps({"classes": {"whale": ["whale", "sea giant"]}}))
    assert run("add", one, "--from", tmp_path / "more.json") == 0
    before = read_bundle(one).vocabulary_features().features
    assert run("rename", one, "--name", "whale", "mammal") == 0
    after = read_bundle(one)
    assert (after.vocabulary.names[-1], after.vocabulary.synonyms[-1]) == ("mammal", ("whale", "sea giant"))
    assert after.vocabulary_features().features.tobytes() == before.tobytes()


# Classifiers that are more than class features


def test_a_cache_stays_with_the_classes_it_has(one: Path) -> None:
    cached = classifier_replaced(one, with_cache)
    before = read_bundle(cached).vocabulary_features()
    assert run("add", cached, "--name", "new") == 0
    added = read_bundle(cached).vocabulary_features()
    assert before.cache is not None
    assert added.cache is not None
    assert added.cache.keys.tobytes() == before.cache.keys.tobytes()
    assert added.cache.labels.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert run("rename", cached, "--name", "tree", "bush") == 0
    assert run("remove", cached, "--name", "green fish", "--name", "red star") == 0
    opened = read_bundle(cached)
    left = opened.vocabulary_features()
    assert opened.vocabulary.names == ("blue_ring", "Straße", "bush", "new")
    assert left.cache is not None
    assert left.cache.keys.tobytes() == before.cache.keys[[2, 5, 6]].tobytes()
    assert left.cache.labels.tolist() == [0, 1, 2]
    assert (left.cache.alpha, left.cache.beta) == (2.0, 5.5)
    golden = opened.golden()
    votes = 2.0 * np.exp(-5.5 * (1 - golden.embedding @ before.cache.keys[[2, 5, 6]].T))
    logits = left.logit_scale * golden.embedding @ left.features.T
    logits[:, :3] += votes
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(golden.scores, -np.sort(-scores, axis=1), rtol=1e-3)


def test_a_linear_probe_knows_its_classes_only(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = classifier_replaced(one, as_linear_probe)
    before = read_bundle(probe).vocabulary_features()
    assert run("add", probe, "--name", "new") == 2
    assert "a linear probe knows the classes it was trained on only" in error_of(capsys)
    assert run("rename", probe, "--name", "tree", "bush") == 0
    assert run("remove", probe, "--name", "red star") == 0
    after = read_bundle(probe)
    assert after.vocabulary.names == ("blue_ring", "green fish", "Straße", "bush")
    left = after.vocabulary_features()
    assert left.features.tobytes() == before.features[1:].tobytes()
    assert before.bias is not None
    assert left.bias is not None
    assert left.bias.tobytes() == before.bias[1:].tobytes()


def test_tensors_of_a_later_version(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = classifier_replaced(one, lambda classifier: classifier, thresholds=np.arange(5, dtype=np.float32))
    for verb in ("add", "remove"):
        assert run(verb, later, "--name", "tree") == 2
        assert "has thresholds, which this version" in error_of(capsys)
    assert run("rename", later, "--name", "tree", "bush") == 0, "every class keeps its place"
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(later / "vocabulary.safetensors")["thresholds"], np.arange(5))


# Kills, full disks, two at once


def names_in(path: Path, count: int) -> Path:
    path.write_text("".join(f"kind {number}\n" for number in range(count)))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "clipship", "vocab", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(sys.path)}


def test_a_killed_run_goes_on_with_what_it_has_encoded(one: Path, tmp_path: Path) -> None:
    """The kept chunk is replaced with marked features: they must turn up, so it was not encoded again."""
    before = read_bundle(one)
    add = command("add", one, "--from", names_in(tmp_path / "names.txt", 800), "--batch-size", "1")
    work: list[Path] = []
    with subprocess.Popen(add, env=ENVIRONMENT) as process:
        while not (work := sorted(tmp_path.glob(".bundle.words-*/*.npy"))):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert read_bundle(one).digest == before.digest
    marked = np.load(work[0])
    marked[:] = np.eye(marked.shape[1], dtype=np.float32)[7]
    np.save(work[0], marked)
    subprocess.run(add, env=ENVIRONMENT, check=True, capture_output=True)
    after = read_bundle(one).vocabulary_features().features[len(NAMES) :]
    assert after.shape == (800, 32)
    assert (after[:256] == marked).all(axis=1).sum() == 256
    assert not (after[256:] == marked[0]).all(axis=1).any()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "names.txt"}


def test_the_chunks_of_another_text_encoder_are_not_taken(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encode.WordEncoder(bundle=read_bundle(one))
    write_manifest_content(one, json.loads((one / "manifest.json").read_text()) | {"base_model": "another"})
    assert encode.WordEncoder(bundle=read_bundle(one)).key == encoder.key
    content = json.loads((one / "manifest.json").read_text())
    content["vocabulary"]["templates"] = ["one {}"]
    content["vocabulary_digest"] = ""
    write_manifest_content(one, content)
    assert encode.WordEncoder(bundle=read_bundle(one)).key != encoder.key
    with (one / "text_encoder.onnx").open("ab") as handle:
        handle.write(b" ")
    other = encode.WordEncoder(bundle=read_bundle(_sealed(one, content)))
    assert len({other.key, encoder.key}) == 2


def _sealed(path: Path, content: dict[str, Any]) -> Path:
    write_manifest_content(path, content)
    return path


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.6, 0.9, 1.2])
def test_a_kill_at_any_time_leaves_a_whole_bundle(delay_s: float, one: Path, tmp_path: Path) -> None:
    before = read_bundle(one)
    add = command("add", one, "--from", names_in(tmp_path / "names.txt", 300))
    with subprocess.Popen(add, env=ENVIRONMENT) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
    left = read_bundle(one)
    assert left.digest == before.digest or len(left.vocabulary) == 305
    assert run("add", one, "--name", "one more") == 0
    beside = {path.name for path in tmp_path.iterdir()}
    assert beside == {"bundle", "names.txt"}


def test_a_full_disk_leaves_the_old_bundle_and_the_chunks(
    one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = read_bundle(one).digest

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "vocabulary.safetensors")

    monkeypatch.setattr(edit, "write_manifest_content", full)
    assert run("add", one, "--name", "new") == 1
    assert "no space left" in error_of(capsys)
    assert read_bundle(one).digest == digest
    assert len(list(one.parent.glob(".bundle.words-*/*.npy"))) == 1
    monkeypatch.undo()
    assert run("add", one, "--name", "new") == 0
    assert {path.name for path in one.parent.iterdir()} == {"bundle"}


def test_two_at_once_are_refused(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    descriptor = os.open(one, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run("add", one, "--name", "new") == 2
    assert "another clipship vocab is editing it" in error_of(capsys)
    os.close(descriptor)
    assert run("add", one, "--name", "new") == 0


def test_a_link_to_a_bundle_stays_a_link(one: Path) -> None:
    link = one.parent / "link"
    link.symlink_to(one)
    assert run("add", link, "--name", "new") == 0
    assert link.is_symlink()
    assert read_bundle(one).vocabulary.names[-1] == "new"


def test_another_file_system_gets_copies(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert run("remove", one, "--name", "tree", "--out", tmp_path / "copy") == 0
    assert verify_bundle(read_bundle(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "image_encoder.onnx").samefile(one / "image_encoder.onnx")


# Without PyTorch


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        (["list", "{bundle}"], ""),
        (["add", "{bundle}", "--name", "new"], "vocab"),
        (["remove", "{bundle}", "--name", "tree"], ""),
        (["rename", "{bundle}", "--name", "tree", "bush"], "vocab"),
        (["diff", "{bundle}", "{bundle}"], ""),
    ],
)
def test_no_verb_imports_pytorch(arguments: list[str], needs: str, one: Path) -> None:
    """Packages that are None in sys.modules cannot be imported: as if they were not installed."""
    absent = ["torch", "torchvision", "open_clip", "onnx", "onnxscript", "tritonclient"]
    absent += [] if needs else ["onnxruntime", "ftfy", "regex"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}));"
        f"from clipship.core.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    given = [argument.format(bundle=one) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", script, "vocab", *given], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("package", ["onnxruntime", "ftfy", "regex"])
def test_a_missing_package_names_the_extra_without_pytorch(package: str, one: Path) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from clipship.core.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    given = ["vocab", "add", str(one), "--name", "new"]
    done = subprocess.run([sys.executable, "-c", script, *given], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"clipship: {package} is not installed: run pip install 'clipship[vocab]'\n"
