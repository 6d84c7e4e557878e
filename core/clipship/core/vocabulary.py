"""The ordered class names a classifier chooses from, and the prompts they are put into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.files import sha256_of_text

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ordered, distinct class names, and the templates of their prompts (``{}`` stands for the name).

    A class may be known by several words, its name among them or not: its features are then the mean over its words.

    Raises:
        DataError: no names, an empty, repeated or multi-line name or word, a class without words, or a template without
            exactly one ``{}``.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    synonyms: tuple[tuple[str, ...], ...] = ()
    """By class its words; empty: every class has its own name only."""

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError("the vocabulary has no class names: give at least one, one a line")
        _validate_lines("class name", self.names)
        if self.synonyms:
            self._validate_synonyms()
        for template in self.templates:
            if template.count("{}") != 1:
                raise DataError(f"template {template!r} must hold {{}} exactly once, where the class name goes")

    def _validate_synonyms(self) -> None:
        if len(self.synonyms) != len(self.names):
            raise DataError(f"words for {len(self.synonyms)} of {len(self.names)} classes: give them for every class")
        for name, words in zip(self.names, self.synonyms, strict=True):
            if not words:
                raise DataError(f"class {name!r} has no words: give at least one, such as its name")
        _validate_lines("word", self.words)
        if all(words == (name,) for name, words in zip(self.names, self.synonyms, strict=True)):
            object.__setattr__(self, "synonyms", ())  # the plain vocabulary of these names, with its digest

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def digest(self) -> str:
        """SHA-256 over names, templates and synonyms in order: equal digests mean equal classifiers of one encoder."""
        parts = [self.names, self.templates, *([self.synonyms] if self.synonyms else [])]
        return sha256_of_text(json.dumps(parts, ensure_ascii=False))

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all classes one after the other: the names, where there are no synonyms."""
        return tuple(word for words in self.classes.values() for word in words)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """By name the words of its class: the name itself, where there are no synonyms."""
        return dict(zip(self.names, self.synonyms or [(name,) for name in self.names], strict=True))

    @classmethod
    def from_classes(cls, classes: Mapping[str, tuple[str, ...]], templates: tuple[str, ...]) -> Vocabulary:
        """The inverse of :attr:`classes`."""
        return cls(names=tuple(classes), templates=templates, synonyms=tuple(classes.values()))

    @property
    def word_rows(self) -> tuple[tuple[int, ...], ...]:
        """By class the places of its words in :attr:`words`."""
        return rows_of(self.classes.values())

    def prompts(self, template: str) -> list[str]:
        """One prompt a word, so one a class without synonyms; underscores become spaces, as in the CoOp code base."""
        return [prompt_of(word, template) for word in self.words]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with names, templates and, where there are any, the words of the classes that have others."""
        content: dict[str, Any] = {"names": list(self.names), "templates": list(self.templates)}
        words = {name: list(each) for name, each in self.classes.items() if each != (name,)}
        return {**content, **({"synonyms": words} if words else {})}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Vocabulary:
        """The inverse of :meth:`to_json`; ``{"classes": {"cat": ["cat", "kitten"]}}`` says names and words at once.

        Raises:
            DataError: a field is missing or of another type, or as the constructor.
        """
        try:
            templates = tuple(content.get("templates", DEFAULT_TEMPLATES))
            words = content.get("synonyms", {}) if "names" in content else content["classes"]
            names = tuple(content.get("names", words))
            return cls(names=names, templates=templates, synonyms=_synonyms_of(names, words))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a vocabulary: {error}: give {_FORMS}") from error


_FORMS = "{'names': [...], 'templates': [...]} or {'classes': {'cat': ['cat', 'kitten'], ...}}"


def rows_of(groups: Iterable[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """By group the places of its words, when all groups stand one after the other."""
    rows, first = [], 0
    for words in groups:
        rows.append(tuple(range(first, first + len(words))))
        first += len(words)
    return tuple(rows)


def _validate_lines(what: str, lines: Sequence[str]) -> None:
    seen: set[str] = set()
    for position, line in enumerate(lines, start=1):
        if not line.strip() or "\n" in line:
            raise DataError(f"{what} {position} is {line!r}: {what}s are one non-empty line each")
        if line in seen:
            raise DataError(f"{what} {line!r} occurs twice (again at {position}): remove one")
        seen.add(line)


def _synonyms_of(names: Sequence[str], words: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    known = set(names)
    for name, each in words.items():
        if name not in known or isinstance(each, str) or not all(isinstance(word, str) for word in each):
            raise DataError(f"words of {name!r} are {each!r}: give a list of words for a name of the vocabulary")
    return tuple(tuple(words.get(name, (name,))) for name in names) if words else ()


def prompt_of(name: str, template: str) -> str:
    """``template`` with ``name`` for ``{}``, underscores as spaces."""
    return template.replace("{}", name.replace("_", " "))


def vocabulary_from_file(path: Path) -> Vocabulary:
    """Read class names from a text file (one a line; blank lines and # comments are skipped) or a ``.json`` vocabulary.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON where its name says so, or as :class:`Vocabulary`.
    """
    if path.suffix != ".json":
        return Vocabulary(names=lines_from_file(path))
    try:
        return Vocabulary.from_json(json.loads(_text_of(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def lines_from_file(path: Path) -> tuple[str, ...]:
    """The names of a text file as they stand, one a line, repeated ones too; blank lines and # comments are skipped.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    lines = (line.strip() for line in _text_of(path).splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file: give a text file with one class name a line") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{path}: not a UTF-8 text file: give one class name a line, or a JSON vocabulary") from error
