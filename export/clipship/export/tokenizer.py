"""CLIP's byte-pair tokenizer without PyTorch: class names to the token ids that ``text_encoder.onnx`` takes.

The rules are those of open_clip's ``SimpleTokenizer`` (after the GPT-2 tokenizer; Sennrich et al., arXiv 1508.07909):
repair the text (ftfy), resolve HTML entities twice, clean it, cut it into words, numbers and signs, and merge the
bytes of each piece by rank. open_clip itself cannot be used: importing it imports PyTorch. The `tokenizers` package
could merge, but neither repairs nor cleans, and merging is the small part.

The merges travel in the bundle (``tokenizer.json``), not in this package: a bundle made from another merges file,
or cleaned by another rule, stays right under every later version of this package, and what a class name turns into is
covered by the bundle's digest like everything else about it.

Shape legend: C prompts, L tokens.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import BundleError, DataError, MissingExtraError
from clipship.core.files import read_record, write_json_atomic

FORMAT = "clipship-tokenizer"
FORMAT_VERSION = 1

Clean = Literal["lower", "whitespace", "canonicalize"]
"""What follows the repair: white space and lower case (CLIP's own), white space only, or also without punctuation."""

_WORD_END = "</w>"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _with_single_spaces(text: str) -> str:
    return " ".join(text.split())


_CLEANERS: Mapping[Clean, Callable[[str], str]] = {
    "lower": lambda text: _with_single_spaces(text).lower(),
    "whitespace": _with_single_spaces,
    "canonicalize": lambda text: _with_single_spaces(text.replace("_", " ").translate(_NO_PUNCTUATION).lower()),
}


@cache
def _characters_of_bytes() -> dict[int, str]:
    """A printable character for each byte, in the order in which the tokenizer numbers them.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids; equal to the open_clip tokenizer it was taken from on any text."""

    merges: tuple[tuple[str, str], ...]
    """Pairs of symbols that become one, the most frequent first."""
    clean: Clean = "lower"
    special_tokens: tuple[str, ...] = ("<start_of_text>", "<end_of_text>")
    """Start, end, and others."""

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The number of every symbol: bytes, bytes that end a word, merges, special tokens."""
        singles = list(_characters_of_bytes().values())
        merged = ["".join(pair) for pair in self.merges]
        symbols = [*singles, *(one + _WORD_END for one in singles), *merged, *self.special_tokens]
        return {symbol: number for number, symbol in enumerate(symbols)}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def _piece_ids(self) -> dict[str, tuple[int, ...]]:
        """What each piece of text became, so that a word is merged once."""
        return {token: (self._ids[token],) for token in self.special_tokens}

    @cached_property
    def _find_pieces(self) -> Callable[[str], list[str]]:
        try:
            import regex
        except ImportError as error:
            raise MissingExtraError("regex", "vocab") from error
        find: Callable[[str], list[str]] = regex.compile(
            f"{'|'.join(self.special_tokens)}|{_PIECES}", regex.IGNORECASE
        ).findall
        return find

    @property
    def start_id(self) -> int:
        """The first token of every row."""
        return self._ids[self.special_tokens[0]]

    @property
    def end_id(self) -> int:
        """The last token of every row; the text tower reads its feature there."""
        return self._ids[self.special_tokens[1]]

    def ids(self, text: str) -> list[int]:
        """The token ids of ``text`` without start, end and padding.

        Raises:
            MissingExtraError: ftfy or regex is not installed.
        """
        try:
            import ftfy
        except ImportError as error:
            raise MissingExtraError("ftfy", "vocab") from error
        repaired = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        pieces = self._find_pieces(_CLEANERS[self.clean](repaired))
        return [number for piece in pieces for number in self._ids_of_piece(piece)]

    def _ids_of_piece(self, piece: str) -> tuple[int, ...]:
        if piece not in self._piece_ids:
            characters = [_characters_of_bytes()[byte] for byte in piece.encode()]
            self._piece_ids[piece] = tuple(self._ids[symbol] for symbol in self._merged(characters))
        return self._piece_ids[piece]

    def _merged(self, characters: list[str]) -> list[str]:
        """Merge the pair of the lowest rank, everywhere from the left, until no known pair is left."""
        word = [*characters[:-1], characters[-1] + _WORD_END]
        while known := [pair for pair in pairwise(word) if pair in self._ranks]:
            pair = min(known, key=self._ranks.__getitem__)
            word = _with_pair_joined(word, pair)
        return word

    def tokens(self, prompts: Sequence[str], context_length: int) -> NDArray[np.int64]:
        """Token ids [C, L] with start, end and zeros behind it, as ``text_encoder.onnx`` takes them.

        Raises:
            DataError: a prompt does not fit into ``context_length`` (open_clip would silently cut it).
            MissingExtraError: as :meth:`ids`.
        """
        rows = np.zeros((len(prompts), context_length), np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = [self.start_id, *self.ids(prompt), self.end_id]
            if len(ids) > context_length:
                raise DataError(
                    f"prompt {prompt!r} has {len(ids)} tokens, the text encoder takes {context_length}: shorten it"
                )
            row[: len(ids)] = ids
        return rows

    def write(self, path: Path) -> None:
        """Write the JSON file that :func:`read_tokenizer` reads."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "clean": self.clean,
            "special_tokens": list(self.special_tokens),
            "merges": [" ".join(pair) for pair in self.merges],
        }
        write_json_atomic(path, content)


def _with_pair_joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    place = 0
    while place < len(word):
        width = 2 if tuple(word[place : place + 2]) == pair else 1
        joined.append("".join(word[place : place + width]))
        place += width
    return joined


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a bundle carries.

    Raises:
        BundleError: not a tokenizer file of this version, or malformed.
    """
    advice = "pack the bundle again"
    content = read_record(path, record_format=FORMAT, version=FORMAT_VERSION, error=BundleError, advice=advice)
    try:
        pairs = [tuple(merge.split(" ")) for merge in content["merges"]]
        clean, special = content["clean"], tuple(content["special_tokens"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: not a tokenizer ({error!r}): {advice}") from error
    if clean not in get_args(Clean) or len(special) < 2 or any(len(pair) != 2 for pair in pairs):
        raise BundleError(f"{path}: not a tokenizer (clean {clean!r}, {len(special)} special tokens): {advice}")
    return Tokenizer(merges=tuple(pairs), clean=clean, special_tokens=special)


def tokenizer_from_open_clip(given: Any) -> Tokenizer:
    """The rules and merges of open_clip's ``SimpleTokenizer``, which the caller has imported."""
    special = sorted(given.all_special_ids)
    return Tokenizer(
        merges=tuple(given.bpe_ranks),
        clean=given.clean_fn.__name__.removeprefix("_clean_"),
        special_tokens=tuple(given.decoder[number] for number in special),
    )
