"""Runtimes that can run an encoder here: ONNX Runtime's providers and OpenVINO, each as a plain function.

Runtimes deviate silently: ONNX Runtime puts nodes on another provider, OpenVINO computes in another precision. Both are
checked after a run, and refused.

Shape legend: N rows (images or class names), D features.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.comparison import Runner
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.machine.processor import emulates, this_processor
from clipship.core.machine.runtimes import OpenVinoEncoder
from clipship.core.machine.runtimes import Run as Run
from clipship.core.precisions import PRECISIONS

if TYPE_CHECKING:
    import onnxruntime

CPU_PROVIDER = "CPUExecutionProvider"

_REMOTE = frozenset({"AzureExecutionProvider"})
"""Providers that run nothing here: ONNX Runtime lists them, and then computes everything on the CPU."""

_HEAVY = ("MatMul", "Gemm", "Conv", "Attention")
"""Parts of the names of operators that do the work; shapes may be computed on the CPU for a GPU."""

_OPTIONS: Mapping[str, Mapping[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""By provider: what keeps float32 products float32."""


class NotRunnable(CheckFailed):
    """This machine, or this runtime, cannot run the file at all: nothing was compared."""


def local_providers() -> tuple[str, ...]:
    """The providers of this ONNX Runtime that compute on this machine, the CPU last.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    available: list[str] = _onnxruntime().get_available_providers()
    return tuple(name for name in available if name not in _REMOTE)


def onnx_session(path: Path, provider: str = CPU_PROVIDER, **options: Any) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on ``provider``; :func:`onnx_function` checks that the nodes run there, too.

    ONNX Runtime falls back to the CPU silently; here that is an error. ``options`` are those of ``SessionOptions``.

    Raises:
        NotRunnable: the provider is not available or was not taken, or has no kernel for one of the nodes.
        CheckFailed: the file cannot be loaded.
        MissingExtraError: onnxruntime is not installed.
    """
    onnxruntime = _onnxruntime()
    settings = onnxruntime.SessionOptions()
    for name, value in {"log_severity_level": 4, **options}.items():  # 4: what goes wrong is raised, too
        setattr(settings, name, value)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise NotRunnable(f"ONNX Runtime has no {provider} here: it has {', '.join(available)}")
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, _OPTIONS.get(provider, {}))])
    except _onnxruntime_errors() as error:
        kind = NotRunnable if "NOT_IMPLEMENTED" in str(error) else CheckFailed
        raise kind(f"{path.name}: ONNX Runtime cannot load it ({_line(error)})") from error
    if session.get_providers()[0] != provider:
        raise NotRunnable(f"{path.name}: ONNX Runtime took {session.get_providers()[0]} instead of {provider}")
    return session


def session_function(session: onnxruntime.InferenceSession) -> Run:
    """A one-input, one-output session as a function of its input array; it raises CheckFailed when a run fails."""
    name = session.get_inputs()[0].name

    def run(rows: NDArray[Any]) -> NDArray[np.float32]:
        try:
            result: NDArray[np.float32] = session.run(None, {name: rows})[0]
        except _onnxruntime_errors() as error:
            raise CheckFailed(f"ONNX Runtime fails on {len(rows)} rows ({_line(error)})") from error
        return result

    return run


def onnx_function(path: Path, provider: str, sample: NDArray[Any]) -> Run:
    """The ONNX file at ``path`` on ``provider``; a run of ``sample`` [1, ...] has shown that its nodes run there.

    Raises:
        NotRunnable, CheckFailed, MissingExtraError: as :func:`onnx_session`.
        CheckFailed: matrix products ran on another provider.
    """
    if provider != CPU_PROVIDER:  # there is nothing that the CPU's nodes could fall back to
        _validate_provider(path, provider, nodes_by_provider(path, provider, sample))
    return session_function(onnx_session(path, provider))


def onnx_runner(path: Path, sample: NDArray[Any]) -> Runner:
    """The model at ``path`` on ONNX Runtime's CPU provider, tried on ``sample``; raises as :func:`onnx_function`."""
    return Runner(name=CPU_PROVIDER, run=onnx_function(path, CPU_PROVIDER, sample))


def nodes_by_provider(path: Path, provider: str, sample: NDArray[Any]) -> Mapping[str, Counter[str]]:
    """What ran when ``sample`` [1, ...] was run with ``provider``: by provider, how often each kind of operator.

    Taken from ONNX Runtime's own profile of the run, after all its graph changes.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        session = onnx_session(path, provider, enable_profiling=True, profile_file_prefix=prefix)
        session_function(session)(sample)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran: dict[str, Counter[str]] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and about.get("provider"):
            ran.setdefault(about["provider"], Counter())[about.get("op_name", "?")] += 1
    return ran


def _validate_provider(path: Path, provider: str, ran: Mapping[str, Counter[str]]) -> None:
    products = {
        name: sum(count for kind, count in kinds.items() if any(word in kind for word in _HEAVY))
        for name, kinds in ran.items()
    }
    elsewhere = [f"{count} on {name}" for name, count in products.items() if count and name != provider]
    if elsewhere or provider not in ran:
        where = ", ".join(elsewhere) or "no node on it"
        raise CheckFailed(f"{path.name}: asked for {provider}, but ONNX Runtime ran its matrix products: {where}")


def openvino_function(path: Path, precision: str = "fp32") -> Run:
    """The model at ``path`` (.xml or .onnx) on OpenVINO's CPU device, computing in ``precision``.

    Raises:
        NotRunnable: the CPU cannot compute in that precision; OpenVINO would silently emulate it or take another one.
        CheckFailed: OpenVINO cannot read the file, or a run fails.
        MissingExtraError: openvino is not installed.
    """
    emulated = emulates("openvino", precision, this_processor())
    if emulated:
        raise NotRunnable(f"{path.name}: {precision} by OpenVINO: {emulated}")
    try:
        encode = OpenVinoEncoder(str(path), precision)
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    except RuntimeError as error:
        raise CheckFailed(f"{path.name}: OpenVINO cannot load it ({_line(error)})") from error
    _validate_precision(path, PRECISIONS[precision].openvino_type, encode.compiled)

    def run(rows: NDArray[Any]) -> NDArray[np.float32]:
        try:
            return encode(rows)
        except RuntimeError as error:
            raise CheckFailed(f"OpenVINO fails on {len(rows)} rows ({_line(error)})") from error

    return run


def _validate_precision(path: Path, asked: str, compiled: Any) -> None:
    """Validate the precision of the compiled graph's own nodes, not the option."""
    given: str = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    ran = openvino_precisions(compiled)
    if given != asked or (asked != "f32" and asked not in ran) or (asked == "f32" and ran & {"f16", "bf16"}):
        seen = ", ".join(sorted(ran)) or "none"
        raise NotRunnable(f"{path.name}: OpenVINO was asked for {asked}; it has {given}, its matrix products {seen}")


def openvino_precisions(compiled: Any) -> set[str]:
    """The types that the matrix products of OpenVINO's compiled model run in, e.g. {"bf16"}."""
    found = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind = str(about["layerType"].value) if "layerType" in about else ""
        if kind in ("FullyConnected", "MatMul", "Convolution") and "runtimePrecision" in about:
            found.add(str(about["runtimePrecision"].value).lower())
    return found


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    return onnxruntime


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions: one a status code, with no root but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(one for one in vars(state).values() if isinstance(one, type) and issubclass(one, Exception))


def _line(error: BaseException) -> str:
    """An error's first 300 characters on one line."""
    return " ".join(str(error).split())[:300]
