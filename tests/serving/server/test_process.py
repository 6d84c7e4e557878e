"""Starting and ending a real Triton."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import UsageError
from clipship.serving.client.classifier import Classifier
from clipship.serving.errors import (
    ModelsMissing,
    RepositoryError,
    RequestRejected,
    ServerFailed,
    ServerUnreachable,
    ServingError,
)
from clipship.serving.repository.requirements import Requirements, model_names
from clipship.serving.repository.tuning import Tuning
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server import install as environment_module
from clipship.serving.server.container import Ports, compose_file, container_command, image_for
from clipship.serving.server.install import Environment, triton_environment
from clipship.serving.server.process import Server, last_words, start_server
from clipship.serving.server.server_args import ServerOptions
from clipship.serving.transport.connection import Connection
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import EMBED_DIM
from tests.serving.processes import CLIPSHIP, ENVIRONMENT, children_of, clipship
from tests.serving.publish.vocabularies import write_variant


def descendants(pid: int) -> set[int]:
    """The processes below ``pid``."""
    found = set(children_of(pid))
    return found.union(*map(descendants, found))


def listening() -> set[tuple[str, int]]:
    """Addresses in the kernel's hexadecimal form, and ports, of every listening TCP socket."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    sockets = [words[1].split(":") for words in lines if words[3] == "0A"]
    return {(address, int(port, 16)) for address, port in sockets}


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def regions(pid: int) -> list[Path]:
    """What the servers started by process ``pid`` have in shared memory."""
    return list(Path("/dev/shm").glob(f"clipship_{pid}_*"))


