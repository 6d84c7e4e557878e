"""A Triton on this machine, as a context manager that leaves no process behind."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from clipship.core.errors import UsageError
from clipship.core.progress import progress
from clipship.serving.errors import ServerFailed
from clipship.serving.repository.requirements import model_names
from clipship.serving.repository.validate import validate_repository
from clipship.serving.server import supervisor
from clipship.serving.server.admin_secret import usual_secret_file, write_secret
from clipship.serving.server.install import Environment
from clipship.serving.server.prepare import prepared_environment
from clipship.serving.server.selfcheck import validate_server
from clipship.serving.server.server_args import DEFAULT_OPTIONS, FLOAT32_IN_FULL, ServerOptions, triton_options

_POLL_S = 0.05
_DRAIN_S = 10
"""Time for running requests to finish when the server is stopped."""
_LOG_LINES = 3
_ERROR_LINE = re.compile(r"(?:[EF]\d{4} [^\]]*\] |[Ee]rror: )(?P<text>.*)")
_HARMLESS = re.compile("NVML|DCGM|CUDA driver|CudaDriver")  # logged by every Triton without a GPU


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Where a server listens."""

    host: str
    grpc_port: int
    http_port: int
    metrics_port: int
    http_host: str = "127.0.0.1"
    """HTTP's host; loopback if gRPC is encrypted, because Triton cannot encrypt HTTP."""

    @property
    def url(self) -> str:
        """HOST:PORT of gRPC, for clients."""
        return f"{self.host}:{self.grpc_port}"


class Server:
    """A running Triton. Leaving the ``with`` block, or :meth:`stop`, ends it; so does the death of this process."""

    def __init__(
        self, process: subprocess.Popen[bytes], endpoints: Endpoints, log: IO[bytes], secret_file: Path | None = None
    ) -> None:
        self._process = process
        self._log = log
        self.endpoints = endpoints
        self.secret_file = secret_file
        """Holds the admin secret while the server runs; None: the admin protocols are open."""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._process.poll() is None

    def stop(self) -> int:
        """Shut the server down after its running requests; returns its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait()
        self._log.close()
        if self.secret_file is not None:
            self.secret_file.unlink(missing_ok=True)
        return code

    def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit code."""
        return self._process.wait()

    def log(self) -> str:
        """What Triton has logged so far."""
        descriptor = self._log.fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0).decode("utf-8", "replace")  # keeps the offset at which Triton writes

    def failure(self) -> ServerFailed:
        """Why the server ended, from the errors in its log."""
        return ServerFailed(f"Triton ended with code {self._process.poll()}: {last_words(self.log())}")


