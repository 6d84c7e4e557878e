"""The variants of a bundle's image encoder: writes them, holds them to their tolerance, times them against float32.

Shape legend: N images, H = W pixels, D features.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import IMAGE_ENCODER, EncoderVariant, VocabularyFeatures
from clipship.core.comparison import Runner, Verification, VerificationSamples, verify_samples
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.machine.processor import this_processor
from clipship.core.machine.runtimes import Run
from clipship.core.precisions import PRECISIONS, REDUCED, Precision
from clipship.core.progress import Report, log
from clipship.export.onnx_graph import EXTERNAL_BYTES, OPSET, OPSETS
from clipship.export.precision.half_precision import emulated_onnx, typed_onnx
from clipship.export.precision.quantization import quantized_onnx
from clipship.export.reference import GOLDEN_COUNT
from clipship.export.saturation import emulated_int8, graph_can_saturate
from clipship.export.verification.runners import CPU_PROVIDER, NotRunnable, onnx_function, openvino_function

SPEED_BATCHES = (1, 8)

_COMPARED_BATCHES = (7, 64)  # one that divides nothing, and a server's largest; one image at a time is timed below

_MIN_ROUNDS = 3
_MAX_ROUNDS = 15
_ROUNDS_S = 5.0
_REST_S = 0.01  # ONNX Runtime's threads go on spinning for a while, on the cores that the other runtime needs
_GAIN = 1.05  # less than that is within what two runs of the same file differ by


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which graphs a bundle gets."""

    opset: int = OPSET
    """One of :data:`~clipship.export.onnx_graph.OPSETS`."""
    precisions: tuple[Precision, ...] = ()
    """Variants of the image encoder beside the float32 one, of :data:`REDUCED`, each once."""
    external_bytes: int = EXTERNAL_BYTES
    """Weights above this size go into a file of their own."""

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise UsageError(f"opset {self.opset} is no profile: give one of {', '.join(map(str, OPSETS))}")
        for one in self.precisions:
            if one not in REDUCED or self.precisions.count(one) > 1:
                raise UsageError(f"precisions {', '.join(self.precisions)}: give some of {', '.join(REDUCED)}, once")


def encoder_variants(
    folder: Path,
    profile: Profile,
    samples: VerificationSamples,
    classifier: VocabularyFeatures,
    report: Report,
    done: int,
) -> tuple[list[EncoderVariant], Verification]:
    """``image_encoder.onnx`` in ``folder``, and beside it a variant for each precision of ``profile``, compared.

    Args:
        samples: real images that variants are calibrated on and compared with, the golden ones first.
        report: gets each precision, after ``done`` units of earlier work.

    Raises:
        CheckFailed: a variant is out of its tolerance.
    """
    variants = [EncoderVariant(file=IMAGE_ENCODER, precision="fp32", runtime="onnx", opset=profile.opset)]
    total = Verification(())
    for position, precision in enumerate(profile.precisions):
        report(done + position, precision)
        variant, verified = reduced_variant(folder, precision, profile.opset, samples, classifier)
        variants.append(variant)
        total += verified
    further, verified = openvino_variants(folder, tuple(variants), samples, classifier)
    return [*variants, *further], total + verified


def file_of(precision: Precision) -> str:
    """The variant's file in a bundle."""
    return IMAGE_ENCODER if precision == "fp32" else f"image_encoder.{precision}.onnx"


def reduced_variant(
    folder: Path, precision: Precision, opset: int, samples: VerificationSamples, classifier: VocabularyFeatures
) -> tuple[EncoderVariant, Verification]:
    """Write the ``precision`` variant of ``image_encoder.onnx`` into ``folder``; returns it, and how it compares.

    Raises:
        CheckFailed: the variant is out of its tolerance; the message is the table.
        DataError: fewer than 32 images.
    """
    source, path = folder / IMAGE_ENCODER, folder / file_of(precision)
    if PRECISIONS[precision].quantized:
        kept = quantized_onnx(source, path, samples.pixels)
    else:
        kept = typed_onnx(source, path, precision, samples.pixels)
    run = _on_cpu(path, precision, samples)
    verified = _verified(path, run, precision, samples, classifier)
    if not verified:
        rows = verified.comparisons
        table = "\n".join(f"{one}: {', '.join(one.failures) or 'within tolerance'}" for one in rows)
        raise CheckFailed(f"{precision} is not close enough to PyTorch, nothing was written:\n{table}")
    portable = onnx_function(source, CPU_PROVIDER, samples.pixels[:1])
    speed = speed_ratios(portable, run, samples.pixels) if run else {}
    variant = EncoderVariant(
        file=path.name, precision=precision, runtime="onnx", opset=opset, kept_fp32=kept, speed=speed
    )
    return variant, verified


