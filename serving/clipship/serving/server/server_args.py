"""What ``clipship serve`` tells Triton beyond its repository and its ports, as Triton's own options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.serving.repository.requirements import Requirements
from clipship.serving.server.admin_secret import restriction

FLOAT32_IN_FULL = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Environment of a server: on a GPU float32 products are float32, not TF32, whose 10 bits are out of its tolerance."""

_MIB = 2**20
_SHARED_MEMORY = "/dev/shm"
_LEAST_REGIONS = 32
"""So many regions must fit into the free shared memory."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Security, tracing and memory of a server.

    Raises:
        UsageError: files that are missing or do not go together, or a number out of range.
    """

    open_admin: bool = False
    """Let everybody load models and change tracing and logging."""
    admin_secret: Path | None = None
    """Where the admin protocols' new secret is written; None: a file of the port's in the user's cache folder."""
    tls_cert: Path | None = None
    """The server's certificate chain (PEM): gRPC is encrypted. HTTP, which Triton cannot encrypt, stays on loopback."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    tls_ca: Path | None = None
    """The authorities (PEM) of the clients' certificates: only clients that have one are answered (mTLS)."""
    trace_file: Path | None = None
    """Timestamps of traced requests, Triton's JSON, written when the server ends."""
    trace_url: str | None = None
    """An OpenTelemetry collector (OTLP over HTTP) that gets the traces instead, e.g. http://localhost:4318/v1/traces."""
    trace_rate: int = 1000
    """One request in so many is traced."""
    cache_mb: int = 256
    """The response cache, for repositories that use it, in MiB."""
    pinned_memory_mb: int = 256
    """Page-locked memory for copies to GPUs, in MiB."""
    cuda_memory_mb: int = 64
    """GPU memory for tensors between models, in MiB; the backends' own is not among it."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("the certificate and its key go together: give --tls-cert and --tls-key, or neither")
        if self.tls_ca is not None and self.tls_cert is None:
            raise UsageError("--tls-ca asks clients for certificates: give --tls-cert and --tls-key, too")
        for file in (self.tls_cert, self.tls_key, self.tls_ca):
            if file is not None and not file.is_file():
                raise UsageError(f"{file}: no such file: give a PEM file")
        if self.trace_file is not None and self.trace_url is not None:
            raise UsageError("traces go to a file or to a collector: give --trace-file or --trace-url")
        if self.trace_rate < 1 or min(self.cache_mb, self.pinned_memory_mb, self.cuda_memory_mb) < 0:
            raise UsageError("give a --trace-rate of 1 or more, and memory of 0 MiB or more")

    @property
    def secure(self) -> bool:
        """Whether gRPC is encrypted."""
        return self.tls_cert is not None


DEFAULT_OPTIONS = ServerOptions()


def triton_options(options: ServerOptions, repository: Path, secret: str | None) -> Iterator[str]:
    """Triton's command line for ``options``; ``secret``: the admin protocols', None leaves them open."""
    yield "--metrics-config=summary_latencies=true"
    if secret is not None:
        yield f"--grpc-restricted-protocol={restriction(secret)}"
        yield f"--http-restricted-api={restriction(secret)}"
    yield from _tls(options)
    yield from _tracing(options)
    yield from backend_options(repository)
    required = Requirements(repository)
    if required.response_cache:
        yield f"--cache-config=local,size={options.cache_mb * _MIB}"
    if required.uses_gpu:
        yield f"--pinned-memory-pool-byte-size={options.pinned_memory_mb * _MIB}"
        yield f"--cuda-memory-pool-byte-size=0:{options.cuda_memory_mb * _MIB}"
    region_bytes = _region_bytes(required.largest_message_bytes)
    yield f"--backend-config=python,shm-default-byte-size={region_bytes}"
    yield f"--backend-config=python,shm-growth-byte-size={region_bytes}"


def backend_options(repository: Path) -> Iterator[str]:
    """Backend settings without which the models of ``repository`` do not load."""
    if Requirements(repository).version_compatible_plans is not None:  # these plans bring code
        yield "--backend-config=tensorrt,version-compatible=true"


def _region_bytes(message_bytes: int) -> int:
    """What each Python model's tensors travel through: room for a full batch, at most a small share of what is free.

    By itself such a region starts at 1 MiB, and grows in steps as small while the first large batches wait.
    """
    memory = os.statvfs(_SHARED_MEMORY)
    share = memory.f_bavail * memory.f_frsize // _LEAST_REGIONS
    return max(_MIB, min(share, message_bytes))


def _tls(options: ServerOptions) -> Iterator[str]:
    if options.tls_cert is None or options.tls_key is None:
        return
    yield "--grpc-use-ssl=true"
    yield f"--grpc-server-cert={options.tls_cert.resolve()}"
    yield f"--grpc-server-key={options.tls_key.resolve()}"
    if options.tls_ca is not None:
        yield "--grpc-use-ssl-mutual=true"
        yield f"--grpc-root-cert={options.tls_ca.resolve()}"


def _tracing(options: ServerOptions) -> Iterator[str]:
    if options.trace_file is None and options.trace_url is None:
        return
    yield "--trace-config=level=TIMESTAMPS"
    yield f"--trace-config=rate={options.trace_rate}"
    if options.trace_url is not None:
        yield "--trace-config=mode=opentelemetry"
        yield f"--trace-config=opentelemetry,url={options.trace_url}"
        yield "--trace-config=opentelemetry,resource=service.name=clipship"
    elif options.trace_file is not None:
        yield "--trace-config=mode=triton"
        yield f"--trace-config=triton,file={options.trace_file.resolve()}"