def start_server(
    repository: Path,
    *,
    host: str = "127.0.0.1",
    grpc_port: int = 0,
    http_port: int = 0,
    metrics_port: int = 0,
    log_file: Path | None = None,
    timeout_s: float = 120.0,
    environment: Environment | None = None,
    options: ServerOptions = DEFAULT_OPTIONS,
) -> Server:
    """Start Triton on ``repository`` and return when every model is ready and correct. Port 0 picks a free one.

    Model control is explicit, and needs the secret in ``Server.secret_file``.

    Raises:
        RepositoryError: Triton would not load the repository.
        UsageError: a port is in use, or no Triton here can run the repository; says what to do.
        ServerFailed: Triton ended, or was not ready after ``timeout_s`` seconds; with the last lines of its log.
        CheckFailed: its answers to the golden samples are out of tolerance; see ``selfcheck.py``.
    """
    validate_repository(repository)
    chosen = environment or prepared_environment(repository)
    http_host = "127.0.0.1" if options.secure else host
    endpoints = _endpoints(host, http_host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    secret_file = None if options.open_admin else options.admin_secret or usual_secret_file(endpoints.url)
    secret = None if secret_file is None else write_secret(secret_file)
    log = _opened_log(log_file)
    more = triton_options(options, repository, secret)
    server = Server(_launch(repository, chosen, endpoints, log, more), endpoints, log, secret_file)
    try:
        _wait_until_ready(server, model_names(repository), timeout_s)
        _validate_answers(server, repository, timeout_s)
    except BaseException:
        server.stop()
        raise
    return server


def _validate_answers(server: Server, repository: Path, timeout_s: float) -> None:
    """As :func:`validate_server`; if the server ends meanwhile, its log says why."""
    try:
        validate_server(repository, server.endpoints.http_host, server.endpoints.http_port, timeout_s=timeout_s)
    except ServerFailed as error:
        if not server.running:
            raise server.failure() from error
        raise


def _opened_log(log_file: Path | None) -> IO[bytes]:
    """``log_file``, or an unnamed temporary file."""
    if log_file is not None:
        return log_file.open("w+b")
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise UsageError(f"Triton's log cannot be written ({error}): give --log-file FILE, or set TMPDIR") from error


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """In the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that both shut down cleanly."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_words(log: str) -> str:
    """The cause in a Triton log: the models' errors, else any error, else its last lines."""
    lines = log.splitlines()
    errors = [match["text"] for line in lines if (match := _ERROR_LINE.match(line)) and not _HARMLESS.search(line)]
    failures = [text for text in errors if "failed to load '" in text]
    chosen = failures[:_LOG_LINES] or errors[-_LOG_LINES:] or [line for line in lines if line.strip()][-_LOG_LINES:]
    return " / ".join(text.partition("\\n")[0].strip(' "') for text in chosen) or "its log is empty"


def _endpoints(host: str, http_host: str, *, grpc_port: int, http_port: int, metrics_port: int) -> Endpoints:
    """The given ports, free ones for zeros."""
    wanted = {"grpc": (host, grpc_port), "http": (http_host, http_port), "metrics": (host, metrics_port)}
    with ExitStack() as held:
        ports = {f"{name}_port": _held_port(held, *address, name) for name, address in wanted.items()}
    return Endpoints(host=host, http_host=http_host, **ports)


def _held_port(held: ExitStack, host: str, port: int, name: str) -> int:
    """Bind the port until ``held`` is closed, so that no two of our endpoints get the same one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"{host}:{port} cannot be used for {name} ({error}): stop what listens there, or give another --{name}-port"
        ) from error
    bound: int = listener.getsockname()[1]
    return bound


def _launch(
    repository: Path, environment: Environment, endpoints: Endpoints, log: IO[bytes], more: Iterable[str]
) -> subprocess.Popen[bytes]:
    """Start Triton under the supervisor, in a new session so that Ctrl-C on the terminal reaches only this process."""
    shm_prefix = f"clipship_{os.getpid()}_{uuid.uuid4().hex[:8]}_"
    command = [sys.executable, "-I", str(supervisor.__file__), str(_DRAIN_S + 5), shm_prefix]
    command += [*_triton_command(repository, environment, endpoints, shm_prefix), *more]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**FLOAT32_IN_FULL, **os.environ, **environment.variables, "CLIPSHIP_SHM_PREFIX": shm_prefix},
        start_new_session=True,
    )


def _triton_command(repository: Path, environment: Environment, endpoints: Endpoints, shm_prefix: str) -> list[str]:
    options = {
        "model-repository": repository.resolve(),
        "backend-directory": environment.backends,
        "cache-directory": environment.caches,
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "http-address": endpoints.http_host,
        "http-port": endpoints.http_port,
        "grpc-address": endpoints.host,
        "grpc-port": endpoints.grpc_port,
        "metrics-port": endpoints.metrics_port,
        "metrics-address": endpoints.host,
        "allow-metrics": "true",
        "log-verbose": 0,
        "exit-timeout-secs": _DRAIN_S,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [str(environment.tritonserver), *given]


def _wait_until_ready(server: Server, models: list[str], timeout_s: float) -> None:
    """Poll until the server and all models are ready."""
    deadline = time.monotonic() + timeout_s
    with progress("loading models", len(models)) as report:
        while not _is_ready(server.endpoints, "/v2/health/ready"):
            _validate_alive(server, deadline, timeout_s)
        for done, model in enumerate(models, start=1):
            while not _is_ready(server.endpoints, f"/v2/models/{model}/ready"):
                _validate_alive(server, deadline, timeout_s)
            report(done, model)


def _validate_alive(server: Server, deadline: float, timeout_s: float) -> None:
    if not server.running:
        raise server.failure()
    if time.monotonic() > deadline:
        raise ServerFailed(f"Triton was not ready after {timeout_s:g} s: {last_words(server.log())}")
    time.sleep(_POLL_S)


def _is_ready(endpoints: Endpoints, path: str) -> bool:
    connection = http.client.HTTPConnection(endpoints.http_host, endpoints.http_port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
