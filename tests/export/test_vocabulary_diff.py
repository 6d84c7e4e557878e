"""``clipship vocab list`` and ``diff`` on bundles made of files only: what came, went, moved, how far features are."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipship.core.bundle import EncoderVariant, Manifest, read_bundle, write_manifest
from clipship.core.cli.main import main
from clipship.core.images.decoding import ImageSpec
from clipship.core.tensors import embedding_tensor, image_tensor, tokens_tensor
from clipship.core.vocabulary import Vocabulary
from clipship.export.vocab.diff import VocabularyDiff, _moved, vocabulary_diff

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def feature_of(name: str) -> Any:
    """A unit feature that depends on the name only."""
    feature = np.random.default_rng(list(name.encode())).standard_normal(4).astype(np.float32)
    return feature / np.linalg.norm(feature)


def bundle(path: Path, *names: str, text: bytes = b"text", noise: float = 0.0, **vocabulary: Any) -> Path:
    from safetensors.numpy import save

    features = np.stack([feature_of(name) for name in names])
    features[0, 0] += np.float32(noise)
    (path / "golden").mkdir(parents=True)
    (path / "image_encoder.onnx").write_bytes(b"image")
    (path / "text_encoder.onnx").write_bytes(text)
    (path / "vocabulary.safetensors").write_bytes(
        save({"features": features, "logit_scale": np.array([100.0], np.float32)})
    )
    (path / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (path / "golden" / "golden.safetensors").write_bytes(save({"embedding": features[:1]}))
    (path / "verification.json").write_text('{"passed": true, "comparisons": []}')
    manifest = Manifest(
        base_model="none",
        base_model_digest="0" * 64,
        method="zero-shot",
        image_spec=ImageSpec(size_px=8, mean=MEAN, std=STD),
        inputs_outputs={
            "image_encoder.onnx": (image_tensor(8), embedding_tensor(4)),
            "text_encoder.onnx": (tokens_tensor(9), embedding_tensor(4, "classes")),
        },
        embed_dim=4,
        vocabulary=Vocabulary(names=names, **vocabulary),
        provenance={},
        image_encoders=(EncoderVariant(file="image_encoder.onnx", precision="fp32", runtime="onnx", opset=18),),
    )
    write_manifest(path, manifest)
    return path


def diff_of(before: Path, after: Path) -> VocabularyDiff:
    return vocabulary_diff(read_bundle(before), read_bundle(after))


def test_equal_vocabularies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = bundle(tmp_path / "a", "x", "y"), bundle(tmp_path / "b", "x", "y")
    assert diff_of(first, second)
    assert main(["vocab", "diff", str(first), str(second), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["equal"] is True
    assert content["same"] == dict.fromkeys(
        ("image encoder", "text encoder", "base model", "templates", "logit scale"), True
    )
    assert content["features"]["max_abs"] == 0


def test_names_that_came_went_and_were_renamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bundle(tmp_path / "a", "ant", "bee", "cat", "dog", "eel", "fox")
    after = bundle(tmp_path / "b", "ant", "wasp", "cat", "eel", "fox", "gnu", "hen")
    found = diff_of(before, after)
    assert not found
    assert found.renamed == (("bee", "wasp"),)
    assert found.removed == ("dog",)
    assert found.added == ("gnu", "hen")
    assert found.moved == ()
    assert main(["vocab", "diff", str(before), str(after)]) == 0
    text = capsys.readouterr().out
    assert "6 -> 7 classes\nadded 2: 'gnu', 'hen'\nremoved 1: 'dog'\nrenamed 1: 'bee' -> 'wasp'\n" in text


def test_runs_of_other_lengths_are_no_renaming(tmp_path: Path) -> None:
    found = diff_of(bundle(tmp_path / "a", "x", "p", "q", "y"), bundle(tmp_path / "b", "x", "r", "y"))
    assert (found.renamed, found.removed, found.added) == ((), ("p", "q"), ("r",))


def test_nothing_shared(tmp_path: Path) -> None:
    found = diff_of(bundle(tmp_path / "a", "x", "y"), bundle(tmp_path / "b", "p", "q", "r"))
    assert (found.removed, found.added, found.distance) == (("x", "y"), ("p", "q", "r"), None)
    assert "none that can be compared" in str(found)


def test_moved_names_are_the_fewest(tmp_path: Path) -> None:
    found = diff_of(bundle(tmp_path / "a", *"abcdefg"), bundle(tmp_path / "b", *"gabcdef"))
    assert found.moved == ("g",)
    assert diff_of(bundle(tmp_path / "c", *"abc"), bundle(tmp_path / "d", *"bc")).moved == ()


def test_moved_against_every_order_of_six() -> None:
    """The rest keeps its order, and no smaller set would do: against all subsets."""
    for order in random.Random(1).sample(list(itertools.permutations(range(6))), 120):
        moved = _moved("abcdef", order)
        kept = [place for name, place in zip("abcdef", order, strict=True) if name not in moved]
        assert kept == sorted(kept)
        longest = max(
            size for size in range(1, 7) for part in itertools.combinations(order, size) if list(part) == sorted(part)
        )
        assert len(moved) == 6 - longest


def test_features_and_encoders_that_differ(tmp_path: Path) -> None:
    before = bundle(tmp_path / "a", "x", "y", "z")
    found = diff_of(before, bundle(tmp_path / "b", "x", "y", "z", text=b"other", noise=0.25))
    assert not found
    assert found.same["text encoder"] is False
    assert found.same["image encoder"] is True
    assert found.distance is not None
    assert found.distance.max_abs == pytest.approx(0.25)
    assert [name for name, _ in found.distance.farthest] == ["x"]
    moved = feature_of("x") + np.array([0.25, 0, 0, 0], np.float32)
    assert found.distance.min_cosine == pytest.approx(feature_of("x") @ moved / np.linalg.norm(moved))
    assert "text encoder: DIFFERENT" in str(found)


def test_other_words_and_templates(tmp_path: Path) -> None:
    before = bundle(tmp_path / "a", "x", "y", synonyms=(("x",), ("y", "why")))
    found = diff_of(before, bundle(tmp_path / "b", "x", "y", templates=("one {}", "two {}")))
    assert found.other_words == ("y",)
    assert found.same["templates"] is False


def test_a_long_list_is_shortened_for_people_only(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(50)]
    found = diff_of(bundle(tmp_path / "a", "x"), bundle(tmp_path / "b", "x", *names))
    assert "'n19' and 30 more (--json has all)" in str(found)
    assert found.to_json()["added"] == names


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path / "a", "ant", "bee", synonyms=(("ant",), ("bee", "honey bee")))
    assert main(["vocab", "list", str(path)]) == 0
    assert capsys.readouterr().out == "0  ant\n1  bee  (bee, honey bee)\n"
    assert main(["vocab", "list", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["digest"] == read_bundle(path).digest
    assert content["classes"][1] == {"place": 1, "name": "bee", "words": ["bee", "honey bee"]}
