"""The TensorRT plan: a folder with ``model.plan`` and ``plan.json``, which says where it runs and its source.

A plan is machine code for certain GPUs and one version of one runtime, and mismatches give obscure errors. So all that
must agree is written beside the plan, and compared before it is loaded or served. Nothing here imports TensorRT.
Format: ``core/README.md``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.errors import PlanError, UsageError, near
from clipship.core.files import read_record, sha256_of, sha256_of_text, write_json_atomic
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.tensors import TensorSpec

FORMAT = "clipship-plan"
FORMAT_VERSION = 1

PLAN = "model.plan"
RECORD = "plan.json"

PlanRuntime = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT for data centres, whose plans Triton loads, or TensorRT-RTX, which builds without a GPU."""

PLATFORM = sys.platform
"""Plans cannot be carried from one operating system to another."""

GPUS = ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")
"""Compute capabilities since Turing, as ``--gpu`` names them."""

_CARDS = {
    card: gpu
    for gpu, cards in {
        "sm75": "t4",
        "sm80": "a100 a30",
        "sm86": "a10 a10g a40 rtx3090",
        "sm87": "orin",
        "sm89": "l4 l40s rtx4090",
        "sm90": "h100 h200",
        "sm100": "b200",
        "sm120": "rtx5090",
    }.items()
    for card in cards.split()
}
"""Cards by the names people use instead of a compute capability."""


def gpu_name(given: str) -> str:
    """``given`` when it is one of :data:`GPUS`.

    Raises:
        UsageError: it is not; the message names what was probably meant (for "8.9", "L4" or "sm_89": sm89).
    """
    if given in GPUS:
        return given
    plain = re.sub(r"nvidia|geforce|[^a-z0-9]", "", given.lower())
    meant = _CARDS.get(plain) or _CARDS.get(f"rtx{plain}") or f"sm{re.sub(r'[^0-9]', '', given)}"
    hint = f"did you mean {meant}?" if meant in GPUS else near(given, GPUS)
    raise UsageError(f"GPU {given!r} is not a compute capability like sm89: {hint}")


def capability_of(gpu: str) -> str:
    """ "8.9" for "sm89", "12.0" for "sm120", as Triton and NVIDIA's tables write it."""
    digits = gpu.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """TensorRT's optimization profile of the batch: the sizes a plan accepts, and the one it is tuned for."""

    min: int = 1
    opt: int = 8
    max: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            given = f"min {self.min}, opt {self.opt}, max {self.max}"
            raise UsageError(f"batches {given}: give 1 <= min <= opt <= max")

    def validate(self, batch: int) -> None:
        """Validate that the plan accepts ``batch`` images.

        Raises:
            UsageError: it does not.
        """
        if not self.min <= batch <= self.max:
            raise UsageError(
                f"a batch of {batch} images is outside the plan's profile ({self.min} to {self.max}): "
                "send another number, or build the plan with another --min-batch or --max-batch"
            )


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """What ``plan.json`` says about a plan."""

    runtime: PlanRuntime
    runtime_version: str
    gpus: tuple[str, ...]
    """Compute capabilities it was built for, as in :data:`GPUS`."""
    platform: str
    """``sys.platform`` of the builder."""
    precision: Precision
    profile: BatchProfile
    input: TensorSpec
    output: TensorSpec
    onnx_file: str
    """The variant of the bundle that it was built from."""
    onnx_digest: str
    """The variant's :func:`variant_digest`."""
    bundle_digest: str
    plan_digest: str
    """SHA-256 of ``model.plan``."""
    plan_bytes: int
    build_s: float
    weights_stripped: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    """Runs on every GPU since Ampere (sm80), not on ``gpus`` only."""
    optimization_level: int = 3
    workspace_mib: int | None = None
    """None: no limit."""
    layers: Mapping[str, int]
    """How many layers of each kind and type the network has, e.g. {"MATRIX_MULTIPLY HALF": 25}."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field, format and version first."""
        profile = {"least": self.profile.min, "best": self.profile.opt, "most": self.profile.max}
        specs = {"input": self.input.to_json(), "output": self.output.to_json()}
        lists = {"gpus": list(self.gpus), "layers": dict(self.layers)}
        fields = {**asdict(self), "profile": profile, **specs, **lists}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlanInfo:
        """The inverse of :meth:`to_json`; keys that this version does not know are left out.

        Raises:
            PlanError: a field is missing or malformed.
        """
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        try:
            for name, accepted in (("runtime", get_args(PlanRuntime)), ("precision", PRECISIONS)):
                if content[name] not in accepted:
                    raise ValueError(f"{name} {content[name]!r} is not one of {', '.join(accepted)}")
            profile = content["profile"]
            parsed = {
                "gpus": tuple(content["gpus"]),
                "profile": BatchProfile(min=profile["least"], opt=profile["best"], max=profile["most"]),
                "input": TensorSpec.from_json(content["input"]),
                "output": TensorSpec.from_json(content["output"]),
            }
            return cls(**{**known, **parsed})
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{RECORD} is malformed ({error}): build the plan again with clipship engine") from error


