"""Class names, prompts and digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipship.core.errors import DataError
from clipship.core.vocabulary import Vocabulary, vocabulary_from_file


def test_prompts_replace_underscores() -> None:
    vocabulary = Vocabulary(names=("ice_skating_rink", "Æther {x}"), templates=("a {} here.",))
    assert vocabulary.prompts("a {} here.") == ["a ice skating rink here.", "a Æther {x} here."]


def test_order_and_templates_change_the_digest() -> None:
    digests = {
        Vocabulary(names=("a", "b")).digest,
        Vocabulary(names=("b", "a")).digest,
        Vocabulary(names=("a", "b"), templates=("{}",)).digest,
    }
    assert len(digests) == 3


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("# animals\ncat\n\n  dog \n", encoding="utf-8")
    assert vocabulary_from_file(path).names == ("cat", "dog")


def test_json_round_trip(tmp_path: Path) -> None:
    vocabulary = Vocabulary(names=("cat", "straße"), templates=("a {}.", "{} texture."))
    (tmp_path / "v.json").write_text(json.dumps(vocabulary.to_json()), encoding="utf-8")
    assert vocabulary_from_file(tmp_path / "v.json") == vocabulary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no class names"),
        ("cat\ncat\n", "'cat' occurs twice"),
    ],
)
def test_bad_text_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        vocabulary_from_file(path)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        vocabulary_from_file(tmp_path / "absent.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a UTF-8 text file"):
        vocabulary_from_file(tmp_path / "bytes.txt")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        vocabulary_from_file(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="not a vocabulary"):
        vocabulary_from_file(tmp_path / "list.json")
    with pytest.raises(DataError, match="exactly once"):
        Vocabulary(names=("a",), templates=("no place",))
    with pytest.raises(DataError, match="one non-empty line"):
        Vocabulary(names=(" ",))


def test_synonyms_share_a_label(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps({"classes": {"cat": ["cat", "kitten"], "犬": ["dog"], "cow": ["cow"]}}))
    vocabulary = vocabulary_from_file(tmp_path / "v.json")
    assert vocabulary.names == ("cat", "犬", "cow")
    assert vocabulary.words == ("cat", "kitten", "dog", "cow")
    assert vocabulary.word_rows == ((0, 1), (2,), (3,))
    assert vocabulary.prompts("a {}.") == ["a cat.", "a kitten.", "a dog.", "a cow."]
    assert vocabulary.to_json()["synonyms"] == {"cat": ["cat", "kitten"], "犬": ["dog"]}
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    assert vocabulary.digest != Vocabulary(names=vocabulary.names).digest


def test_a_class_known_by_its_name_only_is_plain() -> None:
    """So that digests stay what they were before there were synonyms."""
    vocabulary = Vocabulary.from_json({"classes": {"a": ["a"], "b": ["b"]}})
    assert vocabulary == Vocabulary(names=("a", "b"))
    assert vocabulary.digest == "2b816bae026adc77bcbb05d932fd9a56591a1876d1d9d8d91292a3da020661ac"
    assert "synonyms" not in vocabulary.to_json()
    assert vocabulary.word_rows == ((0,), (1,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"cat": []}}, "'cat' has no words"),
        ({"classes": {"cat": "kitten"}}, "words of 'cat' are 'kitten'"),
        ({"classes": {"cat": ["kitten", "kitten"]}}, "word 'kitten' occurs twice"),
        ({"classes": {"cat": ["pet"], "dog": ["pet"]}}, "word 'pet' occurs twice"),
        ({"classes": {"cat": [3]}}, "words of 'cat' are"),
        ({"classes": ["cat"]}, "not a vocabulary"),
        ({"names": ["cat"], "synonyms": {"dog": ["dog"]}}, "words of 'dog' are"),
        ({"templates": ["{}"]}, "not a vocabulary: 'classes'"),
    ],
)
def test_bad_synonyms(content: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary.from_json(content)
