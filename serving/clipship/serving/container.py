"""NVIDIA's container with a repository in it: the image for a plan's TensorRT, the command, the compose file."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.serving.check import packages_of, tensorrt_version_of, uses_accelerator, uses_cache, uses_gpu
from clipship.serving.secret import restriction
from clipship.serving.tuning import ENGINE_CACHE

IMAGE = "nvcr.io/nvidia/tritonserver"
USUAL_RELEASE = "25.08"
"""For repositories without plans."""

RELEASES: Mapping[str, str] = {
    "10.3.0": "24.08",
    "10.4.0": "24.09",
    "10.5.0": "24.10",
    "10.6.0": "24.11",
    "10.7.0": "24.12",
    "10.8.0": "25.02",
    "10.9.0": "25.04",
    "10.10.0": "25.05",
    "10.11.0": "25.07",
    "10.13.2": "25.08",
    "10.13.3": "25.10",
    "10.14.1": "25.12",
}
"""TensorRT -> the newest NGC release of the Triton container (the py3 images) that has it: NVIDIA's Frameworks Support
Matrix, https://docs.nvidia.com/deeplearning/frameworks/support-matrix/. A plan loads in its own TensorRT only."""

SECRET_VARIABLE = "CLIPSHIP_ADMIN_SECRET"
_ENGINES_VOLUME = "clipship-engines"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Of the container, on the host's loopback."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def mapped(self) -> tuple[str, ...]:
        """As docker writes them."""
        return tuple(f"127.0.0.1:{port}:{port}" for port in (self.http, self.grpc, self.metrics))


def image_for(repository: Path) -> str:
    """The image with the TensorRT of the repository's plans.

    Raises:
        UsageError: no release is known to have it; says which are.
        RepositoryError: there is no repository.
    """
    version = tensorrt_version_of(repository)
    if version is None:
        return f"{IMAGE}:{USUAL_RELEASE}-py3"
    release = RELEASES.get(".".join(version.split(".")[:3]))
    if release is None:
        raise UsageError(
            f"no release of NVIDIA's container is known to have TensorRT {version} (known: {', '.join(RELEASES)}): "
            "give its name with --image, or build the plan with one of these"
        )
    return f"{IMAGE}:{release}-py3"


def container_command(repository: Path, ports: Ports, *, image: str | None = None, cache_mb: int = 256) -> str:
    """The shell command that serves ``repository`` in NVIDIA's container, on loopback.

    The secret of the admin protocols is taken from the environment variable :data:`SECRET_VARIABLE`.

    Raises:
        UsageError: as :func:`image_for`.
    """
    # Tensors of the Python backend travel through /dev/shm, of which a container has 64 MB unless told otherwise.
    options = ["--rm", *(["--gpus=all"] if uses_gpu(repository) else []), "--shm-size=2g", "--stop-timeout=30"]
    for port in ports.mapped():
        options += ["-p", port]
    options += ["-e", SECRET_VARIABLE, "-v", f"{repository.resolve()}:/models:ro"]
    if uses_accelerator(repository):
        options += ["-v", f"{_ENGINES_VOLUME}:{ENGINE_CACHE}"]
    start = _start(repository, ports, cache_mb)
    return shlex.join(["docker", "run", *options, image or image_for(repository), "sh", "-c", start])


def compose_file(repository: Path, ports: Ports, *, image: str | None = None, cache_mb: int = 256) -> str:
    """The same as a compose file (the Compose Specification), with a health check.

    Raises:
        UsageError: as :func:`image_for`.
    """
    chosen = image or image_for(repository)
    return "\n".join([_COMPOSE_HEADER, *_compose_lines(repository, ports, chosen, cache_mb)]) + "\n"


_COMPOSE_HEADER = f"""\
# Written by `clipship serve --container --compose`. Start it with
#   {SECRET_VARIABLE}=$(openssl rand -hex 32) docker compose up --detach
# The secret is for those who load models and change tracing and logging; clients need none."""


def _compose_lines(repository: Path, ports: Ports, image: str, cache_mb: int) -> Iterator[str]:
    # JSON strings are YAML strings; compose takes $ for its own variables unless it is doubled.
    command = json.dumps(_start(repository, ports, cache_mb).replace("$", "$$"))
    yield "services:"
    yield "  triton:"
    yield f"    image: {json.dumps(image)}"
    yield f'    command: ["sh", "-c", {command}]'
    yield "    environment:"
    yield f"      {SECRET_VARIABLE}: ${{{SECRET_VARIABLE}:?set it to a secret of your own}}"
    yield "    ports:"
    yield from (f"      - {json.dumps(port)}" for port in ports.mapped())
    yield "    volumes:"
    yield f"      - {json.dumps(f'{repository.resolve()}:/models:ro'.replace('$', '$$'))}"
    if uses_accelerator(repository):
        yield f"      - {json.dumps(f'{_ENGINES_VOLUME}:{ENGINE_CACHE}')}"
    yield "    shm_size: 2gb"
    yield "    stop_grace_period: 30s"
    yield "    restart: unless-stopped"
    yield "    healthcheck:"
    yield f'      test: ["CMD", "curl", "--fail", "--silent", "http://localhost:{ports.http}/v2/health/ready"]'
    yield "      interval: 10s"
    yield "      start_period: 300s"
    if uses_gpu(repository):
        yield "    deploy:"
        yield "      resources:"
        yield "        reservations:"
        yield "          devices:"
        yield "            - {driver: nvidia, count: all, capabilities: [gpu]}"
    if uses_accelerator(repository):
        yield "volumes:"
        yield f"  {_ENGINES_VOLUME}: {{}}"


def _start(repository: Path, ports: Ports, cache_mb: int) -> str:
    """What runs in the container. Its Python lacks what the models in Python need: that is installed first."""
    pillow = importlib.metadata.version("pillow")
    packages = " ".join(("onnxruntime", f"pillow=={pillow}", *packages_of(repository)))
    options = [
        "--model-repository=/models",
        "--model-control-mode=explicit",
        "'--load-model=*'",
        "--disable-auto-complete-config",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--metrics-config=summary_latencies=true",
        f'"--grpc-restricted-protocol={restriction(f"${SECRET_VARIABLE}")}"',
        f'"--http-restricted-api={restriction(f"${SECRET_VARIABLE}")}"',
    ]
    if uses_cache(repository):
        options.append(f"--cache-config=local,size={cache_mb * 2**20}")
    needs_secret = f': "${{{SECRET_VARIABLE}:?set it to a secret of your own}}"'
    return f"{needs_secret} && pip install {packages} && exec tritonserver {' '.join(options)}"
