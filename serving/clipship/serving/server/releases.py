"""NVIDIA's releases of the Triton container (the py3 images), and which of them can serve a repository.

A repository's requirements are a list of :class:`Need`; the table below lists what each release has. Triton and
ONNX Runtime: ``docs/introduction/compatibility.md`` of triton-inference-server/server; TensorRT: NVIDIA's Frameworks
Support Matrix, https://docs.nvidia.com/deeplearning/frameworks/support-matrix/. The newest opset of each ONNX Runtime
was found by loading graphs of every opset.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipship.core.errors import UsageError
from clipship.core.precisions import PRECISIONS
from clipship.core.tensorrt_plan import version_parts
from clipship.serving.repository.requirements import Requirements

IMAGE = "nvcr.io/nvidia/tritonserver"
USUAL_RELEASE = "25.08"
"""The default."""


@dataclass(frozen=True)
class Release:
    """What a release has that a repository may need."""

    name: str
    """As in the image's tag, e.g. "25.08"."""
    triton: str
    tensorrt: str
    onnxruntime: str
    opset: int
    """The newest opset that its ONNX Runtime loads."""
    python: tuple[int, int]
    """Version of the Python backend."""

    @property
    def accelerates_bf16(self) -> bool:
        """Whether the TensorRT accelerator of its ONNX Runtime backend knows precision_mode BF16."""
        return self.name >= "26.02"  # onnxruntime_backend#328


