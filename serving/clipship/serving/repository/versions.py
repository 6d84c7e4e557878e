"""Versions of a classifier in a model repository, and the record of publications.

::

    REPOSITORY/
      publications.json            what was published, newest last
      .publish.lock                held by the one publish that runs
      classifier/
        config.pbtxt               names the version that is served, and its vocabulary's digest
        1/  model.onnx  vocabulary.json  golden.npz  labels.txt
        2/  model.onnx  vocabulary.json  golden.npz  labels.txt

Triton ignores a version until ``config.pbtxt`` names it (``version_policy: specific``), and that file is replaced
atomically. So a publish that is killed leaves the old vocabulary or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from clipship.core.bundle import Bundle
from clipship.core.errors import UsageError, near
from clipship.core.files import locked_file, read_record, replace_folder, write_json_atomic, write_text_atomic
from clipship.core.progress import log
from clipship.serving.errors import RepositoryError
from clipship.serving.model_names import (
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    TOP_K,
    VOCABULARY_DIGEST,
    of_vocabulary,
)
from clipship.serving.repository.backends import ONNXRUNTIME
from clipship.serving.repository.classifier_graph import classifier_graph
from clipship.serving.repository.config_pbtxt import read_config, text_from_config
from clipship.serving.repository.golden_samples import truth_from_bundle, write_truth

RECORD = "publications.json"
RECORD_FORMAT = "clipship-publications"
RECORD_VERSION = 1
MAX_ENTRIES = 10_000
"""Older entries are dropped."""

VOCABULARY_FILE = "vocabulary.json"
"""Which vocabulary a version has."""

_LOCK = ".publish.lock"
_ADVICE = "write the repository again with clipship repository"

Action = Literal["publish", "rollback", "refused"]


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """Which vocabulary a version of a classifier is."""

    vocabulary_digest: str
    bundle_digest: str
    classes: int


@dataclass(frozen=True, kw_only=True)
class Entry(VersionInfo):
    """An entry of the record."""

    at: str
    """UTC, ISO 8601."""
    model: str
    action: Action
    version: int
    """What was published, or rolled back to."""
    reason: str = ""
    """Why a version was refused, or recorded late."""


@dataclass(frozen=True)
class ClassifierVersions:
    """The folder of one classifier in a repository."""

    folder: Path

    @property
    def name(self) -> str:
        """The model's name."""
        return self.folder.name

    @property
    def ensemble(self) -> str:
        """The ensemble that classifies pixels with it."""
        return self.name.replace(CLASSIFIER, CLASSIFY, 1)

    def config(self) -> Any:
        """The configuration on disk.

        Raises:
            RepositoryError: it is missing, or none.
        """
        return read_config(self.folder)

    def active(self) -> int:
        """The version that the configuration names.

        Raises:
            RepositoryError: it does not name one.
        """
        versions = list(self.config().version_policy.specific.versions)
        if len(versions) != 1:
            raise RepositoryError(f"{self.folder}: its configuration does not name the version to serve: {_ADVICE}")
        return int(versions[0])

    def versions(self) -> list[int]:
        """All versions on disk, ascending."""
        names = [child.name for child in self.folder.iterdir() if (child / VOCABULARY_FILE).is_file()]
        return sorted(int(name) for name in names if name.isdecimal())

    def top_k(self) -> int:
        """Classes reported an image."""
        return int(self.config().parameters[TOP_K].string_value)

    def info(self, version: int) -> VersionInfo:
        """Which vocabulary ``version`` is.

        Raises:
            RepositoryError: its folder does not say.
        """
        path = self.folder / str(version) / VOCABULARY_FILE
        try:
            return VersionInfo(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RepositoryError(f"{path}: cannot be read ({error}): {_ADVICE}") from error

    def add(self, bundle: Bundle) -> int:
        """Write the vocabulary of ``bundle`` as a new version, not served yet; returns its number."""
        version = max([0, *self.versions(), self.active()]) + 1
        with replace_folder(self.folder / str(version)) as folder:
            write_version(folder, bundle, self.top_k())
            copy_sources(self.folder / str(self.active()), folder)
        return version

    def commit(self, version: int) -> None:
        """Make ``version`` the served one, atomically; a server takes it with its next load.

        Raises:
            RepositoryError: the version does not exist, or is damaged.
        """
        config = self.config()
        name_version(config, version, self.info(version))
        write_text_atomic(self.folder / "config.pbtxt", text_from_config(config))

    def remove_leftovers(self) -> None:
        """Delete what killed publishes left: folders that Triton does not look at. Hold the lock."""
        for child in self.folder.iterdir():
            if child.is_dir() and not child.name.isdecimal() and child.name != "warmup":
                shutil.rmtree(child)

    def remove(self, versions: Sequence[int]) -> None:
        """Delete versions, each atomically."""
        for version in versions:
            remove_folder(self.folder / str(version))

    def record(self, version: int, action: Action, reason: str = "", info: VersionInfo | None = None) -> None:
        """Add an entry to the repository's record; ``info`` is of a version that is not on disk any more."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        what = asdict(info or self.info(version))
        entry = Entry(at=at, model=self.name, action=action, version=version, reason=reason, **what)
        entries = [*read_entries(self.folder.parent), entry][-MAX_ENTRIES:]
        content = {"format": RECORD_FORMAT, "format_version": RECORD_VERSION, "entries": list(map(asdict, entries))}
        write_json_atomic(self.folder.parent / RECORD, content)

    def recorded(self) -> list[int]:
        """The versions that were served according to the record, oldest first, after the repository's first one."""
        entries = [each for each in read_entries(self.folder.parent) if each.model == self.name]
        return [*self.versions()[:1], *(entry.version for entry in entries if entry.action != "refused")]

    def served(self) -> list[int]:
        """The versions on disk that were served, newest first, each once."""
        on_disk = self.versions()
        return [version for version in dict.fromkeys([self.active(), *reversed(self.recorded())]) if version in on_disk]


def classifier_in(repository: Path, vocabulary: str | None) -> ClassifierVersions:
    """The classifier of ``vocabulary`` (None: the first one) in the repository.

    Raises:
        RepositoryError: not a clipship repository, or not one that can be published to.
        UsageError: it has no such vocabulary; says which it has.
    """
    if not (repository / CLASSIFIER / "config.pbtxt").is_file():
        raise RepositoryError(f"{repository}: no model repository there: write one with clipship repository")
    if vocabulary is not None and vocabulary not in vocabularies_in(repository):
        raise UsageError(
            f"{repository} has no vocabulary {vocabulary!r}: {near(vocabulary, vocabularies_in(repository))}"
        )
    classifier = ClassifierVersions(repository / of_vocabulary(CLASSIFIER, vocabulary))
    classifier.info(classifier.active())
    return classifier


def vocabularies_in(repository: Path) -> list[str]:
    """The names of the further vocabularies in the repository, by the ensemble that is written last."""
    prefix = of_vocabulary(CLASSIFY_ENCODED, "")
    return sorted(file.parent.name.removeprefix(prefix) for file in repository.glob(f"{prefix}*/config.pbtxt"))


def name_version(config: Any, version: int, info: VersionInfo) -> None:
    """Have a classifier's configuration name the version to serve, and its digests."""
    config.ClearField("version_policy")
    config.version_policy.specific.versions.append(version)
    config.parameters[VOCABULARY_DIGEST].string_value = info.vocabulary_digest
    config.parameters[BUNDLE_DIGEST].string_value = info.bundle_digest


def version_info_of(bundle: Bundle) -> VersionInfo:
    """The vocabulary of ``bundle``."""
    return VersionInfo(
        vocabulary_digest=bundle.vocabulary.digest, bundle_digest=bundle.digest, classes=len(bundle.vocabulary)
    )


def write_version(folder: Path, bundle: Bundle, top_k: int) -> None:
    """The graph of ``bundle``'s vocabulary, which one it is, and its golden samples, in a version's ``folder``.

    Raises:
        MissingExtraError: the ``onnx`` package is not installed.
    """
    graph = classifier_graph(bundle.vocabulary, bundle.vocabulary_features(), top_k)
    (folder / ONNXRUNTIME.model_file).write_bytes(graph)
    write_json_atomic(folder / VOCABULARY_FILE, asdict(version_info_of(bundle)))
    write_truth(folder, truth_from_bundle(bundle))


def copy_sources(version: Path, target: Path) -> None:
    """Copy the Python sources of ``version``, if any, to another version's folder."""
    for source in version.glob("*.py"):
        shutil.copyfile(source, target / source.name)


def remove_folder(folder: Path, aside: Path | None = None) -> None:
    """Delete ``folder`` atomically: rename it into ``aside`` (None: its parent), then delete it."""
    # The name is that of core/files.py's left-overs, which it removes when it writes there again.
    hidden = (aside or folder.parent) / f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part"
    folder.replace(hidden)
    shutil.rmtree(hidden)


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Run one publish at a time; others wait. The kernel releases the lock of a killed one."""
    with locked_file(repository / _LOCK, lambda: log(f"another publish works on {repository}: waiting for its end")):
        yield


def read_entries(repository: Path) -> list[Entry]:
    """The record, oldest first; empty before the first publish.

    Raises:
        RepositoryError: the file is damaged.
    """
    path = repository / RECORD
    if not path.is_file():
        return []
    advice = f"move it away; {RECORD} is only a record"
    content = read_record(
        path, record_format=RECORD_FORMAT, version=RECORD_VERSION, error=RepositoryError, advice=advice
    )
    try:
        return [Entry(**entry) for entry in content["entries"]]
    except (KeyError, TypeError) as error:
        raise RepositoryError(f"{path}: malformed ({error}): {advice}") from error
