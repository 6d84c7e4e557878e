"""This machine's processor, and whether a variant of the image encoder runs on it as it did where it was measured.

A runtime silently emulates what the processor has no instruction for, several times slower. So a measured speed counts
only on a processor with the instruction sets of the one it was measured on.

This file needs ``precisions.py`` only; copies of both lie beside the model that runs inside Triton.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.core.precisions import PRECISIONS

CPUINFO = Path("/proc/cpuinfo")
"""Linux's description of its processors."""

INSTRUCTION_SETS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16"),
)
"""Instruction sets that runtimes multiply matrices with, by Linux's names."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What is known about a processor."""

    name: str
    """As its maker calls it; "an unknown processor" where the system does not say."""
    instruction_sets: tuple[str, ...]
    """Of :data:`INSTRUCTION_SETS`; none where the system does not say."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {"name": self.name, "instruction_sets": list(self.instruction_sets)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Processor:
        """The inverse of :meth:`to_json`."""
        return cls(name=content["name"], instruction_sets=tuple(content["instruction_sets"]))

    def lacks(self, instruction_sets: Collection[str]) -> tuple[str, ...]:
        """Those of ``instruction_sets`` that it does not have."""
        return tuple(one for one in instruction_sets if one not in self.instruction_sets)

    def __str__(self) -> str:
        return f"{self.name} ({' '.join(self.instruction_sets) or 'instruction sets unknown'})"


def processor_from_cpuinfo(text: str) -> Processor:
    """The first processor in the text of Linux's ``/proc/cpuinfo``, of x86-64 or Arm."""
    found = {key: value for key, value in re.findall(r"^(.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE)}
    flags = found.get("flags", found.get("Features", "")).split()
    name = found.get("model name") or platform.processor() or "an unknown processor"
    return Processor(name=name, instruction_sets=tuple(one for one in INSTRUCTION_SETS if one in flags))


def this_processor() -> Processor:
    """The processor of this machine."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return processor_from_cpuinfo(text)


def never_runs(runtime: str, precision: str) -> str:
    """Why no processor computes a variant of ``precision`` by ``runtime``; empty where some do."""
    return PRECISIONS[precision].onnxruntime_lacks if runtime == "onnx" else ""


def emulates(runtime: str, precision: str, processor: Processor) -> str:
    """Why ``runtime`` would emulate ``precision`` on ``processor``; empty where it has the instructions."""
    needed = PRECISIONS[precision].openvino_needs if runtime == "openvino" else ()
    if needed and len(processor.lacks(needed)) == len(needed):
        return f"{processor.name} has neither {' nor '.join(needed)}, so it would emulate {precision}, slower than fp32"
    return ""


def measured_elsewhere(runtime: str, precision: str, measured_with: Collection[str], processor: Processor) -> str:
    """Why the measured speed of a variant does not hold on ``processor``; empty where it does.

    ONNX Runtime's variants are the portable ones: they are chosen without a speed.

    Args:
        measured_with: instruction sets of the processor that the speed was measured on; empty: unknown.
    """
    decisive = [one for one in PRECISIONS[precision].faster_with if one in measured_with]
    lacking = () if runtime == "onnx" else processor.lacks(decisive)
    return f"its speed was measured with {', '.join(lacking)}, which {processor.name} lacks" if lacking else ""


def runtime_here(runtime: str, precision: str, measured_with: Collection[str], processor: Processor) -> tuple[str, str]:
    """The runtime for a variant on ``processor`` where ``runtime`` was the fastest elsewhere; and why it is another.

    Raises:
        RuntimeError: no runtime computes ``precision`` on ``processor`` without emulating it; says what to do.
    """
    problem = never_runs(runtime, precision) or emulates(runtime, precision, processor)
    if problem:
        raise RuntimeError(f"{precision}: {problem}: write the repository again with another --precision")
    why = measured_elsewhere(runtime, precision, measured_with, processor)
    return ("onnx" if why else runtime), why
