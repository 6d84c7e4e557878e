"""What a processor is, and which variants it runs at the speed that was measured on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipship.core.machine import processor
from clipship.core.machine.processor import Processor, emulates, processor_from_cpuinfo, runtime_here, this_processor

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480C
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
bogomips\t: 4000.00

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd aes asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""
ROME = Processor(name="AMD EPYC 7B12", instruction_sets=("avx2",))
GENOA = Processor(name="AMD EPYC 9654", instruction_sets=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"))
SAPPHIRE = processor_from_cpuinfo(X86)


def test_the_first_processor_of_linuxs_list() -> None:
    sets = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
    assert (SAPPHIRE.name, SAPPHIRE.instruction_sets) == ("Intel(R) Xeon(R) Platinum 8480C", sets)
    assert processor_from_cpuinfo(ARM).instruction_sets == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16")


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "absent")
    assert this_processor().instruction_sets == ()
    assert "instruction sets unknown" in str(this_processor())
    assert emulates("openvino", "bf16", this_processor())


@pytest.mark.parametrize(
    ("runtime", "precision", "measured_on", "here", "expected"),
    [
        ("openvino", "int8", GENOA, SAPPHIRE, "openvino"),
        ("openvino", "int8", SAPPHIRE, GENOA, "onnx"),
        ("openvino", "int8", GENOA, ROME, "onnx"),
        ("openvino", "int8", ROME, GENOA, "openvino"),
        ("openvino", "fp32", SAPPHIRE, GENOA, "openvino"),
        ("openvino", "fp32", GENOA, ROME, "onnx"),
        ("openvino", "bf16", SAPPHIRE, GENOA, "openvino"),
        ("onnx", "int8", GENOA, ROME, "onnx"),
    ],
)
def test_who_runs_a_variant_on_another_processor(
    runtime: str, precision: str, measured_on: Processor, here: Processor, expected: str
) -> None:
    given, why = runtime_here(runtime, precision, measured_on.instruction_sets, here)
    assert given == expected
    assert bool(why) == (given != runtime)


def test_the_reason_names_what_is_lacking() -> None:
    why = runtime_here("openvino", "int8", GENOA.instruction_sets, ROME)[1]
    assert why == "its speed was measured with avx512f, avx512_vnni, which AMD EPYC 7B12 lacks"


def test_of_a_speed_that_nobody_knows_more_about_it_is_taken() -> None:
    assert runtime_here("openvino", "int8", (), ROME) == ("openvino", "")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("openvino", "AMD EPYC 7B12 has neither avx512_bf16 nor amx_bf16, so it would emulate bf16, slower than fp32"),
        ("onnx", "it has bfloat16 kernels for GPUs only"),
    ],
)
def test_bfloat16_is_refused_where_it_is_emulated(runtime: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"bf16: {message}: write the repository again with another --precision"):
        runtime_here(runtime, "bf16", GENOA.instruction_sets, ROME)
