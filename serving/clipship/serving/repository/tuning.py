"""Serving options: instances, devices, threads, queues, warm-up, CUDA graphs, accelerator, response cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from clipship.core.errors import UsageError
from clipship.serving.repository.backends import BACKENDS, Backend

Device = Literal["auto", "cpu", "gpu"]

ENGINE_CACHE = "/var/cache/clipship/engines"
"""Engine cache of ONNX Runtime's TensorRT accelerator; a volume in a container."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Serving options of a repository. The defaults suit one encoder on one machine.

    Raises:
        UsageError: a number is out of range.
    """

    instances: int = 1
    """Instances of the image encoder, per GPU. A second one overlaps copies and Python work with compute."""
    decoders: int = 1
    """Instances of ``preprocess``, each with one thread per core."""
    device: Device = "auto"
    """Device of the image encoder; "auto": a GPU where the server has one and the backend supports it."""
    gpus: tuple[int, ...] = ()
    """GPU numbers; empty: all."""
    threads: int | None = None
    """Intra-op threads of the encoder on the CPU; None: one per core."""
    max_queue_delay_us: int = 1_000
    """Maximum batching delay in microseconds."""
    max_queue_size: int = 0
    """Maximum number of queued requests; further ones get UNAVAILABLE. 0: no limit.

    Queue limits cost throughput in servers without Triton's core#509, such as 2.51: some batches start up to half a
    second late, and with a time limit more and more of them do.
    """
    queue_timeout_s: float = 0.0
    """Maximum queueing time in seconds; then a request gets UNAVAILABLE. 0: no limit.

    Requests of clients that have left are dropped without it, before the next model runs, except in the encoder's queue
    of the onnxruntime and tensorrt backends; see ``triton_models/python/doors.py``.
    """
    preferred_batch_sizes: tuple[int, ...] = ()
    """Batches that are sent without further delay, e.g. the sizes that a plan or a CUDA graph was built for."""
    warmup_batch_sizes: tuple[int, ...] | None = None
    """Batch sizes of warm-up runs; None: 1 and the maximum."""
    cuda_graphs: bool = False
    """Capture CUDA graphs of a plan for batches of 1, 2, 4 ... images."""
    accelerator: Literal["tensorrt"] | None = None
    """Execution accelerator of the ONNX Runtime backend on a GPU."""
    response_cache: bool = False
    """Cache responses of the encoder and of ``preprocess``, which do not depend on the vocabulary."""

    def __post_init__(self) -> None:
        counts = {"instances": self.instances, "decoders": self.decoders}
        for name, value in {**counts, "threads": 1 if self.threads is None else self.threads}.items():
            if value < 1:
                raise UsageError(f"{name} is {value}: give 1 or more")
        if self.max_queue_delay_us < 0 or self.max_queue_size < 0 or not 0 <= self.queue_timeout_s <= 3600:
            raise UsageError(
                f"max_queue_delay_us {self.max_queue_delay_us}, max_queue_size {self.max_queue_size}, "
                f"queue_timeout_s {self.queue_timeout_s:g}: give 0 or more, and at most 3600 seconds"
            )
        if any(gpu < 0 for gpu in self.gpus) or len(set(self.gpus)) != len(self.gpus):
            raise UsageError(f"gpus {', '.join(map(str, self.gpus))}: give each number once, from 0")
        if self.gpus and self.device == "cpu":
            raise UsageError("GPUs were named for the device cpu: leave them out, or give the device gpu")

    @property
    def on_gpu(self) -> bool:
        """Whether the image encoder needs a GPU."""
        return self.device == "gpu" or bool(self.gpus)

    @property
    def limits_queue(self) -> bool:
        """Whether queues have a limit, of size or of time."""
        return bool(self.max_queue_size or self.queue_timeout_s)

    def validate_backend(self, backend: Backend, max_batch_size: int) -> None:
        """Validate that ``backend`` supports these settings.

        Raises:
            UsageError: it does not; says which backend does.
        """
        for message in self._contradictions(backend):
            raise UsageError(message)
        sizes = {"preferred": self.preferred_batch_sizes, "warm-up": self.warmup_batch_sizes or ()}
        for name, given in sizes.items():
            wrong = [size for size in given if not 1 <= size <= max_batch_size]
            if wrong:
                raise UsageError(f"{name} batch size {wrong[0]}: give 1 to {max_batch_size}, the largest batch")

    def warmups(self, max_batch_size: int) -> tuple[int, ...]:
        """The batch sizes of the warm-up, ascending."""
        given = (1, max_batch_size) if self.warmup_batch_sizes is None else self.warmup_batch_sizes
        return tuple(sorted(set(given)))

    def _contradictions(self, backend: Backend) -> Iterator[str]:
        if backend.device == "cpu" and self.on_gpu:
            able = _names(lambda each: each.device != "cpu")
            yield f"the {backend.name} backend runs on the CPU: give --backend {able} for a GPU"
        if backend.device == "gpu" and self.device == "cpu":
            able = _names(lambda each: each.device != "gpu")
            yield f"the {backend.name} backend runs on GPUs: give --backend {able} for the CPU"
        if backend.device == "gpu" and self.threads is not None:
            yield f"--threads is for an encoder on the CPU: leave it out with --backend {backend.name}"
        if self.cuda_graphs and not backend.takes_plans:
            yield f"CUDA graphs need plans: give --backend {_names(lambda each: each.takes_plans)}, or leave them out"
        if self.accelerator is not None and (self.accelerator not in backend.accelerators or self.device == "cpu"):
            able = _names(lambda each: self.accelerator in each.accelerators)
            yield f"the {self.accelerator} accelerator needs --backend {able} and a GPU"


def _names(suits: Callable[[Backend], bool]) -> str:
    return " or ".join(backend.name for backend in BACKENDS.values() if suits(backend))


def graph_batches(least: int, most: int) -> tuple[int, ...]:
    """Batch sizes of CUDA graphs: powers of two from ``least`` to ``most``, and both."""
    powers = (2**exponent for exponent in range(most.bit_length()))
    return tuple(sorted({least, most, *(size for size in powers if least <= size <= most)}))


DEFAULT_TUNING = Tuning()
