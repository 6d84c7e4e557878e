"""The client's features on a real Triton: embeddings, vocabularies side by side, canaries, TLS, several servers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipship.core.bundle import Bundle
from clipship.core.images.decoding import pixels_from_bytes
from clipship.core.images.inputs import ImageLike
from clipship.serving import Canary, Classifier, Connection
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.errors import AccessDenied, ModelsMissing, ServerUnreachable
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.server.selfcheck import REQUEST_ID
from clipship.serving.server.server_args import ServerOptions
from tests.serving.bundles import SPEC, image_encoder_model, jpeg_bytes, reference_answers, write_bundle


@pytest.fixture(scope="module")
def pair(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two vocabularies: the first and "next"."""
    folder = tmp_path_factory.mktemp("pair")
    others = {"next": write_bundle(folder / "next")}
    repository = repository_from_bundle(
        bundle, folder / "repository", backend="python", others=others, max_batch_size=8
    )
    with start_server(repository) as running:
        yield running


@pytest.mark.parametrize("decode", ["client", "server"])
def test_embeddings_are_the_in_process_ones(server: Server, bundle: Bundle, decode: str) -> None:
    images: list[ImageLike] = [*(jpeg_bytes(seed) for seed in range(20)), b"", *(jpeg_bytes(seed) for seed in range(5))]
    pixels = np.stack([pixels_from_bytes(jpeg_bytes(seed), SPEC) for seed in range(20)])
    expected, _, _ = reference_answers(pixels, image_encoder_model(), 5)
    with (
        Classifier(server.endpoints.url, decode=decode, embeddings=True) as remote,  # type: ignore[arg-type]
        Classifier(LocalTransport(bundle), embeddings=True) as local,
    ):
        alone, results, twin = remote.embed(images), remote.classify(images), local.classify(images)
    np.testing.assert_allclose(alone.vectors[:20], expected, atol=1e-5)
    assert alone.errors[20] == "empty file (0 bytes)"
    assert np.isnan(alone.vectors[20]).all()
    for result, other, vector in zip(results, twin, alone.vectors, strict=True):
        assert result.labels == other.labels
        assert result.error == other.error
        if result.error is None:
            assert result.embedding is not None
            assert other.embedding is not None
            np.testing.assert_allclose(result.embedding, vector, atol=1e-6)
            np.testing.assert_allclose(result.embedding, other.embedding, atol=1e-5)


@pytest.mark.parametrize("decode", ["client", "server"])
def test_a_further_vocabulary_and_a_canary(pair: Server, decode: str) -> None:
    images = [jpeg_bytes(seed % 10) for seed in range(160)]
    url = pair.endpoints.url
    with Classifier(url, vocabulary="next", decode=decode) as classifier:  # type: ignore[arg-type]
        further = classifier.classify(images[:10])
        assert {result.vocabulary for result in further} == {"next"}
    canary = Canary(vocabulary="next", share=0.2)
    with Classifier(url, canary=canary, decode=decode) as classifier:  # type: ignore[arg-type]
        results = classifier.classify(images)
    assert sum(result.vocabulary == "next" for result in results) == 32
    assert [result.labels for result in results] == [further[position % 10].labels for position in range(160)]


def test_a_vocabulary_that_is_not_served(pair: Server) -> None:
    """The list of models is an admin protocol, which this client has no secret for."""
    with pytest.raises(ModelsMissing, match=r"not serve the vocabulary 'birds'; its model list is restricted"):
        Classifier(pair.endpoints.url, vocabulary="birds")


def test_mutual_tls_with_a_triton(repository: Path, tmp_path: Path) -> None:
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *new_key, "-out", "cert.pem", "-days", "2", *names]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = ServerOptions(tls_cert=certificate, tls_key=key, tls_ca=certificate)
    with start_server(repository, options=options) as running:
        urls = (running.endpoints.url,)
        known = Connection(urls=urls, ca_file=certificate, certificate_file=certificate, key_file=key)
        with Classifier(known) as classifier:
            assert [result.error for result in classifier.classify([jpeg_bytes(0), jpeg_bytes(1)])] == [None, None]
        for stranger in (Connection(urls=urls, connect_timeout_s=2.0), Connection(urls=urls, ca_file=certificate)):
            with pytest.raises((ServerUnreachable, AccessDenied)):
                Classifier(stranger)


def test_request_ids_stand_in_tritons_trace(repository: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    options = ServerOptions(trace_file=trace, trace_rate=1)
    with (
        start_server(repository, options=options) as running,
        Classifier(running.endpoints.url, window=1) as classifier,
    ):
        classifier.classify([jpeg_bytes(seed) for seed in range(24)])
    requests = [entry["request_id"] for entry in json.loads(trace.read_text()) if entry.get("model_name") == "classify"]
    requests.remove(REQUEST_ID)  # of the one image that the server was asked before it was ready
    prefixes, numbers = zip(*(name.rsplit("-", 1) for name in requests), strict=True)
    assert len(set(prefixes)) == 1
    assert sorted(numbers) == ["1", "2", "3"]
