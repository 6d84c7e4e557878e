"""Compares every exported variant with its reference, run by the runtime that serves it.

The flow: :func:`verify_bundle` loads each variant as a :class:`~clipship.export.verification.runners.Runner`,
:func:`verify_samples` runs it on each set of samples at each batch size, and ``core/comparison.py`` turns both features
into numbers and a verdict, by the tolerances in ``core/precisions.py``.

Shape legend: N inputs, C classes, H = W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import (
    LABELS,
    VOCABULARY_TENSORS,
    Bundle,
    EncoderVariant,
)
from clipship.core.comparison import (
    BATCH_SIZES,
    Answers,
    Runner,
    Verification,
    VerificationSamples,
    compare_answers,
    golden_samples,
    verify_samples,
)
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.precisions import PRECISIONS
from clipship.core.progress import progress
from clipship.core.tolerances import TOLERANCES
from clipship.export.saturation import emulated_int8, graph_can_saturate
from clipship.export.verification.runners import (
    NotRunnable,
    Run,
    local_providers,
    onnx_function,
    openvino_function,
)

_EMULATED = 8  # images that NumPy, which is slow, computes


def verify_bundle(
    bundle: Bundle,
    samples: Sequence[VerificationSamples] | None = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    providers: Sequence[str] | None = None,
) -> Verification:
    """Compare every variant of ``bundle`` on ``samples``, run by ONNX Runtime or OpenVINO, whichever serves it.

    The variants that ``pack`` left out are listed as not compared.

    Args:
        samples: None: the golden samples.
        providers: ONNX Runtime's, each of which must run every variant; None: this machine's, as far as they can.

    Raises:
        NotRunnable: one of the given ``providers`` is not here, or cannot run a variant.
    """
    chosen = samples or [golden_samples(bundle)]
    total = Verification((), answers=(compare_classifier(bundle),), skipped=_not_offered(bundle))
    variants = bundle.image_encoders
    with progress("verify", len(variants)) as report:
        for done, variant in enumerate(variants):
            report(done, variant.file)
            total += _verify_variant(bundle, variant, chosen, batch_sizes, providers)
    return total


def _verify_variant(
    bundle: Bundle,
    variant: EncoderVariant,
    samples: Sequence[VerificationSamples],
    batch_sizes: Sequence[int],
    providers: Sequence[str] | None,
) -> Verification:
    path, classifier, total = bundle.path / variant.file, bundle.vocabulary_features(), Verification(())
    compared = partial(verify_samples, classifier=classifier, precision=variant.precision)
    for name, load in _loaders(path, variant, samples[0].pixels[:1], providers):
        try:
            runner = Runner(name=name, run=load())
        except NotRunnable as error:
            if providers is not None and name in providers:
                raise
            total += Verification((), skipped=(str(error),))
        except MissingExtraError as error:
            total += Verification((), skipped=(f"OpenVINO: {error}",))
        except CheckFailed as error:
            broken = Runner(name=name, run=partial(_raise, error))
            total += compared(broken, variant.file, samples[:1], batch_sizes=[1])
        else:
            total += compared(runner, variant.file, samples, batch_sizes=batch_sizes)
    return total + _as_without_vnni(bundle, variant, samples)


def _raise(error: Exception, _rows: NDArray[Any]) -> NDArray[np.float32]:
    raise error


def _as_without_vnni(bundle: Bundle, variant: EncoderVariant, samples: Sequence[VerificationSamples]) -> Verification:
    """An int8 variant that can saturate, on a few images as a processor without VNNI computes it; 0.5 packed such."""
    path = bundle.path / variant.file
    if not PRECISIONS[variant.precision].can_saturate or variant.runtime != "onnx" or not graph_can_saturate(path):
        return Verification(())
    runner = Runner(name=f"{variant.precision}, emulated", run=emulated_int8(path))
    few = [replace(one, pixels=one.pixels[:_EMULATED], expected=one.expected[:_EMULATED]) for one in samples]
    return verify_samples(runner, variant.file, few, bundle.vocabulary_features(), variant.precision, [_EMULATED])


def _not_offered(bundle: Bundle) -> tuple[str, ...]:
    """The variants that ``pack`` left out, with its reasons, which bundles of 0.5 do not have."""
    reasons = tuple(bundle.verification().get("skipped", ()))
    offered = {variant.precision for variant in bundle.image_encoders if variant.runtime == "openvino"}
    plain = [variant for variant in bundle.image_encoders if variant.runtime == "onnx"]
    read_by_openvino = [one for one in plain if PRECISIONS[one.precision].openvino_reads == one.precision]
    unknown = [one for one in read_by_openvino if one.precision not in offered]
    return reasons or tuple(f"{one.file}: the bundle does not offer {one.precision} by OpenVINO" for one in unknown)


def _loaders(
    path: Path, variant: EncoderVariant, sample: NDArray[np.uint8], providers: Sequence[str] | None
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """By name, the functions that load ``variant`` into the runtimes that serve it."""
    if variant.runtime == "openvino":
        yield f"OpenVINO {variant.precision}", partial(openvino_function, path, variant.precision)
        return
    for provider in local_providers() if providers is None else providers:
        yield provider, partial(onnx_function, path, provider, sample)


def compare_classifier(bundle: Bundle) -> Answers:
    """Compare the bundle's classifier and labels, on the golden embeddings, with PyTorch's golden scores."""
    golden, names = bundle.golden(), (bundle.path / LABELS).read_bytes().decode().split("\n")[:-1]
    blank = Answers(
        what="golden scores",
        model=VOCABULARY_TENSORS,
        provider="NumPy",
        batch_size=len(golden.embedding),
        count=len(golden.embedding),
        tolerance=TOLERANCES["fp32"],
    )
    if golden.indices.max() >= len(names):
        return replace(blank, problem=f"{LABELS} has {len(names)} names, fewer than the golden samples' classes")
    labels = [[names[place] for place in row] for row in golden.indices.tolist()]
    expected = bundle.vocabulary_features().probabilities(golden.embedding)
    return compare_answers(blank, expected, bundle.vocabulary.names, golden.scores, golden.indices, labels)


def verify_plan(
    bundle: Bundle, folder: Path, samples: Sequence[VerificationSamples], *, batch_sizes: Sequence[int] = BATCH_SIZES
) -> Verification:
    """Compare the TensorRT plan in ``folder``, on this machine's GPU, on ``samples``.

    The profile's smallest and largest batch replace the batch sizes outside of it.

    Raises:
        PlanError: no plan there, or one for another machine or bundle.
        UsageError: there is no GPU here.
        MissingExtraError: the plan's runtime is not installed.
    """
    from clipship.core.tensorrt_plan import read_plan
    from clipship.export.tensorrt.run import load_plan

    plan = read_plan(folder)
    loaded, info = load_plan(plan, bundle), plan.info
    sizes = sorted({min(max(size, info.profile.min), info.profile.max) for size in batch_sizes})
    runner = Runner(name=info.runtime, run=loaded.features)
    return verify_samples(runner, info.onnx_file, samples, bundle.vocabulary_features(), info.precision, sizes)
