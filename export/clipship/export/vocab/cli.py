"""``clipship vocab list|add|remove|rename|diff``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.bundle import read_bundle
from clipship.core.cli.main import VerbGroup, emit, json_option
from clipship.core.errors import DataError
from clipship.core.progress import log
from clipship.export.vocab.names import classes_from

if TYPE_CHECKING:
    from clipship.export.vocab.edit import Change

_PATH = click.Path(path_type=Path)
_bundle = click.argument("bundle", type=_PATH)
_names = click.option("--name", "names", multiple=True, metavar="NAME", help="A class name; may be repeated.")
_from = click.option(
    "--from", "file", type=_PATH, metavar="FILE", help="Class names, one a line, or a JSON vocabulary."
)
_out = click.option("--out", type=_PATH, help="A new bundle. [default: in place]")


@click.group(cls=VerbGroup)
def vocab() -> None:
    """List, add, remove, rename and compare the class names of a bundle, without PyTorch.

    A changed bundle is complete before it replaces the old one. Every command takes --json.

    Example: clipship vocab add bundles/prints --name "red dragon" --name "blue knight"
    """


@vocab.command(name="list")
@_bundle
@json_option
def list_(bundle: Path, as_json: bool) -> None:
    """Print the classes of BUNDLE: place, name and synonyms.

    Example: clipship vocab list bundles/prints
    """
    opened = read_bundle(bundle)
    vocabulary, classifier = opened.vocabulary, opened.vocabulary_features()
    listed = list(vocabulary.classes.items())
    width = len(str(len(listed) - 1))
    lines = [
        f"{place:>{width}}  {name}" + ("" if each == (name,) else f"  ({', '.join(each)})")
        for place, (name, each) in enumerate(listed)
    ]
    result = {
        "bundle": str(bundle),
        "digest": opened.digest,
        "vocabulary_digest": vocabulary.digest,
        "templates": list(vocabulary.templates),
        "classifier_parts": list(classifier.parts),
        "classes": [{"place": place, "name": name, "words": each} for place, (name, each) in enumerate(listed)],
    }
    emit(result, "\n".join(lines), as_json=as_json)


@vocab.command()
@_bundle
@_names
@_from
@_out
@click.option("--batch-size", type=click.IntRange(1), help="Names encoded together. [default: the fastest measured]")
@json_option
def add(
    bundle: Path, names: tuple[str, ...], file: Path | None, out: Path | None, batch_size: int | None, as_json: bool
) -> None:
    """Add classes at the end of BUNDLE; the features of the others stay as they are.

    After an interruption the same command continues where it stopped.

    Example: clipship vocab add bundles/prints --from more-names.txt --out bundles/prints-more
    """
    from clipship.export.vocab.edit import add_classes
    from clipship.export.vocab.encode import BATCH_SIZE

    classes = classes_from(names, file)
    _report(lambda: add_classes(bundle, classes, out, batch_size=batch_size or BATCH_SIZE), list(classes), as_json)


@vocab.command()
@_bundle
@_names
@_from
@_out
@json_option
def remove(bundle: Path, names: tuple[str, ...], file: Path | None, out: Path | None, as_json: bool) -> None:
    """Remove classes from BUNDLE; the classes after them move up.

    Example: clipship vocab remove bundles/prints --name "black fish"
    """
    from clipship.export.vocab.edit import remove_classes

    gone = list(classes_from(names, file))
    _report(lambda: remove_classes(bundle, gone, out), gone, as_json)


@vocab.command()
@_bundle
@click.option(
    "--name",
    "pairs",
    nargs=2,
    multiple=True,
    required=True,
    metavar="OLD NEW",
    help="A class and its new name; may be repeated.",
)
@_out
@json_option
def rename(bundle: Path, pairs: tuple[tuple[str, str], ...], out: Path | None, as_json: bool) -> None:
    """Rename classes of BUNDLE, and encode their new names.

    Example: clipship vocab rename bundles/prints --name "black fish" "dark fish"
    """
    from clipship.export.vocab.edit import rename_classes

    for position, what in enumerate(("renamed", "a new name")):
        count = Counter(pair[position] for pair in pairs)
        twice = [name for name, times in count.items() if times > 1]
        if twice:
            raise DataError(f"{', '.join(map(repr, twice))}: {what} more than once: give each --name OLD NEW once")
    _report(lambda: rename_classes(bundle, dict(pairs), out), [list(pair) for pair in pairs], as_json)


@vocab.command()
@click.argument("before", type=_PATH)
@click.argument("after", type=_PATH)
@json_option
def diff(before: Path, after: Path, as_json: bool) -> None:
    """Compare the vocabularies of two bundles: names, encoders, and the features of the names they share.

    Example: clipship vocab diff bundles/prints bundles/prints-more
    """
    from clipship.export.vocab.diff import vocabulary_diff

    found = vocabulary_diff(read_bundle(before), read_bundle(after))
    emit({"before": str(before), "after": str(after), **found.to_json()}, str(found), as_json=as_json)


def _report(change_of: Callable[[], Change], names: list[Any], as_json: bool) -> None:
    started = time.perf_counter()
    change = change_of()
    seconds = time.perf_counter() - started
    for one, other in change.twins:
        log(f"the text encoder cannot tell {one!r} from {other!r}: their classes share the probability of an image")
    new, record = change.bundle, change.record
    result = {
        "bundle": str(new.path),
        "digest": new.digest,
        "names": names,
        "seconds": round(seconds, 3),
        "same_to_the_encoder": [list(pair) for pair in change.twins],
        **record,
    }
    counts = f"{record['classes_before']} -> {record['classes_after']} classes"
    line = f"{new.path}: {record['verb']} {record['classes']}, {counts} in {seconds:.1f} s, digest {new.digest[:16]}"
    emit(result, line, as_json=as_json)
