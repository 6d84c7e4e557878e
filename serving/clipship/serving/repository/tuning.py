"""How a repository's models run: instances, devices, threads, queues, warm-up, CUDA graphs, accelerators, cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from clipship.core.errors import UsageError

Device = Literal["auto", "cpu", "gpu"]

ENGINE_CACHE = "/var/cache/clipship/engines"
"""Where ONNX Runtime's TensorRT accelerator keeps the engines that it builds; a volume in a container."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of a repository; the defaults suit one machine that serves one encoder.

    Raises:
        UsageError: a number is out of range.
    """

    instances: int = 1
    """Copies of the image encoder, on each GPU where there are several. A second one hides copies and Python's work."""
    decoders: int = 1
    """Copies of ``preprocess``, each with a thread a core."""
    device: Device = "auto"
    """Of the image encoder; "auto": a GPU where there is one and the backend can use it."""
    gpus: tuple[int, ...] = ()
    """Which GPUs, by number; none: all."""
    threads: int | None = None
    """Cores that share one product of the encoder on the CPU; None: all."""
    max_queue_delay_us: int = 1_000
    """How long a request may wait for company, in microseconds."""
    max_queue_size: int = 0
    """Requests waiting; one more is answered with UNAVAILABLE. 0: no limit.

    Any limit of the queue costs throughput in servers without Triton's core#509 (2.51 is one): batches now and then
    start up to half a second late, with a time limit ever more often.
    """
    queue_timeout_s: float = 0.0
    """After so long in a queue a request is answered with UNAVAILABLE. 0: never.

    A request whose client has left is dropped without it, before the next model works on it; with the onnxruntime and
    tensorrt backends not in the encoder's queue, see ``triton_models/python/doors.py``.
    """
    preferred_batch_sizes: tuple[int, ...] = ()
    """Batches that do not wait for more; worth it for sizes that a plan or a CUDA graph was made for."""
    warmup_batch_sizes: tuple[int, ...] | None = None
    """Batches that run while the model loads; None: one image and the largest batch."""
    cuda_graphs: bool = False
    """Launch a plan's work as one, for batches of 1, 2, 4 ... images: less time between kernels of small batches."""
    accelerator: Literal["tensorrt"] | None = None
    """What the ONNX Runtime backend hands the encoder to on a GPU."""
    response_cache: bool = False
    """Answer pixels and files that came before from memory. Not what depends on the vocabulary: that may change."""

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
            raise UsageError("GPUs were named for the device cpu: leave them out, or take the device gpu")

    @property
    def on_gpu(self) -> bool:
        """Whether the image encoder runs on a GPU or not at all."""
        return self.device == "gpu" or bool(self.gpus)

    def validate_backend(self, backend: str, max_batch_size: int) -> None:
        """Nothing when ``backend`` can do all this.

        Raises:
            UsageError: it cannot; says which can.
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

    def _contradictions(self, backend: str) -> Iterator[str]:
        if backend == "python" and (self.device == "gpu" or self.gpus):
            yield "the python backend runs on the CPU: take --backend onnxruntime or tensorrt for a GPU"
        if backend == "tensorrt" and self.device == "cpu":
            yield "TensorRT runs on GPUs: take --backend onnxruntime or python for the CPU"
        if backend == "tensorrt" and self.threads is not None:
            yield "threads are for the encoder on the CPU: leave them out with --backend tensorrt"
        if self.cuda_graphs and backend != "tensorrt":
            yield "CUDA graphs are made of plans: take --backend tensorrt, or leave them out"
        if self.accelerator is not None and (backend != "onnxruntime" or self.device == "cpu"):
            yield "the TensorRT accelerator is of the onnxruntime backend on a GPU: take --backend onnxruntime"


def graph_batches(least: int, most: int) -> tuple[int, ...]:
    """The batches that get a CUDA graph: powers of two from ``least`` to ``most``, and both."""
    powers = (2**exponent for exponent in range(most.bit_length()))
    return tuple(sorted({least, most, *(size for size in powers if least <= size <= most)}))


DEFAULT_TUNING = Tuning()
