"""Publishes a vocabulary to a running server without downtime, and rolls back.

A publish adds a version, checks its graph in this process, names it in the configuration, loads it on the server, and
sends the golden images through it. Triton serves the old version until the new one is ready, and running requests
finish on theirs. On any failure the old version is named and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, ClipshipError, UsageError
from clipship.core.tensorrt_plan import variant_digest
from clipship.serving.errors import RepositoryError, ServingError
from clipship.serving.model_names import ENCODER, ENCODER_DIGEST, PRECISION, VOCABULARY_DIGEST
from clipship.serving.publish.control import Control
from clipship.serving.repository.config_pbtxt import read_config
from clipship.serving.repository.golden_check import validate_graph, validate_same_answers, validate_vocabulary
from clipship.serving.repository.versions import (
    Action,
    ClassifierVersions,
    VersionInfo,
    classifier_in,
    locked,
    vocabularies_in,
)
from clipship.serving.repository.write import add_vocabulary, remove_vocabulary, validate_verification


@dataclass(frozen=True, kw_only=True)
class Published(VersionInfo):
    """The version that is served now, and the one before."""

    model: str
    version: int
    before: int | None
    """The version served before; None: the vocabulary is new."""
    kept: tuple[int, ...]
    """Versions on disk, newest first, for a rollback."""


def publish(
    repository: Path, bundle: Bundle, control: Control, *, vocabulary: str | None = None, keep: int = 3
) -> Published:
    """Switch a server to the vocabulary of ``bundle``.

    Args:
        vocabulary: name of the vocabulary to replace, or of a new one; None: the first.
        keep: number of versions kept on disk, with the served one.

    Raises:
        UsageError: the bundle has another encoder, or fewer classes than are returned; ``keep`` is below 1.
        CheckFailed: the golden answers are wrong; the old version is served again.
        ServingError: the server could not load it, or does not answer; the old version is restored.
    """
    if keep < 1:
        raise UsageError(f"keep is {keep}: give 1 or more")
    with locked(repository):
        validate_verification(bundle)
        validate_served_encoder(repository, bundle)
        _validate_served_repository(repository, control)
        first = classifier_in(repository, None)
        first.remove_leftovers()
        if vocabulary is not None and vocabulary not in vocabularies_in(repository):
            _validate_class_count(bundle, first)
            return _publish_new(repository, bundle, control, vocabulary)
        classifier = classifier_in(repository, vocabulary)
        _tidy(classifier)
        _validate_class_count(bundle, classifier)
        return _publish_version(classifier, bundle, control, keep)


def rollback(repository: Path, control: Control, *, vocabulary: str | None = None, to: str | None = None) -> Published:
    """Switch back to a vocabulary that was served before.

    Args:
        to: a version's number, or the start of its vocabulary's or bundle's digest; None: the one before.

    Raises:
        UsageError: no such version is kept.
        CheckFailed: the server's answers differ from that version's; the one before is served again.
        ServingError: as :func:`publish`.
    """
    with locked(repository):
        classifier = classifier_in(repository, vocabulary)
        _tidy(classifier)
        before, version = classifier.active(), _version_to_go_to(classifier, to)
        folder, pixels = classifier.folder / str(version), _warmup_pixels(repository)
        check = partial(validate_same_answers, control.answers, classifier.ensemble, folder, pixels)
        _switch(classifier, version, control, check, "rollback")
        return _published(classifier, before)


def validate_served_encoder(repository: Path, bundle: Bundle) -> None:
    """Validate that the bundle has the image encoder that the repository serves.

    Raises:
        UsageError: it has another encoder; says what to do.
    """
    served = _encoder_parameter(repository, ENCODER_DIGEST)
    if served not in {variant_digest(bundle, variant) for variant in bundle.image_encoders}:
        raise UsageError(
            f"{bundle.path} has another image encoder than {repository} serves ({served[:16]}), so its names would be "
            "compared with foreign features: write and serve a separate repository with clipship repository"
        )


def _encoder_parameter(repository: Path, name: str) -> str:
    encoder = repository / ENCODER
    parameters = read_config(encoder).parameters
    if name not in parameters:
        raise RepositoryError(
            f"{encoder / 'config.pbtxt'}: has no {name}, an older version wrote it: write it again with clipship "
            "repository"
        )
    value: str = parameters[name].string_value
    return value


def _validate_served_repository(repository: Path, control: Control) -> None:
    """Validate that the server serves this repository, or a copy of it."""
    served = control.parameters(ENCODER).get(ENCODER_DIGEST)
    if served != _encoder_parameter(repository, ENCODER_DIGEST):
        raise UsageError(f"the Triton at {control.url} does not serve {repository}: give the folder that it serves")


def _validate_class_count(bundle: Bundle, classifier: ClassifierVersions) -> None:
    if len(bundle.vocabulary) < classifier.top_k():
        raise UsageError(
            f"{bundle.path} has {len(bundle.vocabulary)} classes, the server reports {classifier.top_k()} an image: "
            f"add names with clipship vocab add, or write a repository with --top-k {len(bundle.vocabulary)}"
        )


def _tidy(classifier: ClassifierVersions) -> None:
    """Delete what a killed publish left, and record what it could not record."""
    classifier.remove_leftovers()
    active = classifier.active()
    if active != classifier.recorded()[-1]:
        classifier.record(active, "publish", "it was killed before it was recorded")


def _published(classifier: ClassifierVersions, before: int | None) -> Published:
    version, kept = classifier.active(), tuple(classifier.served())
    return Published(
        model=classifier.name, version=version, before=before, kept=kept, **asdict(classifier.info(version))
    )


def _publish_version(classifier: ClassifierVersions, bundle: Bundle, control: Control, keep: int) -> Published:
    before, version = classifier.active(), classifier.add(bundle)
    try:
        validate_graph(bundle, classifier.folder / str(version))
        _switch(classifier, version, control, _golden_check(classifier, bundle, control), "publish")
    except BaseException:
        if classifier.active() != version:
            classifier.remove([version])
        raise
    kept = classifier.served()[:keep]
    classifier.remove([old for old in classifier.versions() if old not in kept])
    return _published(classifier, before)


def _golden_check(classifier: ClassifierVersions, bundle: Bundle, control: Control) -> Callable[[], None]:
    precision = _encoder_parameter(classifier.folder.parent, PRECISION)
    return partial(validate_vocabulary, control.answers, classifier.name, classifier.ensemble, bundle, precision)


def _switch(
    classifier: ClassifierVersions, version: int, control: Control, check: Callable[[], None], action: Action
) -> None:
    """Commit, load and check ``version``; on any failure commit and load the one before."""
    before = classifier.active()
    classifier.commit(version)
    try:
        control.load(classifier.name)
        _validate_current(control, classifier, version)
        check()
    except BaseException as error:
        classifier.commit(before)
        classifier.record(version, "refused", str(error) or type(error).__name__)
        now = _load_again(control, classifier)
        if isinstance(error, (CheckFailed, ServingError)):
            raise type(error)(f"{error}: version {before} is served as before{now}") from error
        raise
    classifier.record(version, action)


def _load_again(control: Control, classifier: ClassifierVersions) -> str:
    """Have the server load what is on disk; returns what failed, as the end of a message."""
    try:
        control.load(classifier.name)
    except ClipshipError as error:
        return f" as soon as the server can load it again ({error})"
    return ""


def _validate_current(control: Control, classifier: ClassifierVersions, version: int) -> None:
    """Validate that the server serves ``version``."""
    served = control.parameters(classifier.name).get(VOCABULARY_DIGEST)
    if served != classifier.info(version).vocabulary_digest:
        raise CheckFailed(
            f"the Triton at {control.url} did not load {classifier.folder}: it serves another folder, give that one"
        )


def _publish_new(repository: Path, bundle: Bundle, control: Control, vocabulary: str) -> Published:
    """Add the vocabulary's models and load them; on any failure remove them."""
    models = add_vocabulary(repository, bundle, vocabulary)
    classifier = classifier_in(repository, vocabulary)
    version = classifier.active()
    info = classifier.info(version)
    try:
        validate_graph(bundle, classifier.folder / str(version))
        for model in models:
            control.load(model)
        _golden_check(classifier, bundle, control)()
    except BaseException as error:
        remove_vocabulary(repository, vocabulary)
        classifier.record(version, "refused", str(error) or type(error).__name__, info)
        for model in reversed(models):
            with suppress(ServingError):  # it was not loaded, or the server has ended; its folder is deleted
                control.unload(model)
        raise
    classifier.record(version, "publish")
    return _published(classifier, before=None)


def _version_to_go_to(classifier: ClassifierVersions, to: str | None) -> int:
    """The version that ``to`` names; None: the one served before."""
    versions = classifier.served()
    if to is None:
        if len(versions) < 2:
            raise UsageError(f"{classifier.folder}: only {versions[0]} was ever served: publish another vocabulary")
        return versions[1]
    for version in versions:
        info = classifier.info(version)
        digests = (info.vocabulary_digest, info.bundle_digest)
        if to == str(version) or (len(to) >= 6 and any(digest.startswith(to) for digest in digests)):
            return version
    known = ", ".join(f"{version} ({classifier.info(version).vocabulary_digest[:12]})" for version in versions)
    raise UsageError(f"no version {to!r} of {classifier.name}: give one of {known}")


def _warmup_pixels(repository: Path) -> NDArray[np.uint8]:
    """uint8 [1, H, W, 3]: the encoder's warm-up sample, a golden image."""
    config = read_config(repository / ENCODER)
    image = config.input[0]
    data = (repository / ENCODER / "warmup" / image.name).read_bytes()
    size = int(np.prod(image.dims))
    return np.frombuffer(data[:size], dtype=np.uint8).reshape(1, *image.dims)
