"""Vocabularies put on a real Triton that is under load, and taken back."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from clipship.core.bundle import Bundle
from clipship.core.cli.main import main
from clipship.core.errors import CheckFailed, UsageError
from clipship.serving.errors import AccessDenied, RepositoryError, ServingError
from clipship.serving.publish.control import Control
from clipship.serving.publish.publisher import publish, rollback, validate_served_encoder
from clipship.serving.repository.golden_check import validate_graph
from clipship.serving.repository.golden_samples import SAMPLES, read_truth
from clipship.serving.repository.validate import repository_problems
from clipship.serving.repository.versions import classifier_in, locked, read_entries, vocabularies_in
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.transport.base import Tensors
from clipship.serving.transport.connection import Connection
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import write_bundle
from tests.serving.processes import CLIPSHIP, ENVIRONMENT
from tests.serving.publish.vocabularies import CLASSES, write_variant

OUTPUTS = ("scores", "indices", "labels", "embedding")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Three bundles of the stand-in encoder, each with names and features of its own."""
    folder = tmp_path_factory.mktemp("variants")
    return [write_variant(folder / str(variant), variant) for variant in range(3)]


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A repository that is published to, and the server on it."""
    repository = repository_from_bundle(
        bundle, tmp_path_factory.mktemp("served") / "repository", backend="python", max_batch_size=8
    )
    with start_server(repository) as running:
        yield repository, running


@contextmanager
def control_of(server: Server) -> Iterator[Control]:
    with Control(Connection(urls=(server.endpoints.url,))) as control:
        yield control


@dataclass
class Load:
    """Clients that classify without a pause, and what came of it."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


def vocabulary_of(outputs: Tensors, bundles: list[Bundle]) -> str | None:
    """The first name of the vocabulary that a whole answer is of; None when labels and scores are not of one."""
    for bundle in bundles:
        names = np.array([name.encode() for name in bundle.vocabulary], dtype=np.object_)
        if outputs["labels"][0, 0] in names:
            indices = outputs["indices"]
            probabilities = bundle.vocabulary_features().probabilities(outputs["embedding"])
            expected = np.take_along_axis(probabilities, indices, axis=1)
            whole = (names[indices] == outputs["labels"]).all() and np.allclose(expected, outputs["scores"], atol=1e-4)
            return bundle.vocabulary.names[0] if whole else None
    return None


@contextmanager
def load(server: Server, bundles: list[Bundle], clients: int = 8) -> Iterator[Load]:
    """``clients`` threads that send requests while the block runs, without any retry, and check every answer."""
    result, stop, lock = Load(), threading.Event(), threading.Lock()
    pixels = bundles[0].golden().pixels

    def client() -> None:
        transport = TritonTransport(server.endpoints.url)
        while not stop.is_set():
            try:
                outputs = transport.infer("classify", {"image": pixels}, OUTPUTS, timeout_s=30).result()
                vocabulary = vocabulary_of(outputs, bundles)
                failure = None if vocabulary else f"an answer of no one vocabulary: {outputs['labels'].tolist()}"
            except ServingError as error:
                vocabulary, failure = None, str(error)
            with lock:
                result.answers += 1
                result.seen |= {vocabulary} if vocabulary else set()
                result.failures += [failure] if failure else []
        transport.close()

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield result
        finally:
            stop.set()
    for each in running:
        each.result()


def publish_under_load(served: tuple[Path, Server], bundles: list[Bundle], rounds: int) -> None:
    repository, server = served
    with control_of(server) as control, load(server, bundles) as result:
        for number in range(rounds):
            bundle = bundles[1:][number % len(bundles[1:])]
            done = publish(repository, bundle, control)
            assert (done.vocabulary_digest, len(done.kept) <= 3) == (bundle.vocabulary.digest, True)
    assert result.failures == []
    assert result.seen == {bundle.vocabulary.names[0] for bundle in bundles[: rounds + 1]}
    assert result.answers > rounds


@pytest.mark.triton
def test_no_request_fails_while_vocabularies_are_published(
    served: tuple[Path, Server], bundle: Bundle, variants: list[Bundle]
) -> None:
    publish_under_load(served, [bundle, *variants[:2]], 6)
    assert len(classifier_in(served[0], None).versions()) == 3, "the oldest are gone"


@pytest.mark.chaos
@pytest.mark.triton
@pytest.mark.timeout(3600)
def test_no_request_fails_in_200_publishes(bundle: Bundle, variants: list[Bundle], tmp_path: Path) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server:
        publish_under_load((repository, server), [bundle, *variants], 200)


