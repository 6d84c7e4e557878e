"""Validation of class names, all problems at once, and the names that a text encoder cannot tell apart."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from clipship.core.errors import DataError
from clipship.core.progress import progress
from clipship.core.vocabulary import Vocabulary, lines_from_file, prompt_of, vocabulary_from_file
from clipship.export.tokenizer import Tokenizer

_HINTS = 10
"""Unknown names that get a hint; comparing one with 100,000 names takes a second."""


def classes_from(names: Sequence[str], file: Path | None) -> dict[str, tuple[str, ...]]:
    """The words of each class of ``names`` and then of ``file``: lines of text, or a JSON vocabulary with synonyms.

    Raises:
        DataError: no names at all, repeated ones (all are named), or a file that cannot be read.
    """
    given: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in names]
    if file is not None and file.suffix == ".json":
        given += vocabulary_from_file(file).classes.items()
    elif file is not None:
        given += [(name, (name,)) for name in lines_from_file(file)]
    if not given:
        raise DataError("no class names given: give --name NAME, or --from FILE with one a line")
    repeated = [name for name, count in Counter(name for name, _ in given).items() if count > 1]
    if repeated:
        raise DataError(f"{_counted(repeated, 'is', 'are')} given more than once: {_listed(repeated)}: give each once")
    return dict(given)


def _counted(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} name {one}" if len(names) == 1 else f"{len(names)} names {many}"


def _listed(names: Iterable[str]) -> str:
    """Names in quotes, so that one with a comma or a space is seen as one."""
    return ", ".join(map(repr, names))


def validate_known_names(vocabulary: Vocabulary, names: Iterable[str]) -> None:
    """Validate that ``vocabulary`` has all ``names``.

    Raises:
        DataError: it lacks some; each with the names that are near it.
    """
    known = set(vocabulary.names)
    foreign = [name for name in names if name not in known]
    if foreign:
        hints = [_with_hint(name, vocabulary.names) for name in foreign[:_HINTS]] + [*map(repr, foreign[_HINTS:])]
        what = f"{_counted(foreign, 'is', 'are')} not in the bundle"
        raise DataError(f"{what}: {', '.join(hints)}: see clipship vocab list")


def _with_hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"{name!r} (did you mean {' or '.join(map(repr, close))}?)" if close else repr(name)


def validate_new_words(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> None:
    """Validate ``new`` classes (by name their words): new to ``old`` ones, and one line each.

    Raises:
        DataError: lists all that are not, with the reason.
    """
    old_words = {word for words in old.values() for word in words}
    taken = [name for name in new if name in old]
    taken += [word for words in new.values() for word in words if word in old_words]
    given = dict.fromkeys(word for name, words in new.items() for word in (name, *words))
    _refuse(
        ("is", "are", "in the bundle already", list(dict.fromkeys(taken))),
        ("is", "are", "not one line of UTF-8 text", [word for word in given if not _is_line(word)]),
    )


def _is_line(word: str) -> bool:
    """One line for every reader of labels.txt: Unicode has more line ends than \\n, and file names may hold no text."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return word.strip() == word and len(word.splitlines()) == 1


def _refuse(*reasons: tuple[str, str, str, Sequence[str]]) -> None:
    """Raise for each reason with names: its verb for one name and for many, the rest of the sentence, the names."""
    found = [f"{_counted(names, one, many)} {why}: {_listed(names)}" for one, many, why, names in reasons if names]
    if found:
        raise DataError(f"{'; '.join(found)}: nothing was changed, give the others without them")


def validate_word_lengths(
    words: Sequence[str], templates: Sequence[str], tokenizer: Tokenizer, context_length: int
) -> None:
    """Validate that the text encoder sees every word whole, in all templates.

    Raises:
        DataError: lists all words that are too long (open_clip would silently cut them), and all with a start or end
            token, which would end the prompt.
        MissingExtraError: as :meth:`Tokenizer.ids`.
    """
    too_long: dict[str, int] = {}
    special: list[str] = []
    with progress("check names", len(words)) as report:
        for number, word in enumerate(words, start=1):
            rows = [tokenizer.ids(prompt_of(word, template)) for template in templates]
            longest = max(map(len, rows)) + 2  # start and end
            if longest > context_length:
                too_long[word] = longest
            if any(tokenizer.start_id in row or tokenizer.end_id in row for row in rows):
                special.append(word)
            report(number)
    most = max(too_long.values(), default=0)
    long = f"too long for the text encoder, with up to {most} tokens where it takes {context_length}"
    _refuse(("is", "are", long, list(too_long)), ("holds", "hold", "CLIP's start or end token", special))


def twins(
    words: Sequence[str], among: Sequence[str], template: str, tokenizer: Tokenizer
) -> tuple[tuple[str, str], ...]:
    """Pairs of different words with the same tokens, one of ``words`` with one of ``among`` or of ``words``.

    The text encoder gives both the same feature, so their classes share an image's probability.
    """
    first: dict[tuple[int, ...], str] = {}
    found = []
    for word in dict.fromkeys((*among, *words)):
        other = first.setdefault(tuple(tokenizer.ids(prompt_of(word, template))), word)
        if other != word:
            found.append((other, word))
    asked = set(words)
    return tuple(pair for pair in found if asked & set(pair))
