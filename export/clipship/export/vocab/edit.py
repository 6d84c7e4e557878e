"""Classes added to a bundle's vocabulary, removed or renamed; everything else stays as it was.

A new bundle is written beside the old one and replaces it in one step. Files that do not depend on the vocabulary are
hard links to the old bundle's, which cost neither time nor space: a bundle's files are never written to.

Shape legend: C classes, N golden images, D features, k best classes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core import bundle as layout
from clipship.core.bundle import (
    Bundle,
    VocabularyFeatures,
    load_tensors,
    read_bundle,
    save_tensors,
    validate_folder,
    write_manifest_content,
    write_vocabulary,
)
from clipship.core.errors import BundleError, CheckFailed, DataError
from clipship.core.files import locked_folder, replace_folder, write_json_atomic
from clipship.core.tolerances import TOLERANCES
from clipship.core.vocabulary import Vocabulary, rows_of
from clipship.export.vocab.encode import BATCH_SIZE, WordEncoder, encode_words, remove_work_folders
from clipship.export.vocab.names import twins, validate_known_names, validate_new_words, validate_word_lengths

_CHECKED_CLASSES = 8
"""Old classes that are encoded again, to check the text encoder."""

Classes = Mapping[str, tuple[str, ...]]
"""By class its words."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a verb did to a bundle."""

    bundle: Bundle
    """The new one."""
    record: dict[str, Any]
    """Its entry in ``verification.json``."""
    twins: Pairs = ()
    """Words that the text encoder cannot tell apart."""


def add_classes(path: Path, classes: Classes, out: Path | None = None, *, batch_size: int = BATCH_SIZE) -> Change:
    """Add ``classes`` at the end of the bundle at ``path``; the features of the others stay bit for bit.

    Args:
        out: the new bundle; None: the old one is replaced.
        batch_size: prompts that enter the text encoder together.

    Raises:
        BundleError: a damaged bundle, one without a tokenizer, or with tensors that this version does not know.
        DataError: names that cannot be added; lists all of them.
        UsageError: a linear probe, which knows no other classes; ``out`` is no bundle; another process edits it.
        CheckFailed: the text encoder does not reproduce the bundle's features.
        MissingExtraError: onnxruntime, ftfy or regex is not installed.
    """
    with _locked(path, out) as (bundle, final):
        classifier = bundle.vocabulary_features()
        _validate_tensors(bundle, classifier)
        classifier.extended(classifier.features[:0])  # refuses a linear probe before anything is encoded
        old = bundle.vocabulary.classes
        validate_new_words(old, classes)
        encoder = WordEncoder(bundle=bundle, batch_size=batch_size)
        new, check, same = _encoded(encoder, classes, classifier, final, among=old)
        record = {"verb": "add", "classes": len(classes), "check": check}
        return _written(bundle, {**old, **classes}, classifier.extended(new), record, final, same)


def remove_classes(path: Path, names: Sequence[str], out: Path | None = None) -> Change:
    """Remove ``names`` from the bundle at ``path``, and their keys from a cache; the rest stays bit for bit.

    Raises:
        BundleError, UsageError: as :func:`add_classes`.
        DataError: names that the bundle does not have, or no class would be left.
    """
    with _locked(path, out) as (bundle, final):
        validate_known_names(bundle.vocabulary, names)
        classifier = bundle.vocabulary_features()
        _validate_tensors(bundle, classifier)
        gone, old = set(names), bundle.vocabulary.classes
        kept = {name: words for name, words in old.items() if name not in gone}
        if not kept:
            raise DataError(f"{path}: all {len(gone)} classes would go: a bundle needs at least one")
        rows = [[place] for place, name in enumerate(old) if name in kept]
        return _written(bundle, kept, classifier.merged(rows), {"verb": "remove", "classes": len(gone)}, final)


