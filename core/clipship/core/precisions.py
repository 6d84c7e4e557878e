"""Every precision of the image encoder in one table: its tolerance, and which runtimes and processors compute it.

A new precision is a row here, its converter in ``clipship/export/precision/``, and a test. The command line, the gates,
the manifest's reader and the choice of a runtime read this table.

This file needs the standard library only; a copy of it lies beside the models that run inside Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""The type of a variant's matrix products. LayerNorm, softmax, the unit length and the logits stay float32 in all."""

REDUCED: tuple[Precision, ...] = tuple(name for name in get_args(Precision) if name != "fp32")
"""What a bundle can have beside float32."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest differences from the reference that pass; an infinite limit is none."""

    max_abs: float = math.inf
    """Largest difference of any value of the unit features."""
    top1_agreement: float
    """Smallest share of images whose best class is the same, near-ties excused (``core/comparison.py``)."""
    min_cosine: float = -math.inf
    mean_cosine: float = -math.inf
    min_centred_cosine: float = -math.inf
    mean_centred_cosine: float = -math.inf
    max_norm_error: float = 1e-3
    """Largest difference of a feature's length from 1; a cosine cannot see a missing normalisation."""
    max_score: float = 1e-3
    """Largest difference of a served probability."""

    def error_lengths(self, centred_lengths: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
        """The length [N] of an error that just passes on average, for features with these lengths after centring."""
        import numpy as np

        if math.isfinite(self.max_abs):
            return np.full_like(centred_lengths, max(self.max_abs, 0.0) * math.sqrt(dim))
        if math.isfinite(self.mean_centred_cosine):
            return centred_lengths * math.sqrt(2 - 2 * self.mean_centred_cosine)
        return np.full_like(centred_lengths, math.sqrt(2 - 2 * max(self.mean_cosine, -1.0)))

    def of_few(self, images: int = 0) -> Tolerance:
        """The same limits for each image, and wider ones for the means of few ``images``; 0: none for the means.

        The means of a few images vary around those of hundreds, which a variant may just reach. The spread of the
        errors is about half their mean, so ``2 / sqrt(images)`` of it is four standard deviations: the golden samples
        pass every variant that is within tolerance, and fail those that are clearly worse.
        """
        if images == 0:
            return replace(self, mean_cosine=-math.inf, mean_centred_cosine=-math.inf)
        slack = 1 + 2 / math.sqrt(images)
        means = {name: 1 - (1 - getattr(self, name)) * slack for name in ("mean_cosine", "mean_centred_cosine")}
        return replace(self, **means)

    def to_json(self) -> dict[str, float | None]:
        """A JSON object; null where there is no limit."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """What holds for one precision."""

    tolerance: Tolerance
    onnx_type: str
    """ONNX's name of the products' operands: a member of ``TensorProto.DataType``."""
    quantized: bool = False
    """Products stand between Q/DQ nodes; otherwise the graph is cast."""
    can_saturate: bool = False
    """Processors without VNNI add its products in pairs of 16 bits: see ``export/saturation.py``."""
    onnxruntime_lacks: str = ""
    """Why ONNX Runtime's CPU provider cannot run it; empty where it can."""
    openvino_type: str
    """OpenVINO's inference precision. An int8 graph's own Q/DQ nodes say what is int8, the rest is float32."""
    openvino_reads: Precision | None
    """The precision of the file that OpenVINO computes it from; None: ``pack`` offers no variant for OpenVINO."""
    openvino_needs: tuple[str, ...] = ()
    """Instruction sets, one of which the processor must have, or OpenVINO emulates it."""
    faster_with: tuple[str, ...] = ()
    """Instruction sets that decide which runtime is the faster one."""


PRECISIONS: Mapping[str, PrecisionSpec] = {
    "fp32": PrecisionSpec(
        tolerance=Tolerance(max_abs=1e-4, min_centred_cosine=1 - 1e-8, top1_agreement=1.0),
        onnx_type="FLOAT",
        openvino_type="f32",
        openvino_reads="fp32",
        faster_with=("avx2", "avx512f", "asimd"),
    ),
    "fp16": PrecisionSpec(
        tolerance=Tolerance(
            min_cosine=0.9995, mean_cosine=0.9999, min_centred_cosine=0.9999, top1_agreement=0.998, max_score=0.02
        ),
        onnx_type="FLOAT16",
        openvino_type="f16",
        openvino_reads=None,
    ),
    "bf16": PrecisionSpec(
        tolerance=Tolerance(
            min_cosine=0.999, min_centred_cosine=0.999, mean_centred_cosine=0.9995, top1_agreement=0.99, max_score=0.05
        ),
        onnx_type="BFLOAT16",
        onnxruntime_lacks="it has bfloat16 kernels for GPUs only",
        openvino_type="bf16",
        openvino_reads="fp32",
        openvino_needs=("avx512_bf16", "amx_bf16"),
    ),
    "int8": PrecisionSpec(
        tolerance=Tolerance(
            min_cosine=0.995, min_centred_cosine=0.99, mean_centred_cosine=0.998, top1_agreement=0.98, max_score=0.1
        ),
        onnx_type="INT8",
        quantized=True,
        can_saturate=True,
        openvino_type="f32",
        openvino_reads="int8",
        faster_with=("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm"),
    ),
}
"""By name.

fp32 has a gate on the centred cosine that is far above its noise (1e-12): weights that went through float16, or the
tanh formula of GELU, move single values by about 1e-4, and in a model with more dimensions by less than that. Errors
below the rounding of a reduced precision (tanh GELU in float16, quick GELU in bfloat16) cannot be seen in it; such a
variant is made from an fp32 graph that has passed. benchmarks/precision.py measures what int8 costs on labelled images.
"""
assert tuple(PRECISIONS) == get_args(Precision), "one row a name"
