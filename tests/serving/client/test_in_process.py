"""The in-process twin: the client's answers without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipship.core.bundle import Bundle
from clipship.core.errors import UsageError
from clipship.core.images.decoding import pixels_from_bytes
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.errors import ModelsMissing
from tests.serving.bundles import NAMES, image_encoder_model, reference_answers, write_bundle


def test_answers_equal_the_reference(bundle: Bundle, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), bundle.image_spec) for path in paths])
    _, scores, indices = reference_answers(pixels, image_encoder_model(), k=5)
    with Classifier(LocalTransport(bundle, max_batch_size=8)) as classifier:
        results = classifier.classify(paths)
    assert [result.indices for result in results] == [tuple(row) for row in indices.tolist()]
    assert [result.labels[0] for result in results] == [NAMES[row[0]] for row in indices.tolist()]
    np.testing.assert_allclose([result.scores for result in results], scores, atol=1e-5)


def test_top_k_and_metadata(bundle: Bundle, photos: Path) -> None:
    with Classifier(LocalTransport(bundle, top_k=2)) as classifier:
        assert classifier.metadata.bundle_digest == bundle.digest
        assert classifier.metadata.vocabulary_digest == bundle.vocabulary.digest
        assert len(classifier.classify([next(photos.glob("*.jpg"))])[0].labels) == 2


def test_one_bad_image_is_one_error(bundle: Bundle, photos: Path) -> None:
    good = next(photos.glob("*.jpg"))
    with Classifier(LocalTransport(bundle)) as classifier:
        first, second = classifier.classify([b"no image", good])
    assert first.error is not None
    assert second.error is None


def test_decoding_on_a_server_needs_a_server(bundle: Bundle, photos: Path) -> None:
    with (
        Classifier(LocalTransport(bundle), decode="server") as classifier,
        pytest.raises(ModelsMissing, match="decode on the client"),
    ):
        classifier.classify([next(photos.glob("*.jpg"))])


def test_embeddings_are_the_encoders(bundle: Bundle, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    pixels = np.stack([pixels_from_bytes(path.read_bytes(), bundle.image_spec) for path in paths])
    expected, _, _ = reference_answers(pixels, image_encoder_model(), k=5)
    with Classifier(LocalTransport(bundle, max_batch_size=8), embeddings=True) as classifier:
        assert classifier.metadata.embed_dim == expected.shape[1]
        with_classes = [result.embedding for result in classifier.classify(paths)]
        alone = classifier.embed([*paths, b"no image"])
    np.testing.assert_allclose(np.stack([vector for vector in with_classes if vector is not None]), expected, atol=1e-6)
    np.testing.assert_allclose(alone.vectors[:-1], expected, atol=1e-6)
    assert np.isnan(alone.vectors[-1]).all()
    assert alone.errors[-1] is not None


def test_vocabularies_side_by_side(bundle: Bundle, tmp_path: Path, photos: Path) -> None:
    path = next(photos.glob("*.jpg"))
    transport = LocalTransport(bundle, others={"same": write_bundle(tmp_path / "other")})
    first = Classifier(transport).classify([path])[0]
    other = Classifier(transport, vocabulary="same").classify([path])[0]
    assert other.labels == first.labels
    assert (first.vocabulary, other.vocabulary) == (None, "same")
    with pytest.raises(ModelsMissing, match="does not serve the vocabulary 'birds'"):
        Classifier(transport, vocabulary="birds")
    with pytest.raises(UsageError, match="another image encoder"):
        LocalTransport(bundle, others={"foreign": write_bundle(tmp_path / "foreign", seed=7)})