def rename_classes(path: Path, new_names: Mapping[str, str], out: Path | None = None) -> Change:
    """Rename classes of the bundle at ``path`` (``new_names``: old name -> new name) at their places.

    A class without synonyms gets the features of its new name, and keeps its keys in a cache. One with synonyms, or
    with the weights of a linear probe, keeps its features: there a name is a label.

    Raises:
        BundleError, DataError, UsageError, CheckFailed, MissingExtraError: as :func:`add_classes`.
    """
    with _locked(path, out) as (bundle, final):
        old, classifier = bundle.vocabulary.classes, bundle.vocabulary_features()
        validate_known_names(bundle.vocabulary, new_names)
        others = {name: words for name, words in old.items() if name not in new_names}
        by_name = [name for name in new_names if classifier.bias is None and old[name] == (name,)]
        words = {name: (new,) if old[name] == (name,) else old[name] for name, new in new_names.items()}
        validate_new_words(others, {new: words[name] for name, new in new_names.items()})
        record: dict[str, Any] = {"verb": "rename", "classes": len(new_names)}
        same: Pairs = ()
        if by_name:
            encoder = WordEncoder(bundle=bundle)
            encoded = {new_names[name]: words[name] for name in by_name}
            features, record["check"], same = _encoded(encoder, encoded, classifier, final, among=others)
            place = {name: row for row, name in enumerate(old)}
            changed = classifier.features.copy()
            changed[[place[name] for name in by_name]] = features
            classifier = replace(classifier, features=changed)
        renamed = {new_names.get(name, name): words.get(name, each) for name, each in old.items()}
        return _written(bundle, renamed, classifier, record, final, same)


def _unknown_tensors(bundle: Bundle, classifier: VocabularyFeatures) -> dict[str, NDArray[Any]]:
    """Tensors of a later version, which this one does not know."""
    tensors = load_tensors(bundle.path / layout.VOCABULARY_TENSORS)
    return {name: tensors[name] for name in tensors.keys() - classifier.tensors().keys()}


def _validate_tensors(bundle: Bundle, classifier: VocabularyFeatures) -> None:
    """Validate that no unknown tensor would keep its rows while others lose or gain some."""
    unknown = sorted(_unknown_tensors(bundle, classifier))
    if unknown:
        raise BundleError(
            f"{bundle.path}: its classifier has {', '.join(unknown)}, which this version of clipship does not know: "
            "take the version that packed it"
        )


def _encoded(
    encoder: WordEncoder, classes: Classes, classifier: VocabularyFeatures, final: Path, *, among: Classes
) -> tuple[NDArray[np.float32], dict[str, Any], Pairs]:
    """The features [C, D] of ``classes``, the record of the text encoder's check, and the words it cannot tell apart.

    Args:
        among: the classes that stay.
    """
    words, others = _flat(classes.values()), _flat(among.values())
    validate_word_lengths(words, encoder.templates, encoder.tokenizer, encoder.bundle.context_length)
    check = _validate_kept_classes(encoder, classifier)
    features = _class_features(encode_words(encoder, words, final), classes)
    return features, check, twins(words, others, encoder.templates[0], encoder.tokenizer)


def _flat(words: Iterable[Sequence[str]]) -> list[str]:
    return [word for each in words for word in each]


def _class_features(features_WD: NDArray[np.float32], classes: Classes) -> NDArray[np.float32]:
    """[C, D]: a class is its word's feature, or the normalised mean over its words."""
    return VocabularyFeatures(features=features_WD, logit_scale=1.0).merged(rows_of(classes.values())).features


def _validate_kept_classes(encoder: WordEncoder, classifier: VocabularyFeatures) -> dict[str, Any]:
    """Encode some classes of the bundle again and compare them with its features.

    Raises:
        CheckFailed: they differ by more than the tolerance of text features.
    """
    old, tolerance = encoder.bundle.vocabulary, TOLERANCES["text-fp32"].max_abs
    places = sorted({round(place) for place in np.linspace(0, len(old) - 1, _CHECKED_CLASSES)})
    some = {name: words for place, (name, words) in enumerate(old.classes.items()) if place in places}
    given = _class_features(encoder.features(_flat(some.values())), some)
    difference = float(np.abs(given - classifier.features[places]).max())
    if not difference <= tolerance:  # NaN is no either
        raise CheckFailed(
            f"{encoder.bundle.path}: its text encoder gives features for {old.names[places[0]]!r} and others that "
            f"differ by {difference:.1e} from the bundle's (at most {tolerance:.0e}): pack it again"
        )
    return {"what": "features of kept classes", "count": len(places), "max_abs": difference, "max_allowed": tolerance}