RELEASES = (
    Release("24.08", "2.49.0", "10.3.0", "1.18.1", 21, (3, 10)),
    Release("24.09", "2.50.0", "10.4.0", "1.19.2", 21, (3, 10)),
    Release("24.10", "2.51.0", "10.5.0", "1.19.2", 21, (3, 10)),
    Release("24.11", "2.52.0", "10.6.0", "1.19.2", 21, (3, 12)),
    Release("24.12", "2.53.0", "10.7.0", "1.20.1", 21, (3, 12)),
    Release("25.01", "2.54.0", "10.8.0", "1.20.1", 21, (3, 12)),
    Release("25.02", "2.55.0", "10.8.0", "1.20.1", 21, (3, 12)),
    Release("25.03", "2.56.0", "10.9.0", "1.21.0", 22, (3, 12)),
    Release("25.04", "2.57.0", "10.9.0", "1.21.0", 22, (3, 12)),
    Release("25.05", "2.58.0", "10.10.0", "1.22.0", 22, (3, 12)),
    Release("25.06", "2.59.0", "10.11.0", "1.22.0", 22, (3, 12)),
    Release("25.07", "2.59.1", "10.11.0", "1.22.0", 22, (3, 12)),
    Release("25.08", "2.60.0", "10.13.2", "1.23.0", 23, (3, 12)),
    Release("25.09", "2.61.0", "10.13.3", "1.23.0", 23, (3, 12)),
    Release("25.10", "2.62.0", "10.13.3", "1.23.1", 23, (3, 12)),
    Release("25.11", "2.63.0", "10.14.1", "1.23.2", 23, (3, 12)),
    Release("25.12", "2.64.0", "10.14.1", "1.23.2", 23, (3, 12)),
    Release("26.02", "2.66.0", "10.15.1", "1.24.1", 25, (3, 12)),
    Release("26.03", "2.67.0", "10.16.0", "1.24.2", 25, (3, 12)),
    Release("26.04", "2.68.0", "10.16.1", "1.24.4", 25, (3, 12)),
    Release("26.05", "2.69.0", "10.16.1", "1.24.4", 25, (3, 12)),
    Release("26.06", "2.70.0", "11.0.0", "1.24.4", 25, (3, 12)),
    Release("26.07", "2.71.0", "11.1.0", "1.27.0", 26, (3, 12)),
)
"""Ascending."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """One requirement of a repository."""

    what: str
    advice: str
    """How to avoid it."""
    met_by: Callable[[Release], bool]

    def __str__(self) -> str:
        names = [release.name for release in RELEASES if self.met_by(release)]
        open_ended = names and names == [release.name for release in RELEASES][-len(names) :]
        known = f"{names[0]} or later" if open_ended else ", ".join(names)
        return f"{self.what} ({f'release {known}' if known else 'no known release'})"


def needs_of(repository: Path) -> tuple[Need, ...]:
    """Requirements of ``repository`` on TensorRT and ONNX Runtime.

    Raises:
        RepositoryError: there is no repository.
    """
    required = Requirements(repository)
    return (*_plan_need(required), *_opset_need(required), *_bf16_need(required))


def container_needs_of(repository: Path) -> tuple[Need, ...]:
    """Those, and the requirements of the packages that the container installs when it starts.

    Raises:
        RepositoryError: there is no repository.
    """
    return (*needs_of(repository), *_pillow_need())


def release_for(repository: Path) -> Release:
    """The release for ``repository``: the default if it is suitable, else the nearest, later ones first.

    Of those with the same TensorRT, the newest is used.

    Raises:
        UsageError: no known release is suitable; says which have what, and what to do.
        RepositoryError: there is no repository.
    """
    needs = container_needs_of(repository)
    fit = [release for release in RELEASES if all(need.met_by(release) for need in needs)]
    if not fit:
        missed = [need for need in needs if not all(map(need.met_by, RELEASES))]
        raise UsageError(
            f"{repository} needs {' and '.join(map(str, missed))}, and no known release of NVIDIA's container has it "
            f"all: {_advice(missed)}, or give an image of your own with --image"
        )
    nearest = next((release for release in fit if release.name >= USUAL_RELEASE), fit[-1])
    return [release for release in fit if release.tensorrt == nearest.tensorrt][-1]


def validate_release(release: Release | None, who: str, needs: Sequence[Need]) -> None:
    """Validate that ``release``, which ``who`` is, has all of ``needs``; None, an unknown one, passes.

    Raises:
        UsageError: it does not; says which do, and what to do.
    """
    missed = [] if release is None else [need for need in needs if not need.met_by(release)]
    if release is not None and missed:
        raise UsageError(
            f"{who} is release {release.name} (Triton {release.triton}, TensorRT {release.tensorrt}, ONNX Runtime "
            f"{release.onnxruntime}), the repository needs {' and '.join(map(str, missed))}: take such a release, or "
            f"{_advice(missed)}"
        )


def release_of_image(image: str) -> Release | None:
    """The release of ``image``; None for an unknown one or another image."""
    match = re.fullmatch(rf"{re.escape(IMAGE)}:(?P<name>\d\d\.\d\d)-py3", image)
    return next((release for release in RELEASES if match and release.name == match["name"]), None)


def release_of_triton(home: Path) -> Release | None:
    """The release of the Triton installed in ``home`` (/opt/tritonserver); None if unknown."""
    try:
        version = (home / "TRITON_VERSION").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return next((release for release in RELEASES if release.triton == version), None)


def _advice(needs: Sequence[Need]) -> str:
    return ", or ".join(need.advice for need in needs)


def _plan_need(required: Requirements) -> Iterator[Need]:
    """A plan loads only in its own TensorRT version; a version-compatible one also in later ones."""
    version = required.tensorrt_version
    if version is None:
        return
    own = version_parts(version)[:3]
    later = required.version_compatible_plans == "all"
    advice = "build the plans with the TensorRT of another release"
    yield Need(
        what=f"TensorRT {version}{' or later' if later else ''} for its plans",
        advice=advice if later else f"{advice} or with --version-compatible",
        met_by=lambda release: own == (has := version_parts(release.tensorrt)) or (later and own < has),
    )


def _opset_need(required: Requirements) -> Iterator[Need]:
    """ONNX Runtime 1.23 loads opset 23, but lacks its QuantizeLinear; see docs/guides/precision.md."""
    found = required.opset
    if found is not None:
        opset, precision = found
        quantized = PRECISIONS[precision].quantized and opset == 23
        yield Need(
            what=f"an ONNX Runtime that takes {f'{precision} of ' if quantized else ''}opset {opset}",
            advice="pack the bundle with --opset 18 or 20",
            met_by=lambda release: release.opset >= opset + quantized,
        )


def _bf16_need(required: Requirements) -> Iterator[Need]:
    if required.accelerator.get("precision_mode") == "BF16":
        yield Need(
            what="bfloat16 in the TensorRT accelerator",
            advice="write the repository with --precision fp16",
            met_by=lambda release: release.accelerates_bf16,
        )


def _pillow_need() -> Iterator[Need]:
    """The container installs this machine's Pillow, so its Python must support that."""
    least = re.search(r">=\s*(\d+)\.(\d+)", importlib.metadata.metadata("pillow")["Requires-Python"] or "")
    if least is not None:
        major, minor = (int(part) for part in least.groups())
        version = importlib.metadata.version("pillow")
        yield Need(
            what=f"Python {major}.{minor} for Pillow {version}, the version on this machine",
            advice=f"pip install 'pillow<{version.partition('.')[0]}' here (client and server need the same "
            "Pillow to decode identically)",
            met_by=lambda release: release.python >= (major, minor),
        )
