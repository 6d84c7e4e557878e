"""Serving a repository in NVIDIA's container: image, docker command, compose file."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipship.serving.repository.requirements import Requirements
from clipship.serving.server.releases import IMAGE, container_needs_of, release_for, release_of_image, validate_release
from clipship.serving.server.server_args import FLOAT32_IN_FULL, common_options

SECRET_VARIABLE = "CLIPSHIP_ADMIN_SECRET"
_ENGINES_VOLUME = "clipship-engines"
_SECRET_ADVICE = "set it to a secret of your own"
_WITHOUT_GPU = "on a machine without a GPU leave out"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Ports of the container, published on the host's loopback."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def mapped(self) -> tuple[str, ...]:
        """In docker's notation."""
        return tuple(f"127.0.0.1:{port}:{port}" for port in (self.http, self.grpc, self.metrics))


def image_for(repository: Path, given: str | None = None) -> str:
    """The image that can serve ``repository``: ``given``, or a suitable NVIDIA release.

    Raises:
        UsageError: no known release can serve it, or the given one cannot; says what it lacks and what to do.
        RepositoryError: there is no repository.
    """
    if given is None:
        return f"{IMAGE}:{release_for(repository).name}-py3"
    validate_release(release_of_image(given), given, container_needs_of(repository))
    return given


def gpu_remark(repository: Path) -> str | None:
    """How to change the command for a machine without a GPU; None if it needs no change, or a GPU."""
    required = Requirements(repository)
    return f"{_WITHOUT_GPU} --gpus=all" if required.uses_gpu and not required.needs_gpu else None


def container_command(repository: Path, ports: Ports, *, image: str | None = None, cache_mb: int = 256) -> str:
    """The docker command that serves ``repository`` on loopback.

    The admin secret is read from the environment variable :data:`SECRET_VARIABLE`.

    Raises:
        UsageError: as :func:`image_for`.
    """
    required = Requirements(repository)
    # The Python backend passes tensors through /dev/shm, which is only 64 MB by default in a container.
    options = ["--rm", *(["--gpus=all"] if required.uses_gpu else []), "--shm-size=2g", "--stop-timeout=30"]
    for port in ports.mapped():
        options += ["-p", port]
    for name, value in FLOAT32_IN_FULL.items():
        options += ["-e", f"{name}={value}"]
    options += ["-e", SECRET_VARIABLE, "-v", f"{repository.resolve()}:/models:ro"]
    if required.engine_cache is not None:
        options += ["-v", f"{_ENGINES_VOLUME}:{required.engine_cache}"]
    start = _start(repository, ports, cache_mb)
    return shlex.join(["docker", "run", *options, image_for(repository, image), "sh", "-c", start])


def compose_file(repository: Path, ports: Ports, *, image: str | None = None, cache_mb: int = 256) -> str:
    """The same as a Docker Compose file, with a health check.

    Raises:
        UsageError: as :func:`image_for`.
    """
    chosen = image_for(repository, image)
    return "\n".join([_COMPOSE_HEADER, *_compose_lines(repository, ports, chosen, cache_mb)]) + "\n"


_COMPOSE_HEADER = f"""\
# Written by `clipship serve --container --compose`. Start it with
#   {SECRET_VARIABLE}=$(openssl rand -hex 32) docker compose up --detach
# The secret is for the admin protocols (load models, change tracing and logging); clients need none."""


def _compose_lines(repository: Path, ports: Ports, image: str, cache_mb: int) -> Iterator[str]:
    required = Requirements(repository)
    engines = [] if required.engine_cache is None else [f"{_ENGINES_VOLUME}:{required.engine_cache}"]
    health = f"http://localhost:{ports.http}/v2/health/ready"
    # Compose expands $ unless it is doubled.
    service = {
        "image": image,
        "command": ["sh", "-c", _start(repository, ports, cache_mb).replace("$", "$$")],
        "environment": {SECRET_VARIABLE: f"${{{SECRET_VARIABLE}:?{_SECRET_ADVICE}}}", **FLOAT32_IN_FULL},
        "ports": ports.mapped(),
        "volumes": [f"{repository.resolve()}:/models:ro".replace("$", "$$"), *engines],
        "shm_size": "2gb",
        "stop_grace_period": "30s",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "curl", "--fail", "--silent", health],
            "interval": "10s",
            "start_period": "300s",
        },
    }
    yield "services:"
    yield "  triton:"
    yield from (f"    {key}: {json.dumps(value)}" for key, value in service.items())  # JSON is YAML
    if required.uses_gpu:
        yield f"    deploy:{'' if required.needs_gpu else f'  # {_WITHOUT_GPU} this part'}"
        yield "      resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}"
    if engines:
        yield f"volumes: {{{_ENGINES_VOLUME}: {{}}}}"


def _start(repository: Path, ports: Ports, cache_mb: int) -> str:
    """The command in the container. It first installs the Python packages that the image lacks."""
    required = Requirements(repository)
    pillow = importlib.metadata.version("pillow")
    packages = " ".join(("onnxruntime", f"pillow=={pillow}", *required.packages))
    options = ["--model-repository=/models", f"--http-port={ports.http}", f"--grpc-port={ports.grpc}"]
    options += [f"--metrics-port={ports.metrics}", *common_options(repository, f"${SECRET_VARIABLE}", cache_mb)]
    # For the shell: the secret's variable is expanded, and nothing else.
    quoted = [f'"{option}"' if "$" in option else shlex.quote(option) for option in options]
    needs_secret = f': "${{{SECRET_VARIABLE}:?{_SECRET_ADVICE}}}"'
    return f"{needs_secret} && pip install {packages} && exec tritonserver {' '.join(quoted)}"
