"""Every exported form against PyTorch: comparisons that know their numbers and their verdict.

The tolerances stand in one table, :data:`TOLERANCES`, never at call sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, MissingExtraError

if TYPE_CHECKING:
    import onnxruntime

BATCH_SIZES = (1, 2, 7, 64)
"""One, the smallest batch, one that divides nothing, and the default maximum of a server."""

CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a form may differ from PyTorch by."""

    max_abs: float
    """Largest difference of any value of the unit features."""
    top1_agreement: float
    """Smallest share of images whose best class is the same."""


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(max_abs=1e-4, top1_agreement=1.0),
    "text-fp32": Tolerance(max_abs=1e-5, top1_agreement=1.0),
}
"""By precision. Text features are averaged and kept, so they are held to a tenth of the image features' tolerance."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One form against PyTorch on one set of inputs at one batch size. True when within tolerance."""

    what: str
    provider: str
    batch_size: int
    count: int
    max_abs: float
    min_cosine: float
    top1_agreement: float
    tolerance: Tolerance

    def __bool__(self) -> bool:
        return self.max_abs <= self.tolerance.max_abs and self.top1_agreement >= self.tolerance.top1_agreement

    def __str__(self) -> str:
        return (
            f"{'ok    ' if self else 'FAILED'} {self.what:<22} {self.provider:<21} batch {self.batch_size:<3} "
            f"n {self.count:<5} max diff {self.max_abs:.1e}  min cosine {self.min_cosine:.7f}  "
            f"top-1 {100 * self.top1_agreement:.2f} %"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every number and the verdict."""
        return {**asdict(self), "passed": bool(self)}


@dataclass(frozen=True)
class Verification:
    """All comparisons of a bundle. True when there is at least one and every one is."""

    comparisons: tuple[Comparison, ...]

    def __bool__(self) -> bool:
        return bool(self.comparisons) and all(self.comparisons)

    def __str__(self) -> str:
        return "\n".join(map(str, self.comparisons))

    def to_json(self) -> dict[str, Any]:
        """What stands in ``verification.json``."""
        return {"passed": bool(self), "comparisons": [comparison.to_json() for comparison in self.comparisons]}


def compare_features(
    what: str,
    provider: str,
    batch_size: int,
    expected: NDArray[np.float32],
    given: NDArray[np.float32],
    *,
    references: NDArray[np.float32],
    tolerance: Tolerance,
) -> Comparison:
    """Compare unit features [N, D]; the best of ``references`` [C, D] by cosine decides top-1.

    Raises:
        CheckFailed: the shapes differ, or a value is NaN or infinite.
    """
    if given.shape != expected.shape:
        raise CheckFailed(f"{what}: {provider} gives {list(given.shape)}, PyTorch {list(expected.shape)}")
    if not np.isfinite(given).all():
        raise CheckFailed(f"{what}: {provider} gives NaN or infinite values at batch {batch_size}")
    same = (expected @ references.T).argmax(1) == (given @ references.T).argmax(1)
    return Comparison(
        what=what,
        provider=provider,
        batch_size=batch_size,
        count=len(given),
        max_abs=float(np.abs(expected - given).max()),
        min_cosine=float((expected * given).sum(1).min()),
        top1_agreement=float(same.mean()),
        tolerance=tolerance,
    )


def onnx_session(path: Path, provider: str = CPU_PROVIDER) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that really runs on ``provider``.

    ONNX Runtime falls back to the CPU without an error; here that is one.

    Raises:
        CheckFailed: the provider is not available or was not taken.
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise CheckFailed(f"ONNX Runtime has no {provider} here: it has {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise CheckFailed(f"{path.name}: ONNX Runtime took {session.get_providers()[0]} instead of {provider}")
    return session


def run_in_batches(
    run: Callable[[NDArray[Any]], NDArray[np.float32]], rows: NDArray[Any], batch_size: int
) -> NDArray[np.float32]:
    """``run`` over ``rows`` in batches of ``batch_size``; the last one is as small as what is left."""
    parts = [run(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return np.concatenate(parts)


def session_function(session: onnxruntime.InferenceSession) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """A one-input, one-output session as a function of its input array."""
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})[0]


def verify_encoder(
    path: Path,
    what: str,
    rows: NDArray[Any],
    expected: NDArray[np.float32],
    *,
    references: NDArray[np.float32],
    tolerance: Tolerance,
    provider: str = CPU_PROVIDER,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[Comparison, ...]:
    """The ONNX encoder at ``path`` on ``rows`` [N, ...] at every batch size, against PyTorch's ``expected`` [N, D].

    Args:
        rows: pixels for an image encoder, tokens for a text encoder.
        references: unit features [C, D]; the nearest one is an input's best class.
    """
    run = session_function(onnx_session(path, provider))

    def compared(batch_size: int) -> Comparison:
        given = run_in_batches(run, rows, batch_size)
        return compare_features(what, provider, batch_size, expected, given, references=references, tolerance=tolerance)

    return tuple(compared(batch_size) for batch_size in batch_sizes)


def verify_bundle(bundle: Bundle) -> Verification:
    """The bundle's image encoder, run here, against the golden features PyTorch left in it."""
    golden = bundle.golden()
    comparisons = verify_encoder(
        bundle.image_encoder,
        "golden samples",
        golden.pixels,
        golden.embedding,
        references=bundle.vocabulary_features().features,
        tolerance=TOLERANCES["fp32"],
    )
    return Verification(comparisons)