@dataclass(frozen=True, kw_only=True)
class TensorRtPlan:
    """A plan on disk, whose bytes have been checked against its record."""

    path: Path
    info: PlanInfo

    @property
    def file(self) -> Path:
        """The plan itself."""
        return self.path / PLAN

    @cached_property
    def data(self) -> bytes:
        """The plan's bytes."""
        return self.file.read_bytes()


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a plan is to run. None: unknown, and not compared."""

    runtime: PlanRuntime
    version: str | None = None
    """The runtime's, e.g. "10.14.1.48"; leading parts are enough."""
    gpu: str | None = None
    platform: str | None = None
    puts_weights_back: bool = False
    """It is loaded to be refitted, so its weights may be stripped."""


def read_plan(path: Path) -> TensorRtPlan:
    """Open the plan in the folder ``path``.

    Raises:
        PlanError: no plan there, a malformed record, or a plan that is not the record's.
    """
    record = path / RECORD
    if not record.is_file():
        raise PlanError(f"{path}: no plan there ({RECORD} is missing): build one with clipship engine")
    advice = "build the plan again with clipship engine"
    content = read_record(record, record_format=FORMAT, version=FORMAT_VERSION, error=PlanError, advice=advice)
    plan = TensorRtPlan(path=path, info=PlanInfo.from_json(content))
    if not plan.file.is_file():
        raise PlanError(f"{path}: {PLAN} is missing: copy the folder again, or {advice}")
    if sha256_of(plan.file) != plan.info.plan_digest:
        raise PlanError(f"{plan.file} is not the plan that {RECORD} describes: copy the folder again, or {advice}")
    return plan


def write_plan(folder: Path, data: Any, info: PlanInfo) -> None:
    """Write the two files into ``folder``, the record last. ``data``: the plan, ``bytes`` or another buffer."""
    (folder / PLAN).write_bytes(data)
    write_json_atomic(folder / RECORD, info.to_json())


def mismatches(info: PlanInfo, target: Target, bundle: Bundle | None = None) -> Iterator[str]:
    """Why the plan cannot run on ``target`` or was not built from ``bundle``; each reason says what to do."""
    if info.runtime != target.runtime:
        who = "TensorRT, and so Triton," if target.runtime == "tensorrt" else "TensorRT-RTX"
        yield f"it is a plan of {info.runtime}, which {who} cannot load: {_again(f'with --runtime {target.runtime}')}"
    elif target.version is not None and not _runs_on_version(info, target.version):
        kind = "version-compatible, of" if info.version_compatible else "of"
        flag = "" if info.runtime == "tensorrt-rtx" or info.version_compatible else " (or with --version-compatible)"
        yield (
            f"it is {kind} {info.runtime} {info.runtime_version} and would run on {target.version}: "
            f"build it again with the version that runs it{flag}"
        )
    if target.gpu is not None and not _runs_on_gpu(info, target.gpu):
        yield f"it is for {', '.join(info.gpus)} and would run on {target.gpu}: {_again(f'with --gpu {target.gpu}')}"
    if target.platform not in (None, info.platform):
        yield f"it was built on {info.platform} and would run on {target.platform}: build it there"
    if info.weights_stripped and not target.puts_weights_back:
        yield "its weights are stripped: put them back with clipship engine BUNDLE --refit PLAN --out NEW"
    if bundle is not None and variant_of(info, bundle) is None:
        source = f"{info.onnx_file} ({info.onnx_digest[:16]})"
        yield f"it was built from an {source} that {bundle.path} does not have: {_again('from this one')}"


def validate_plan(plan: TensorRtPlan, target: Target, bundle: Bundle | None = None) -> None:
    """Validate that the plan can run on ``target`` and was built from ``bundle``.

    Raises:
        PlanError: it cannot, or was not; names every reason and what to do.
    """
    reasons = tuple(mismatches(plan.info, target, bundle))
    if reasons:
        raise PlanError(f"{plan.path}: {'; '.join(reasons)}")


def variant_of(info: PlanInfo, bundle: Bundle) -> EncoderVariant | None:
    """The variant of ``bundle`` that the plan was built from; None: no file of the bundle is."""
    return next(
        (variant for variant in bundle.image_encoders if variant_digest(bundle, variant) == info.onnx_digest), None
    )


def variant_digest(bundle: Bundle, variant: EncoderVariant) -> str:
    """The SHA-256 of the variant's ONNX file; with weights in ``<file>.data``, that of both digests, one a line."""
    digests = [bundle.files[name] for name in (variant.file, f"{variant.file}.data") if name in bundle.files]
    return digests[0] if len(digests) == 1 else sha256_of_text("\n".join(digests))


def _runs_on_version(info: PlanInfo, version: str) -> bool:
    """Plain plans need the same version; version-compatible ones also run on later ones."""
    built, present = version_parts(info.runtime_version), version_parts(version)
    shared = min(len(built), len(present))
    same = built[:shared] == present[:shared]
    return same or (info.version_compatible and built[:shared] < present[:shared])


def _runs_on_gpu(info: PlanInfo, gpu: str) -> bool:
    return gpu in info.gpus or (info.hardware_compatible and int(gpu.removeprefix("sm")) >= 80)


def version_parts(version: str) -> tuple[int, ...]:
    """(10, 14, 1) for "10.14.1", which compares as versions do."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _again(what: str) -> str:
    return f"build it again with clipship engine {what}"