def openvino_variants(
    folder: Path, variants: Sequence[EncoderVariant], samples: VerificationSamples, classifier: VocabularyFeatures
) -> tuple[list[EncoderVariant], Verification]:
    """The same ``variants`` by OpenVINO, where it is installed: no files of their own, but another speed.

    OpenVINO computes bfloat16 from the float32 file, whose weights it rounds itself. A variant out of tolerance, or
    one that this processor cannot compute, is left out. The log and the verification say why.
    """
    if importlib.util.find_spec("openvino") is None:
        missing = "the bundle offers no variant by OpenVINO, which was not installed where it was packed"
        return [], Verification((), skipped=(missing,))
    portable = onnx_function(folder / IMAGE_ENCODER, CPU_PROVIDER, samples.pixels[:1])
    offered, total = [], Verification(())
    for variant in variants:
        precision, read = variant.precision, PRECISIONS[variant.precision].openvino_reads
        if read is None:
            continue
        path = folder / file_of(read)
        try:
            run = openvino_function(path, precision)
        except NotRunnable as error:
            total += _left_out(f"the bundle does not offer {error}")
            continue
        verified = _compared(run, f"OpenVINO {precision}", path, precision, samples, classifier)
        if not verified:
            why = "; ".join(dict.fromkeys(failure for one in verified.comparisons for failure in one.failures))
            about = f"{path.name}: {precision} by OpenVINO, not close enough to PyTorch on {this_processor()}"
            total += _left_out(f"the bundle does not offer {about}: {why}")
            continue
        kept = variant.kept_fp32 if path.name == variant.file else ()
        speed = speed_ratios(portable, run, samples.pixels)
        offered.append(replace(variant, file=path.name, runtime="openvino", kept_fp32=kept, speed=speed))
        total += verified
    return offered, total


def _left_out(reason: str) -> Verification:
    log(reason)
    return Verification((), skipped=(reason,))


def _on_cpu(path: Path, precision: Precision, samples: VerificationSamples) -> Run | None:
    """The graph at ``path`` on ONNX Runtime's CPU provider; None where it has no kernels, as for bfloat16."""
    try:
        return onnx_function(path, CPU_PROVIDER, samples.pixels[:1])
    except NotRunnable:
        if PRECISIONS[precision].quantized:
            raise
        return None


def _verified(
    path: Path, run: Run | None, precision: Precision, samples: VerificationSamples, classifier: VocabularyFeatures
) -> Verification:
    """Compare ``run``, which runs the graph at ``path`` here, and an emulation of other hardware."""
    compared, name = Verification(()), f"{precision}, emulated"
    if run:
        compared += _compared(run, CPU_PROVIDER, path, precision, samples, classifier)
    if PRECISIONS[precision].can_saturate:
        if run and not graph_can_saturate(path):
            # Such sums are the same on all processors, and NumPy is slow: compare a few images, with ``run``.
            golden = _golden(samples)
            samples = replace(golden, expected=run(golden.pixels), reference="ONNX Runtime here")
        runner = Runner(name=name, run=emulated_int8(path))
        return compared + verify_samples(runner, path.name, [samples], classifier, precision, (len(samples.pixels),))
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        emulation = Path(scratch) / path.name
        emulated_onnx(path, emulation)
        run = onnx_function(emulation, CPU_PROVIDER, samples.pixels[:1])
        return compared + _compared(run, name, path, precision, samples, classifier)


def _golden(samples: VerificationSamples) -> VerificationSamples:
    few = slice(GOLDEN_COUNT)
    return replace(samples, what="golden samples", pixels=samples.pixels[few], expected=samples.expected[few])


def _compared(
    run: Run, name: str, path: Path, precision: Precision, samples: VerificationSamples, classifier: VocabularyFeatures
) -> Verification:
    """``run`` on all samples, and on the golden ones, which stay in the bundle."""
    compared = partial(
        verify_samples, Runner(name=name, run=run), path.name, classifier=classifier, precision=precision
    )
    golden = _golden(samples)
    return compared([samples], batch_sizes=_COMPARED_BATCHES) + compared([golden], batch_sizes=_COMPARED_BATCHES[:1])


def speed_ratios(portable: Run, other: Run, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """By batch size, how many times as many images a second ``other`` encodes here as ``portable``."""
    return {str(size): speed_ratio(portable, other, pixels[:size]) for size in SPEED_BATCHES if size <= len(pixels)}


def speed_ratio(slow: Run, fast: Run, pixels: NDArray[np.uint8]) -> float:
    """The median time of ``slow`` on ``pixels`` divided by that of ``fast``, run in turns for some seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(times[0]) < _MIN_ROUNDS or (time.perf_counter() - began < _ROUNDS_S and len(times[0]) <= _MAX_ROUNDS):
        for run, taken in zip((slow, fast), times, strict=True):
            time.sleep(_REST_S)
            start = time.perf_counter()
            run(pixels)
            taken.append(time.perf_counter() - start)
    first, second = (statistics.median(taken[1:]) for taken in times)  # the first run of a session allocates
    return round(first / second, 2)


def speed_line(variant: EncoderVariant) -> str:
    """How fast ``variant`` is here, for people."""
    kept = f", {len(variant.kept_fp32)} nodes kept in float32" if variant.kept_fp32 else ""
    by = " by OpenVINO" if variant.runtime == "openvino" else ""
    about = f"{variant.file}: {variant.precision}{by}{kept}"
    if not variant.speed:
        return f"{about}; ONNX Runtime's CPU provider cannot run it, so no speed was measured"
    ratios = ", ".join(f"{ratio:.2f}x at batch {size}" for size, ratio in variant.speed.items())
    gains = max(variant.speed.values()) >= _GAIN
    return f"{about}; {'' if gains else 'gains nothing here: '}{ratios} the speed of {IMAGE_ENCODER} by ONNX Runtime"
