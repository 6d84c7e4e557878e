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
