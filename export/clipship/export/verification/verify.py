"""Every exported form against its reference, by the runtime that serves it.

The tolerances stand in one table, ``clipship/core/tolerances.py``, never at call sites; ``clipship/core/comparison.py``
defines the other numbers.

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
    IMAGE_ENCODER,
    LABELS,
    VOCABULARY_TENSORS,
    Bundle,
    EncoderForm,
    VocabularyFeatures,
)
from clipship.core.comparison import (
    BATCH_SIZES,
    Answers,
    Comparison,
    Runner,
    Verification,
    VerificationSamples,
    batch_sizes_up_to,
    compare_answers,
    compare_features,
    golden_samples,
    run_in_batches,
    verify_runner,
    verify_samples,
)
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.images.decoding import ImageSpec
from clipship.core.progress import progress
from clipship.core.tolerances import TOLERANCES, Tolerance
from clipship.export.image_input import Picture, pixels_of_sources, sources_of
from clipship.export.saturation import emulated_int8, graph_can_saturate
from clipship.export.verification.runners import (
    CPU_PROVIDER,
    NotRunnable,
    Run,
    local_providers,
    onnx_function,
    onnx_session,
    openvino_function,
    session_function,
)

__all__ = [
    "BATCH_SIZES",
    "CPU_PROVIDER",
    "Answers",
    "Comparison",
    "Verification",
    "VerificationSamples",
    "batch_sizes_up_to",
    "compare_classifier",
    "compare_features",
    "golden_samples",
    "onnx_session",
    "run_in_batches",
    "session_function",
    "verify_bundle",
    "verify_encoder",
    "verify_plan",
    "verify_runner",
    "verify_samples",
]

_MOST_SOURCES = 7
"""The largest batch of whole images."""

_EMULATED = 8  # images that NumPy, which is slow, computes


def verify_encoder(
    path: Path,
    what: str,
    rows: NDArray[Any],
    expected: NDArray[np.float32],
    *,
    references: NDArray[np.float32] | VocabularyFeatures,
    tolerance: Tolerance,
    provider: str = CPU_PROVIDER,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    reference: str = "PyTorch",
) -> tuple[Comparison, ...]:
    """The ONNX encoder at ``path`` on ``rows`` [N, ...] at every batch size, against PyTorch's ``expected`` [N, D].

    Args:
        rows: pixels for an image encoder, tokens for a text encoder.
        references: the classifier, or unit features [C, D] whose nearest one is an input's best class.

    Raises:
        NotRunnable: the provider is not here, or has no kernel for a node.
        CheckFailed: the file cannot be loaded, or ran on another provider.
    """
    return verify_runner(
        Runner(name=provider, run=onnx_function(path, provider, rows[:1])),
        what,
        rows,
        expected,
        references=references,
        tolerance=tolerance,
        batch_sizes=batch_sizes,
        form=path.name,
        reference=reference,
    )


def verify_bundle(
    bundle: Bundle,
    samples: Sequence[VerificationSamples] | None = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    providers: Sequence[str] | None = None,
) -> Verification:
    """Every form that the bundle offers, by the runtime that serves it, on ``samples``: ONNX Runtime, or OpenVINO.

    What was left out when the bundle was packed is named among what is not compared.

    Args:
        samples: None: the golden samples.
        providers: of ONNX Runtime, which must run every form; None: those of this machine, where they can.

    Raises:
        NotRunnable: one of the given ``providers`` is not here, or cannot run a form.
    """
    chosen = samples or [golden_samples(bundle)]
    total = Verification((), answers=(compare_classifier(bundle),), skipped=_not_offered(bundle))
    forms = bundle.image_encoders
    with progress("verify", len(forms)) as report:
        for done, form in enumerate(forms):
            report(done, form.file)
            total += _verify_form(bundle, form, chosen, batch_sizes, providers)
    return total


def _verify_form(
    bundle: Bundle,
    form: EncoderForm,
    samples: Sequence[VerificationSamples],
    batch_sizes: Sequence[int],
    providers: Sequence[str] | None,
) -> Verification:
    if form.source_size is not None:
        portable = session_function(onnx_session(bundle.image_encoder))
        samples = [_source_samples(one, form.source_size, bundle.image_spec, portable) for one in samples]
        batch_sizes = [size for size in batch_sizes if size <= _MOST_SOURCES] or [1]
    path, total = bundle.path / form.file, Verification(())
    for name, load in _loaders(path, form, samples[0].pixels[:1], providers):
        try:
            runner = Runner(name=name, run=load())
        except NotRunnable as error:
            if providers is not None and name in providers:
                raise
            total += Verification((), skipped=(str(error),))
            continue
        except MissingExtraError as error:
            total += Verification((), skipped=(f"OpenVINO: {error}",))
            continue
        except CheckFailed as error:
            total += Verification((_broken(form, name, samples[0], str(error)),))
            continue
        total += verify_samples(runner, form.file, samples, bundle.vocabulary_features(), form.precision, batch_sizes)
    return total + _as_without_vnni(bundle, form, samples)


def _as_without_vnni(bundle: Bundle, form: EncoderForm, samples: Sequence[VerificationSamples]) -> Verification:
    """A form that some processors compute wrongly, on a few images as they would: 0.5 packed such, and others may."""
    path = bundle.path / form.file
    if form.precision != "int8" or form.runtime != "onnx" or not graph_can_saturate(path):
        return Verification(())
    runner = Runner(name="int8, emulated", run=emulated_int8(path))
    few = [replace(one, pixels=one.pixels[:_EMULATED], expected=one.expected[:_EMULATED]) for one in samples]
    return verify_samples(runner, form.file, few, bundle.vocabulary_features(), form.precision, [_EMULATED])


def _not_offered(bundle: Bundle) -> tuple[str, ...]:
    """What the bundle could offer and does not, for the reasons found when it was packed: 0.5 did not keep them."""
    reasons = tuple(bundle.verification().get("skipped", ()))
    offered = {form.precision for form in bundle.image_encoders if form.runtime == "openvino"}
    plain = [form for form in bundle.image_encoders if form.runtime == "onnx" and form.source_size is None]
    unknown = [form for form in plain if form.precision in ("fp32", "int8") and form.precision not in offered]
    return reasons or tuple(f"{one.file}: the bundle does not offer {one.precision} by OpenVINO" for one in unknown)


def _source_samples(
    samples: VerificationSamples, source_size: tuple[int, int], spec: ImageSpec, portable: Run
) -> VerificationSamples:
    """The images of ``samples`` resized to ``source_size``, and what Pillow and the portable form make of those."""
    pictures = [Picture(name=name, data=data) for name, data in zip(samples.names, samples.files, strict=True)]
    sources = sources_of(pictures, source_size)
    pixels = pixels_of_sources(sources, spec)
    return replace(
        samples,
        what=f"{samples.what}, {source_size[0]} x {source_size[1]}",
        pixels=sources,
        expected=run_in_batches(portable, pixels, 1),
        reference=f"Pillow and {IMAGE_ENCODER}",
    )


def _loaders(
    path: Path, form: EncoderForm, sample: NDArray[np.uint8], providers: Sequence[str] | None
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """By name, what loads ``form`` in the runtime that serves it."""
    if form.runtime == "openvino":
        yield f"OpenVINO {form.precision}", partial(openvino_function, path, form.precision)
        return
    for provider in local_providers() if providers is None else providers:
        yield provider, partial(onnx_function, path, provider, sample)


def _broken(form: EncoderForm, provider: str, samples: VerificationSamples, problem: str) -> Comparison:
    return Comparison(
        what=samples.what,
        provider=provider,
        batch_size=1,
        count=len(samples.pixels),
        tolerance=TOLERANCES[form.precision],
        form=form.file,
        reference=samples.reference,
        problem=problem,
    )


def compare_classifier(bundle: Bundle) -> Answers:
    """The bundle's own classifier and labels on the golden embeddings, against the golden scores by PyTorch."""
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
    """The TensorRT plan in ``folder``, run on this machine's GPU, on ``samples``.

    Batch sizes that the plan's profile does not have are left out; its own smallest and largest take their place.

    Raises:
        PlanError: no plan there, or one that this machine or bundle does not fit.
        UsageError: there is no GPU here.
        MissingExtraError: the plan's runtime is not installed.
    """
    from clipship.core.tensorrt_plan import read_plan
    from clipship.export.tensorrt.run import load_plan

    plan = read_plan(folder)
    loaded, info = load_plan(plan, bundle), plan.info
    sizes = sorted({min(max(size, info.profile.least), info.profile.most) for size in batch_sizes})
    runner = Runner(name=info.runtime, run=loaded.features)
    return verify_samples(runner, info.onnx_file, samples, bundle.vocabulary_features(), info.precision, sizes)
