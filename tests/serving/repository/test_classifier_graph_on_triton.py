"""A classifier with a cache on a real Triton: the probabilities of the classification rule in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipship.core.bundle import Bundle, read_bundle, write_manifest
from clipship.core.classification import Cache, VocabularyFeatures
from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import LOGIT_SCALE, NAMES, SPEC, jpeg_bytes, reference_answers, text_features, write_bundle

pytestmark = pytest.mark.triton

SEEDS = range(12)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, VocabularyFeatures]:
    """The stand-in bundle, with the embeddings of some of its images voting for other classes than the nearest."""
    folder = tmp_path_factory.mktemp("cached") / "bundle"
    bundle = write_bundle(folder)
    pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed), SPEC) for seed in range(8)])
    keys, _, _ = reference_answers(pixels, bundle.image_encoder.read_bytes(), 5)
    labels = np.arange(8) % (len(NAMES) - 1)  # the last class has no key
    cache = Cache(keys=keys, labels=labels, alpha=15.0, beta=40.0)
    features = VocabularyFeatures(features=text_features(), logit_scale=LOGIT_SCALE, cache=cache)

    from safetensors.numpy import save_file

    save_file(features.tensors(), folder / "vocabulary.safetensors")
    write_manifest(folder, replace(bundle.manifest, classifier_parts=("cache",)))
    return read_bundle(folder), features


@pytest.fixture(scope="module")
def running(cached: tuple[Bundle, VocabularyFeatures], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository: Path = tmp_path_factory.mktemp("triton") / "repository"
    with start_server(repository_from_bundle(cached[0], repository, backend="python", top_k=len(NAMES))) as server:
        yield server


def test_triton_and_its_twin_answer_with_the_votes(
    cached: tuple[Bundle, VocabularyFeatures], running: Server, tmp_path: Path
) -> None:
    bundle, features = cached
    files = [tmp_path / f"{seed}.jpg" for seed in SEEDS]
    for seed, path in zip(SEEDS, files, strict=True):
        path.write_bytes(jpeg_bytes(seed))
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), SPEC) for path in files])
    embedding, _, _ = reference_answers(pixels, bundle.image_encoder.read_bytes(), 5)
    expected = features.probabilities(embedding)
    plain = replace(features, cache=None).probabilities(embedding)
    assert (expected.argmax(axis=1) != plain.argmax(axis=1)).any(), "the votes change no answer"
    transports = (TritonTransport(running.endpoints.url), LocalTransport(bundle, top_k=len(NAMES)))
    for transport in transports:
        with Classifier(transport) as classifier:
            results = classifier.classify([str(path) for path in files])
        for row, result in zip(expected, results, strict=True):
            order = np.argsort(-row, kind="stable")
            assert list(result.labels) == [NAMES[place] for place in order]
            np.testing.assert_allclose(result.scores, row[order], atol=1e-5)