@contextmanager
def _locked(path: Path, out: Path | None) -> Iterator[tuple[Bundle, Path]]:
    """The bundle at ``path``, and the path of the new one, locked against other ``clipship vocab``.

    The lock is on the folder itself, so a killed process leaves none behind.

    Raises:
        BundleError: no bundle at ``path``, or a damaged one.
        UsageError: ``out`` is no bundle, or another process edits it.
    """
    if out is not None:
        validate_folder(out)
    final = (out or path).resolve()  # the folder is replaced, not a link to it
    if not final.exists():
        yield read_bundle(path), final
        return
    with locked_folder(final, "another clipship vocab is editing it: wait until it is done"):
        yield read_bundle(path.resolve()), final


def _written(
    bundle: Bundle,
    classes: Classes,
    classifier: VocabularyFeatures,
    record: dict[str, Any],
    final: Path,
    same: Pairs = (),
) -> Change:
    """Write the bundle with ``classes`` and their ``classifier`` to ``final``."""
    vocabulary = Vocabulary.from_classes(classes, bundle.vocabulary.templates)
    record = {
        **record,
        "from_digest": bundle.digest,
        "classes_before": len(bundle.vocabulary),
        "classes_after": len(vocabulary),
        "recomputed": [layout.VOCABULARY_TENSORS, layout.LABELS, f"{layout.GOLDEN_TENSORS}: scores, indices"],
    }
    with replace_folder(final) as folder:
        written = _write_new_files(bundle, vocabulary, classifier, record, folder)
        _link_others(bundle, folder, written)
        content = json.loads((bundle.path / layout.MANIFEST).read_text(encoding="utf-8"))
        content |= {"vocabulary": vocabulary.to_json(), "vocabulary_digest": vocabulary.digest}
        known = {name: digest for name, digest in bundle.files.items() if name not in written}
        whole = write_manifest_content(folder, content, known)
    if "check" in record:  # names were encoded; a removal keeps the chunks of an interrupted addition
        remove_work_folders(final)
    manifest = replace(bundle.manifest, vocabulary=vocabulary)
    new = Bundle(path=final, manifest=manifest, files=whole["files"], digest=whole["digest"])
    return Change(bundle=new, record=record, twins=same)


def _write_new_files(
    bundle: Bundle, vocabulary: Vocabulary, classifier: VocabularyFeatures, record: dict[str, Any], folder: Path
) -> set[str]:
    """Write the files that depend on the vocabulary into ``folder``; returns their names."""
    (folder / layout.GOLDEN).mkdir()
    write_vocabulary(folder, vocabulary, classifier.tensors() | _unknown_tensors(bundle, classifier))
    golden = load_tensors(bundle.path / layout.GOLDEN_TENSORS)
    golden["scores"], golden["indices"] = classifier.best(golden["embedding"], layout.GOLDEN_CLASSES)
    save_tensors(folder / layout.GOLDEN_TENSORS, golden)
    verification = bundle.verification()
    history = [*verification.get("vocabulary_changes", ()), record]
    write_json_atomic(folder / layout.VERIFICATION, {**verification, "vocabulary_changes": history})
    return {layout.VOCABULARY_TENSORS, layout.LABELS, layout.GOLDEN_TENSORS, layout.VERIFICATION}


def _link_others(bundle: Bundle, folder: Path, written: set[str]) -> None:
    for name in bundle.files.keys() - written:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle.path / name, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            shutil.copy2(bundle.path / name, target)  # another file system, or one without links
