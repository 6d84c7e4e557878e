"""The ordered class names a classifier chooses from, and the prompts they are put into."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.files import sha256_of_text

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ordered, distinct class names, and the templates of their prompts (``{}`` stands for the name).

    Raises:
        DataError: no names, an empty, repeated or multi-line name, or a template without exactly one ``{}``.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError("the vocabulary has no class names: give at least one, one a line")
        seen: set[str] = set()
        for position, name in enumerate(self.names, start=1):
            if not name.strip() or "\n" in name:
                raise DataError(f"class name {position} is {name!r}: names are one non-empty line each")
            if name in seen:
                raise DataError(f"class name {name!r} occurs twice (again at {position}): remove one")
            seen.add(name)
        for template in self.templates:
            if template.count("{}") != 1:
                raise DataError(f"template {template!r} must hold {{}} exactly once, where the class name goes")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and templates in order: equal digests mean equal classifiers of one encoder."""
        return sha256_of_text(json.dumps([self.names, self.templates], ensure_ascii=False))

    def prompts(self, template: str) -> list[str]:
        """One prompt a class; underscores in names become spaces, as in the CoOp code base."""
        return [prompt_of(name, template) for name in self.names]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with names and templates."""
        return {"names": list(self.names), "templates": list(self.templates)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Vocabulary:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: a field is missing, or as the constructor.
        """
        try:
            return cls(names=tuple(content["names"]), templates=tuple(content.get("templates", DEFAULT_TEMPLATES)))
        except (KeyError, TypeError) as error:
            raise DataError(f"not a vocabulary: {error}: give {{'names': [...], 'templates': [...]}}") from error


def prompt_of(name: str, template: str) -> str:
    """``template`` with ``name`` in the place of ``{}``, underscores as spaces."""
    return template.replace("{}", name.replace("_", " "))


def vocabulary_from_file(path: Path, templates: Sequence[str] = DEFAULT_TEMPLATES) -> Vocabulary:
    """Read class names from a text file (one a line; blank lines and # comments are skipped) or a ``.json`` vocabulary.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON where its name says so, or as :class:`Vocabulary`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file: give a text file with one class name a line") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{path}: not a UTF-8 text file: give one class name a line, or a JSON vocabulary") from error
    if path.suffix == ".json":
        try:
            return Vocabulary.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON ({error})") from error
    lines = (line.strip() for line in text.splitlines())
    names = tuple(line for line in lines if line and not line.startswith("#"))
    return Vocabulary(names=names, templates=tuple(templates))
