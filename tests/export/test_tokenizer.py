"""The tokenizer against open_clip's own, on 10,000 strings of every kind that a name could be."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipship.core.errors import BundleError, DataError
from clipship.export.tokenizer import Tokenizer, read_tokenizer, tokenizer_from_open_clip

COUNT = 10_000

SCRIPTS = {
    "latin": (0x20, 0x24F),
    "greek and cyrillic": (0x370, 0x52F),
    "hebrew and arabic": (0x590, 0x6FF),
    "indic": (0x900, 0xD7F),
    "thai and tibetan": (0xE00, 0xFFF),
    "hangul": (0xAC00, 0xD7A3),
    "kana": (0x3040, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "signs": (0x2000, 0x2BFF),
    "full width": (0xFF00, 0xFFEF),
    "mathematical letters": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "han of the second plane": (0x20000, 0x2A6DF),
    "combining": (0x300, 0x36F),
    "controls": (0x0, 0xA0),
    "everything": (0x0, 0x10FFFF),
}
ENTITIES = (
    "&amp;",
    "&lt;b&gt;",
    "&#233;",
    "&#x1F600;",
    "&amp;amp;",
    "&nbsp;",
    "&eacute",
    "&notanentity;",
    "&#0;",
    "&#xD800;",
)
SPECIAL = (
    "<start_of_text>",
    "<end_of_text>",
    "<START_OF_TEXT>",
    "<\u017ftart_of_text>",
    "<end_of_text",
    "</w>",
    "w</w>",
)
JOINERS = ("\u200b", "\u200d", "\u200e", "\u202e", "\ufeff", "\u00ad", "\ufe0f", "\u2028", "\x85", "\x1c", "\t", "\r\n")
CONTRACTIONS = ("'s", "'T", "'RE", "’ve", "'\u017f", "'ll", "'d'd", "''")
MISREAD = (
    "Ã©tÃ©",
    "schÃ¶n",
    "â€œquoteâ€\x9d",
    "ï¬\x81n",
    "\x1b[31mred\x1b[0m",
    "ﬁsh",
    "１２３",
    "İstanbul",
    "ΣΑΣ",
    "ẞ",
)


def _characters(rng: random.Random, kind: str) -> str:
    first, last = SCRIPTS[kind]
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))


def _mixed_case(rng: random.Random, word: str) -> str:
    return "".join(letter.upper() if rng.random() < 0.4 else letter for letter in word)


def _number(rng: random.Random) -> str:
    return rng.choice(("{:,}", "{}", "#{}", "{}-a", "v{}.0", "½{}")).format(rng.randint(0, 10**6))


def strings(count: int) -> list[str]:
    """Seeded strings: scripts, entities, joiners, special tokens, text that was decoded wrongly, and class names."""
    from open_clip import IMAGENET_CLASSNAMES

    rng = random.Random(20)
    pieces: list[Callable[[], str]] = [
        lambda: _characters(rng, rng.choice(list(SCRIPTS))),
        lambda: rng.choice(ENTITIES),
        lambda: rng.choice(JOINERS),
        lambda: rng.choice(SPECIAL),
        lambda: rng.choice(CONTRACTIONS),
        lambda: rng.choice(MISREAD),
        lambda: _number(rng),
        lambda: _mixed_case(rng, rng.choice(IMAGENET_CLASSNAMES)),
        lambda: unicodedata.normalize(rng.choice(("NFD", "NFKC")), _characters(rng, "latin")),
        lambda: "".join(rng.choices("-_.,:;!?()[]{}/\\|@*+=~^`\"'% ", k=5)),
    ]
    made = ["", " ", "\x00", *IMAGENET_CLASSNAMES]
    while len(made) < count:
        made.append(rng.choice(("", " ", "_")).join(rng.choice(pieces)() for _ in range(rng.randint(1, 6))))
    return made


@pytest.fixture(scope="module", params=["lower", "whitespace", "canonicalize"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """open_clip's tokenizer, and ours taken from it."""
    from open_clip import SimpleTokenizer

    theirs = SimpleTokenizer(clean=request.param, additional_special_tokens=["<mask>"])
    return theirs, tokenizer_from_open_clip(theirs)


def test_10_000_strings_become_what_open_clip_makes_of_them(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    texts = strings(COUNT)
    assert len(set(texts)) > 0.9 * COUNT
    assert len({character for text in texts for character in text}) > 5_000
    wrong = [text for text in texts if ours.ids(text) != theirs.encode(text)]
    assert wrong == []


def test_rows_are_open_clips(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    texts = [text for text in strings(2_000) if len(theirs.encode(text)) <= 30]
    assert len(texts) > 1_000
    np.testing.assert_array_equal(ours.tokens(texts, 32), theirs(texts, context_length=32).numpy())
    assert (ours.start_id, ours.end_id) == (theirs.sot_token_id, theirs.eot_token_id)


def test_a_prompt_that_fills_the_context_fits_and_one_more_token_does_not(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    np.testing.assert_array_equal(ours.tokens(["red " * 8], 10), theirs(["red " * 8], context_length=10).numpy())
    with pytest.raises(DataError, match="has 11 tokens, the text encoder takes 10"):
        ours.tokens(["red " * 9], 10)


def test_a_file_gives_it_back(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    pair[1].write(tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path / "tokenizer.json") == pair[1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "other", "format 'other'"),
        ("clean", "upper", "clean 'upper'"),
        ("merges", ["a b c"], "not a tokenizer"),
        ("merges", [1], "not a tokenizer"),
        ("special_tokens", ["<start_of_text>"], "1 special tokens"),
    ],
)
def test_a_damaged_file_is_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(merges=(("a", "b"),)).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(BundleError, match=message):
        read_tokenizer(path)


@pytest.mark.parametrize("package", ["ftfy", "regex"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from clipship.core.errors import MissingExtraError\n"
        "from clipship.export.tokenizer import Tokenizer\n"
        "try:\n    Tokenizer(merges=()).ids('red')\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert run.stdout == f"{package} is not installed: run pip install 'clipship[vocab]'\n", run.stderr
