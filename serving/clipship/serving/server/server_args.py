"""Triton's command-line options for security, tracing and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.serving.repository.requirements import Requirements
from clipship.serving.server.admin_secret import restriction

FLOAT32_IN_FULL = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Environment of a server: disables TF32, whose 10 bits are out of float32's tolerance."""

_MIB = 2**20
_SHARED_MEMORY = "/dev/shm"
_LEAST_REGIONS = 32
"""This many regions must fit into the free shared memory."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Security, tracing and memory of a server.

    Raises:
        UsageError: files are missing or do not match, or a number is out of range.
    """

    open_admin: bool = False
    """Leave the admin protocols (load, trace, log) unrestricted."""
    admin_secret: Path | None = None
    """File for the new admin secret; None: one per port in the user's cache folder."""
    tls_cert: Path | None = None
    """Server certificate chain (PEM); encrypts gRPC. HTTP, which Triton cannot encrypt, stays on loopback."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM)."""
    tls_ca: Path | None = None
    """CA of client certificates (PEM): only clients that have one are served (mTLS)."""
    trace_file: Path | None = None
    """File for timestamps of traced requests, in Triton's JSON, written at exit."""
    trace_url: str | None = None
    """An OpenTelemetry collector (OTLP over HTTP) for the traces instead, e.g. http://localhost:4318/v1/traces."""
    trace_rate: int = 1000
    """Trace one request in this many."""
    cache_mb: int = 256
    """Response cache in MiB, for repositories that use it."""
    pinned_memory_mb: int = 256
    """Pinned memory pool in MiB."""
    cuda_memory_mb: int = 64
    """CUDA memory pool per GPU in MiB, for tensors between models."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("give both --tls-cert and --tls-key, or neither")
        if self.tls_ca is not None and self.tls_cert is None:
            raise UsageError("--tls-ca needs --tls-cert and --tls-key")
        for file in (self.tls_cert, self.tls_key, self.tls_ca):
            if file is not None and not file.is_file():
                raise UsageError(f"{file}: no such file: give a PEM file")
        if self.trace_file is not None and self.trace_url is not None:
            raise UsageError("give --trace-file or --trace-url, not both")
        if self.trace_rate < 1 or min(self.cache_mb, self.pinned_memory_mb, self.cuda_memory_mb) < 0:
            raise UsageError("give a --trace-rate of 1 or more, and memory of 0 MiB or more")

    @property
    def secure(self) -> bool:
        """Whether gRPC is encrypted."""
        return self.tls_cert is not None


DEFAULT_OPTIONS = ServerOptions()


def triton_options(options: ServerOptions, repository: Path, secret: str | None) -> Iterator[str]:
    """Triton's command line for ``options``; ``secret``: the admin secret, None: no restriction."""
    yield from common_options(repository, secret, options.cache_mb)
    yield from _tls(options)
    yield from _tracing(options)
    required = Requirements(repository)
    if required.uses_gpu:
        yield f"--pinned-memory-pool-byte-size={options.pinned_memory_mb * _MIB}"
        yield f"--cuda-memory-pool-byte-size=0:{options.cuda_memory_mb * _MIB}"
    region_bytes = _region_bytes(required.largest_message_bytes)
    yield f"--backend-config=python,shm-default-byte-size={region_bytes}"
    yield f"--backend-config=python,shm-growth-byte-size={region_bytes}"


def common_options(repository: Path, secret: str | None, cache_mb: int) -> Iterator[str]:
    """Options that any server of ``repository`` needs, here or in a container."""
    required = Requirements(repository)
    yield "--model-control-mode=explicit"
    yield "--load-model=*"
    yield "--disable-auto-complete-config"
    yield "--metrics-config=summary_latencies=true"
    if secret is not None:
        yield f"--grpc-restricted-protocol={restriction(secret)}"
        yield f"--http-restricted-api={restriction(secret)}"
    if required.version_compatible_plans is not None:  # these plans contain code, which must be allowed
        yield "--backend-config=tensorrt,version-compatible=true"
    if required.response_cache:
        yield f"--cache-config=local,size={cache_mb * _MIB}"


def _region_bytes(message_bytes: int) -> int:
    """Size of a Python model's shared-memory region: a full batch, within a small share of the free memory.

    Triton's default starts at 1 MiB and grows in steps of 1 MiB, which delays the first large batches.
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