@contextmanager
def serving(repository: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """``clipship serve`` in a process group of its own, once it is ready, and what it printed."""
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    command = [*CLIPSHIP, "serve", str(repository), *ports, *arguments, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline() or "null")
        finally:
            process.kill()


@pytest.mark.triton
def test_every_model_is_ready_and_listens_on_loopback_only(server: Server) -> None:
    ports = {server.endpoints.grpc_port, server.endpoints.http_port, server.endpoints.metrics_port}
    assert len(ports) == 3
    assert server.endpoints.host == "127.0.0.1"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    for port in ports:
        assert {address for address, where in listening() if where == port} <= loopback
        socket.create_connection(("127.0.0.1", port), timeout=2).close()


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_in_order(repository: Path, number: signal.Signals) -> None:
    with serving(repository) as (process, endpoints):
        below = descendants(process.pid)
        assert len(below) == 7, "the guard, Triton and five models"
        assert len(regions(process.pid)) == 9, "of five models, and two doors with the ways to them"
        assert clipship("classify", "nowhere", "--url", f"127.0.0.1:{endpoints['grpc_port']}").returncode == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.split() == ["stopping"]
    assert alive(below) == set()
    assert regions(process.pid) == []


@pytest.mark.triton
def test_an_open_address_gets_one_line_of_warning(repository: Path) -> None:
    with serving(repository, "--host", "0.0.0.0", "--open-admin") as (process, endpoints):
        assert endpoints["admin_secret"] is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert errors.splitlines() == [
        "0.0.0.0 is reachable from other machines without encryption: give --tls-cert and --tls-key",
        "stopping",
    ]


@pytest.mark.triton
def test_ctrl_c_on_a_terminal_reaches_the_whole_group(repository: Path) -> None:
    """The terminal signals serve's group; Triton is in a session of its own and is ended by serve."""
    with serving(repository) as (process, _):
        below = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert alive(below) == set()


@pytest.mark.triton
def test_killing_serve_takes_everything_down(repository: Path) -> None:
    with serving(repository) as (process, _):
        below = descendants(process.pid)
        process.kill()
        assert wait_for(lambda: not alive(below)), f"still alive: {alive(below)}"
    assert wait_for(lambda: not regions(process.pid))


@pytest.mark.triton
def test_killing_the_guard_takes_everything_down(repository: Path) -> None:
    with serving(repository) as (process, _):
        below = descendants(process.pid)
        (guard,) = {pid for pid in below if b"supervisor.py" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        os.kill(guard, signal.SIGKILL)
        assert wait_for(lambda: not alive(below - {guard}))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("clipship: Triton ended with code")
    for region in regions(process.pid):
        region.unlink()


@pytest.mark.triton
def test_a_dying_triton_ends_serve_with_its_last_words(repository: Path) -> None:
    with serving(repository) as (process, _):
        below = descendants(process.pid)
        (triton,) = {pid for pid in below if Path(f"/proc/{pid}/comm").read_text().strip() == "tritonserver"}
        os.kill(triton, signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("clipship: Triton ended with code 137")
    assert alive(below) == set()
    assert regions(process.pid) == []


@pytest.mark.triton
def test_a_model_that_does_not_load_is_named(repository: Path, bundle: Bundle, tmp_path: Path) -> None:
    broken = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    (broken / "image_encoder/1/model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ServerFailed, match=r"failed to load 'image_encoder'.*InvalidProtobuf"):
        start_server(broken)
    assert regions(os.getpid()) == [] or len(regions(os.getpid())) == 9, "only the shared server's are left"


@pytest.mark.triton
def test_the_log_goes_where_it_is_told(repository: Path, server: Server, tmp_path: Path) -> None:
    assert "Started GRPCInferenceService" in server.log()
    (triton,) = children_of(server._process.pid)
    assert b"NVIDIA_TF32_OVERRIDE=0" in Path(f"/proc/{triton}/environ").read_bytes().split(b"\0")
    with start_server(repository, log_file=tmp_path / "log.txt") as running:
        assert running.log()
    assert "Waiting for in-flight requests to complete" in (tmp_path / "log.txt").read_text()


@pytest.mark.triton
def test_a_server_that_is_late_is_stopped(repository: Path) -> None:
    before = descendants(os.getpid())
    with pytest.raises(ServerFailed, match=r"not ready after 0\.2 s"):
        start_server(repository, timeout_s=0.2)
    assert wait_for(lambda: descendants(os.getpid()) <= before)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_a_port_in_use_is_named(repository: Path, server: Server, name: str) -> None:
    port = getattr(server.endpoints, f"{name}_port")
    done = clipship("serve", repository, f"--{name}-port", port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be used for {name}" in done.stderr
    assert f"--{name}-port" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.triton
def test_no_server_is_said_at_once(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
        started_s = time.monotonic()
        with pytest.raises(ServerUnreachable, match=rf"no Triton answers at {url}.*clipship serve"):
            Classifier(url)
    assert time.monotonic() - started_s < 5
    with pytest.raises(ServerUnreachable):
        Classifier(f"127.0.0.1:{server.endpoints.http_port}")


def test_something_that_never_answers_is_no_triton() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerUnreachable, match=rf"no Triton answers at {url} within 0\.5 s"):
            Classifier(Connection(urls=(url,), connect_timeout_s=0.5))


@pytest.mark.triton
def test_a_server_without_our_models(tmp_path: Path, bundle: Bundle) -> None:
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="python")
    for name in set(model_names(repository)) - {"classifier"}:
        (repository / name).rename(tmp_path / name)
    missing = pytest.raises(ModelsMissing, match="does not serve clipship's models; it has classifier")
    with start_server(repository, options=ServerOptions(open_admin=True)) as running, missing:
        assert running.secret_file is None
        Classifier(running.endpoints.url)


def test_a_bad_repository_is_not_started(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no model repository there"):
        start_server(tmp_path)


def test_backends_the_embedded_server_lacks(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "_environment_on_path", lambda: None)
    repository = repository_from_bundle(bundle, tmp_path / "repository", backend="onnxruntime")
    with pytest.raises(UsageError, match=r"^no tritonserver is on the PATH, .* --backend python.*container"):
        triton_environment(Requirements(repository).backends)


def test_a_missing_python_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment_module, "_python_version", lambda: "3.99")
    with pytest.raises(
        UsageError, match=r"libpython3\.99\.so\.1\.0, which is missing: run apt-get install libpython3\.99"
    ):
        environment_module.embedded_environment()


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPSHIP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ServingError, match="could not be installed: ERROR: No matching distribution"):
        environment_module.embedded_environment()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_two_processes_install_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    calls: list[Path] = []

    def install(folder: Path, requirements: object) -> None:
        calls.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "complete").touch()

    monkeypatch.setenv("CLIPSHIP_CACHE", str(tmp_path))
    monkeypatch.setattr(environment_module, "_install", install)
    with ThreadPoolExecutor(4) as pool:
        found: list[Environment] = list(pool.map(lambda _: environment_module.embedded_environment(), range(4)))
    assert len(calls) == 1
    assert len({environment.tritonserver for environment in found}) == 1


def test_the_container_command(repository: Path) -> None:
    command = container_command(repository, Ports(http=1, grpc=2, metrics=3))
    words = shlex.split(command)
    assert words[:3] == ["docker", "run", "--rm"]
    assert {f"{repository.resolve()}:/models:ro", "127.0.0.1:2:2", "--shm-size=2g", "NVIDIA_TF32_OVERRIDE=0"} <= set(
        words
    )
    assert "exec tritonserver --model-repository=/models" in words[-1]
    assert "model-repository,trace,logging:clipship-admin=$CLIPSHIP_ADMIN_SECRET" in words[-1]
    done = clipship("serve", repository, "--container", "--image", "example/triton:1")
    assert done.returncode == 0
    assert " example/triton:1 sh -c " in done.stdout


def test_the_compose_file_says_the_same(repository: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert clipship("serve", repository, "--container", "--compose", tmp_path / "compose.yaml").returncode == 0
    text = (tmp_path / "compose.yaml").read_text()
    assert text == compose_file(repository, Ports())
    service = yaml.safe_load(text)["services"]["triton"]
    assert service["image"] == image_for(repository) == "nvcr.io/nvidia/tritonserver:25.08-py3"
    assert service["ports"] == list(Ports().mapped())
    assert service["environment"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert service["command"][2].replace("$$", "$") == shlex.split(container_command(repository, Ports()))[-1]
    assert clipship("serve", repository, "--compose", tmp_path / "other.yaml").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tls_cert": Path(__file__)}, "give both --tls-cert and --tls-key, or neither"),
        ({"tls_ca": Path(__file__)}, "--tls-ca needs --tls-cert and --tls-key"),
        ({"tls_cert": Path("absent"), "tls_key": Path("absent")}, "absent: no such file: give a PEM file"),
        ({"trace_file": Path("t"), "trace_url": "http://localhost:4318"}, "give --trace-file or --trace-url"),
        ({"trace_rate": 0}, "give a --trace-rate of 1 or more"),
        ({"cache_mb": -1}, "memory of 0 MiB or more"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**arguments)


@pytest.mark.triton
def test_a_guarded_server_with_tls_traces_and_a_cache(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    """Everything that is an option at once, with a client that has the right certificate, and one that has none."""
    files = write_certificates(tmp_path)
    repository = repository_from_bundle(
        bundle, tmp_path / "r", backend="python", max_batch_size=8, tuning=Tuning(response_cache=True, decoders=2)
    )
    server_files: dict[str, Any] = {f"tls_{name}": files[f"server_{name}"] for name in ("cert", "key")}
    options = ServerOptions(**server_files, tls_ca=files["ca"], trace_file=tmp_path / "trace.json", trace_rate=1)
    trusted: dict[str, Any] = {
        "ca_file": files["ca"],
        "certificate_file": files["client_cert"],
        "key_file": files["client_key"],
    }
    with start_server(repository, options=options) as running:
        url = running.endpoints.url
        with Classifier(Connection(urls=(url,), **trusted)) as classifier:
            first, again = (classifier.classify([photos / "05.jpg"]) for _ in range(2))
        assert first == again
        assert first[0].label in bundle.vocabulary.names
        with pytest.raises(ServerUnreachable):
            Classifier(Connection(urls=(url,), ca_file=files["ca"], connect_timeout_s=2))
        metrics = urlopen(f"http://{running.endpoints.host}:{running.endpoints.metrics_port}/metrics").read().decode()
        assert 'nv_cache_num_hits_per_model{model="image_encoder",version="1"} 1' in metrics
    assert any(step.get("model_name") == "image_encoder" for step in json.loads((tmp_path / "trace.json").read_text()))


def write_certificates(folder: Path) -> dict[str, Path]:
    """An authority, and certificates of a server on 127.0.0.1 and of a client."""
    names = ("ca", "server", "client")
    files = {f"{name}_{kind}": folder / f"{name}.{kind}" for name in names for kind in ("cert", "key")}
    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    authority = ["-CA", str(files["ca_cert"]), "-CAkey", str(files["ca_key"])]
    for name in names:
        more = [] if name == "ca" else [*authority, "-addext", "subjectAltName=IP:127.0.0.1"]
        out = ["-keyout", str(files[f"{name}_key"]), "-out", str(files[f"{name}_cert"])]
        subprocess.run(
            ["openssl", "req", "-x509", *key, "-subj", f"/CN={name}", *out, *more], check=True, capture_output=True
        )
    return {**files, "ca": files["ca_cert"]}


@pytest.mark.triton
def test_a_tuned_repository_of_two_vocabularies_is_served(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    birds = write_variant(tmp_path / "birds", 1)
    tuning = Tuning(instances=2, threads=1, preferred_batch_sizes=(4,), warmup_batch_sizes=(1, 3), device="cpu")
    settings: dict[str, Any] = {"max_batch_size": 8, "tuning": tuning, "others": {"birds": birds}}
    repository = repository_from_bundle(bundle, tmp_path / "r", backend="python", **settings)
    with start_server(repository) as running:
        for vocabulary, names in ((None, bundle.vocabulary.names), ("birds", birds.vocabulary.names)):
            for decode in ("client", "server"):
                with Classifier(running.endpoints.url, vocabulary=vocabulary, decode=decode) as classifier:
                    results = classifier.classify(sorted(photos.glob("*.jpg")))
                assert {label for result in results for label in result.labels} <= set(names)


@pytest.mark.triton
def test_any_outputs_can_be_asked_for_and_no_others_come(bundle: Bundle, server: Server) -> None:
    """An ensemble whose output is also a step's input fails here: see passthrough_tensor in core/tensors.py."""
    from tritonclient import grpc

    golden = bundle.golden()
    image = grpc.InferInput("image", list(golden.pixels.shape), "UINT8")
    image.set_data_from_numpy(golden.pixels)
    names = ("scores", "indices", "labels", "embedding")
    subsets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(1, 5))
    with grpc.InferenceServerClient(server.endpoints.url) as client:
        for asked in subsets:
            answer = client.infer("classify", [image], outputs=[grpc.InferRequestedOutput(name) for name in asked])
            assert {output.name for output in answer.get_response().outputs} == set(asked)
    np.testing.assert_allclose(answer.as_numpy("embedding"), golden.embedding, atol=1e-5)


BAD_REQUESTS: list[tuple[str, dict[str, NDArray[Any]], list[str]]] = [
    ("classify", {"image": np.zeros((1, 8, 8, 3), np.uint8)}, ["scores"]),
    ("classify", {"image": np.zeros((32, 32, 3), np.uint8)}, ["scores"]),
    ("classify", {"image": np.zeros((1, 32, 32, 3), np.float32)}, ["scores"]),
    ("classify", {"image": np.zeros((9, 32, 32, 3), np.uint8)}, ["scores"]),
    ("classify", {"image": np.zeros((0, 32, 32, 3), np.uint8)}, ["scores"]),
    ("classify", {"pixels": np.zeros((1, 32, 32, 3), np.uint8)}, ["scores"]),
    ("classify", {"image": np.zeros((1, 32, 32, 3), np.uint8)}, ["logits"]),
    ("classify", {"image": np.full((1, 32, 32, 3), np.nan, np.float32)}, ["scores"]),
    ("classify_encoded", {"encoded": np.zeros((1, 4), np.uint8)}, ["scores"]),
    ("classify_encoded", {"encoded": np.array([[b"a", b"b"]], np.object_)}, ["scores"]),
    ("classifier", {"embedding": np.zeros((1, 3), np.float32)}, ["scores"]),
    ("absent", {"image": np.zeros((1, 32, 32, 3), np.uint8)}, ["scores"]),
]


@pytest.mark.triton
def test_requests_that_do_not_fit_get_tritons_error_and_the_server_lives(
    bundle: Bundle, server: Server, photos: Path
) -> None:
    transport = TritonTransport(server.endpoints.url)
    for model, inputs, outputs in BAD_REQUESTS:
        with pytest.raises((RequestRejected, ModelsMissing)):
            transport.infer(model, inputs, outputs, timeout_s=20).result()
    nan = np.full((1, EMBED_DIM), np.nan, np.float32)
    answer = transport.infer("classifier", {"embedding": nan}, ["scores"], timeout_s=20).result()
    assert np.isnan(answer["scores"]).any(), "NaN in, NaN out: nothing is invented"
    transport.close()
    with Classifier(server.endpoints.url) as classifier:
        assert classifier.classify([photos / "05.jpg"])[0].label in bundle.vocabulary.names


def test_last_words() -> None:
    log = (
        'E1122 03:13:26.547843 5877 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        'I1122 03:13:26.550531 5877 model_lifecycle.cc:472] "loading: classifier:1"\n'
        "Error: Failed to initialize NVML\n"
        'E1122 03:13:30.114652 5877 backend_model.cc:692] "ERROR: Failed to create instance"\n'
        "E1122 03:13:30.114819 58 model_lifecycle.cc:642] \"failed to load 'a' version 1: Internal: no x\\n\\nAt: f\"\n"
        "error: creating server: Internal - failed to load all models\n"
    )
    assert last_words(log) == "failed to load 'a' version 1: Internal: no x"
    assert last_words(log.splitlines()[5]) == "creating server: Internal - failed to load all models"
    assert last_words("plain\nwords\n") == "plain / words"
    assert last_words("") == "its log is empty"