@pytest.mark.triton
def test_a_vocabulary_is_published_and_taken_back_by_the_command_line(
    bundle: Bundle, variants: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server:
        place = ["--repository", str(repository), "--url", server.endpoints.url, "--json"]
        capsys.readouterr()
        for variant in variants[:2]:
            assert main(["vocab", "publish", str(variant.path), *place]) == 0
            assert json.loads(capsys.readouterr().out)["vocabulary_digest"] == variant.vocabulary.digest
            assert best_label(server, bundle) in variant.vocabulary.names
        assert main(["vocab", "rollback", *place]) == 0
        done = json.loads(capsys.readouterr().out)
        assert (done["version"], done["before"], done["vocabulary_digest"]) == (2, 3, variants[0].vocabulary.digest)
        assert best_label(server, bundle) in variants[0].vocabulary.names
        assert main(["vocab", "rollback", *place, "--to", bundle.vocabulary.digest[:12]]) == 0
        assert best_label(server, bundle) in bundle.vocabulary.names
        assert main(["vocab", "rollback", *place, "--to", "77"]) == 2
        assert "no version '77' of classifier: give one of 1 (" in capsys.readouterr().err
    actions = [(entry.action, entry.version) for entry in read_entries(repository)]
    assert actions == [("publish", 2), ("publish", 3), ("rollback", 2), ("rollback", 1)]
    assert repository_problems(repository) == []
    for version, each in enumerate((bundle, *variants[:2]), start=1):
        truth = read_truth(repository / "classifier" / str(version))
        assert truth is not None
        assert truth.names == each.vocabulary.names, "what a version must answer goes with it"
    with start_server(repository) as again:
        assert best_label(again, bundle) in bundle.vocabulary.names


def best_label(server: Server, bundle: Bundle, vocabulary: str = "") -> str:
    transport = TritonTransport(server.endpoints.url)
    answer = transport.infer(f"classify{vocabulary}", {"image": bundle.golden().pixels}, ["labels"], timeout_s=30)
    label: str = answer.result()["labels"][0, 0].decode()
    transport.close()
    return label


@pytest.mark.triton
def test_wrong_golden_answers_are_found_before_the_server_hears_of_them(
    served: tuple[Path, Server], bundle: Bundle, tmp_path: Path
) -> None:
    repository, server = served
    wrong = write_variant(tmp_path / "wrong", 0, wrong=True)
    before = (repository / "classifier/config.pbtxt").read_bytes()
    with control_of(server) as control, pytest.raises(CheckFailed, match="scores differ from"):
        publish(repository, wrong, control)
    assert (repository / "classifier/config.pbtxt").read_bytes() == before
    assert classifier_in(repository, None).versions() == sorted(classifier_in(repository, None).versions())


@pytest.mark.triton
@pytest.mark.parametrize("breaks", ["load", "answers"])
def test_what_fails_on_the_server_is_taken_back_without_a_failed_request(
    bundle: Bundle, variants: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """The graph is exchanged after it was checked here: by rubbish, or by another vocabulary's that loads unchecked."""
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    other = repository / "classifier/1/model.onnx"

    def check_then_break(checked: Bundle, version: Path) -> None:
        validate_graph(checked, version)
        (version / "model.onnx").write_bytes(b"rubbish" if breaks == "load" else other.read_bytes())
        (version / SAMPLES).unlink()

    monkeypatch.setattr("clipship.serving.publish.publisher.validate_graph", check_then_break)
    with start_server(repository) as server, control_of(server) as control:
        with load(server, [bundle], clients=2) as result:
            kind = ServingError if breaks == "load" else CheckFailed
            with pytest.raises(kind, match="version 1 is served as before"):
                publish(repository, variants[0], control)
            time.sleep(0.3)
        assert result.failures == []
        assert best_label(server, bundle) in bundle.vocabulary.names
    assert classifier_in(repository, None).versions() == [1]
    (entry,) = read_entries(repository)
    assert (entry.action, entry.version) == ("refused", 2)
    assert entry.reason


@pytest.mark.triton
def test_a_further_vocabulary_is_added_beside_the_first(
    bundle: Bundle, variants: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server, control_of(server) as control:
        assert publish(repository, variants[0], control, vocabulary="birds").before is None
        assert vocabularies_in(repository) == ["birds"]
        assert best_label(server, bundle, "-birds") in variants[0].vocabulary.names
        assert best_label(server, bundle) in bundle.vocabulary.names
        assert publish(repository, variants[1], control, vocabulary="birds").version == 2
        assert best_label(server, bundle, "-birds") in variants[1].vocabulary.names
        with pytest.raises(UsageError, match="lower-case letters"):
            publish(repository, variants[1], control, vocabulary="No Good")
        wrong = write_variant(tmp_path / "wrong", 0, wrong=True)
        with pytest.raises(CheckFailed):
            publish(repository, wrong, control, vocabulary="canary")
        with pytest.raises(UsageError, match=r"no vocabulary 'bird'.*birds"):
            rollback(repository, control, vocabulary="bird")
    assert vocabularies_in(repository) == ["birds"]
    assert repository_problems(repository) == []
    with start_server(repository) as again:  # which checks both vocabularies, by models that check themselves
        assert "nothing was checked" not in again.log()
        assert best_label(again, bundle, "-birds") in variants[1].vocabulary.names


@pytest.mark.triton
def test_admin_protocols_need_the_secret(served: tuple[Path, Server], variants: list[Bundle], tmp_path: Path) -> None:
    repository, server = served
    assert server.secret_file is not None
    assert server.secret_file.stat().st_mode & 0o777 == 0o600
    stranger = tmp_path / "secret"
    stranger.write_text("guessed\n")
    before = classifier_in(repository, None).active()
    with (
        Control(Connection(urls=(server.endpoints.url,)), secret_file=stranger) as control,
        pytest.raises(AccessDenied, match="give --admin-secret FILE"),
    ):
        publish(repository, variants[2], control)
    assert classifier_in(repository, None).active() == before


@pytest.mark.triton
def test_what_does_not_fit_is_refused(
    served: tuple[Path, Server], bundle: Bundle, variants: list[Bundle], tmp_path: Path
) -> None:
    repository, server = served
    foreign = write_variant(tmp_path / "foreign", 0, seed=9)
    other = repository_from_bundle(foreign, tmp_path / "other", backend="python")
    wide = repository_from_bundle(bundle, tmp_path / "wide", backend="python", top_k=CLASSES + 1)
    with control_of(server) as control:
        with pytest.raises(UsageError, match=r"has another image encoder than .* serves .*clipship repository"):
            publish(repository, foreign, control)
        with pytest.raises(UsageError, match=r"does not serve .*other: give the folder that it serves"):
            publish(other, foreign, control)
        with pytest.raises(UsageError, match=r"has 6 classes, the server reports 7 an image: .*--top-k 6"):
            publish(wide, variants[0], control)
        with pytest.raises(UsageError, match="keep is 0"):
            publish(repository, variants[0], control, keep=0)
        with pytest.raises(RepositoryError, match="no model repository there"):
            rollback(tmp_path, control)
        copy = Path(shutil.copytree(repository, tmp_path / "copy"))
        with pytest.raises(CheckFailed, match="it serves another folder"):
            publish(copy, variants[2], control)


def test_plans_are_known_by_the_onnx_file_that_they_were_built_from(bundle: Bundle, tmp_path: Path) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    validate_served_encoder(repository, bundle)
    with pytest.raises(UsageError, match="another image encoder"):
        validate_served_encoder(repository, write_bundle(tmp_path / "seeded", seed=5))


def test_publishes_exclude_each_other(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with locked(tmp_path):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path):
            waiting = pool.submit(second)
            inside.set()
            while "waiting for its end" not in capsys.readouterr().err:
                time.sleep(0.01)
            order.append("first")
        waiting.result(timeout=30)
    assert order == ["first", "second"]


@pytest.mark.triton
def test_what_a_killed_publish_served_is_recorded_by_the_next(
    bundle: Bundle, variants: list[Bundle], tmp_path: Path
) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server, control_of(server) as control:
        publish(repository, variants[0], control)
        (repository / "publications.json").unlink()
        publish(repository, variants[1], control)
        assert rollback(repository, control).version == 2
    entries = read_entries(repository)
    assert [(entry.version, bool(entry.reason)) for entry in entries] == [(2, True), (3, False), (2, False)]


def kill_publishes(served: tuple[Path, Server], bundles: list[Bundle], rounds: int, seed: int) -> None:
    """Publishes killed at random moments: whatever is left is a repository of the old or the new vocabulary."""
    repository, server = served
    chances = random.Random(seed)
    place = ["--repository", str(repository), "--url", server.endpoints.url]
    for number in range(rounds):
        command = [*CLIPSHIP, "vocab", "publish", str(bundles[number % len(bundles)].path), *place]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chances.uniform(0.3, 4.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert repository_problems(repository) == []
        classifier = classifier_in(repository, None)
        facts = classifier.info(classifier.active())
        assert facts.vocabulary_digest in {bundle.vocabulary.digest for bundle in bundles}
        config = classifier.config()
        assert config.parameters["vocabulary_digest"].string_value == facts.vocabulary_digest


@pytest.mark.triton
def test_a_killed_publish_leaves_what_loads(bundle: Bundle, variants: list[Bundle], tmp_path: Path) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server:
        kill_publishes((repository, server), [bundle, *variants], 3, seed=1)
        with control_of(server) as control:
            publish(repository, variants[2], control)
        folders = [child.name for child in (repository / "classifier").iterdir() if child.is_dir()]
        assert all(name.isdecimal() for name in folders), "what was left is gone"
        assert best_label(server, bundle) in variants[2].vocabulary.names
    with start_server(repository) as again:
        assert best_label(again, bundle) in variants[2].vocabulary.names


@pytest.mark.chaos
@pytest.mark.triton
@pytest.mark.timeout(3600)
def test_fifty_killed_publishes(bundle: Bundle, variants: list[Bundle], tmp_path: Path) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python", max_batch_size=8)
    with start_server(repository) as server:
        for block in range(5):
            kill_publishes((repository, server), [bundle, *variants], 10, seed=block)
            with start_server(Path(shutil.copytree(repository, tmp_path / f"copy{block}"))) as copy:
                assert best_label(copy, bundle)
