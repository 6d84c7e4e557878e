"""A benchmark on this machine as if its processor had AVX2 and nothing later.

    python benchmarks/avx2.py benchmarks/encoder.py --out runs/encoder-avx2 --without compile autocast

ONNX Runtime and OpenVINO choose their kernels by the instruction CPUID, and take no word that says otherwise. So both
are copied, each CPUID in the copies is replaced by a trap, and a library that is loaded first answers it without
AVX-512, VNNI and AMX. PyTorch, oneDNN and MKL read environment variables. The kernels that run are those of an AVX2
machine; caches, clock and memory are this machine's.

Needs gcc and objdump (``apt-get install gcc binutils``), on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from clipship.core.files import replace_folder

PACKAGES = ("onnxruntime", "openvino")
LIBRARIES = ("onnxruntime/capi/onnxruntime_pybind11_state*.so", "openvino/libs/lib*.so*")

VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}

# Leaf 7 has all there is beyond AVX2 (Intel's manual, volume 2, CPUID): AVX-512 in EBX, ECX and EDX, AMX in EDX,
# AVX-VNNI and its siblings in EAX of its first subleaf.
ANSWER = """
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>
static void answer(int signal, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned leaf = r[REG_RAX], subleaf = r[REG_RCX], a, b, c, d;
  __cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 7 && subleaf == 0) {
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  } else if (leaf == 7) {
    a = b = c = d = 0;
  }
  r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d;
}
__attribute__((constructor)) static void ready(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGTRAP, &action, 0);
}
"""
CPUID, TRAP = b"\x0f\xa2", b"\x90\xcc"  # a trap returns behind itself, so it is the second of the two bytes


def prepared(folder: Path) -> Path:
    """``folder`` with the changed packages and the library that answers; made once for each version of them."""
    versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in PACKAGES)
    made = folder / versions
    if not made.is_dir():
        with replace_folder(made) as site:
            for name in PACKAGES:
                spec = importlib.util.find_spec(name)
                assert spec is not None
                assert spec.origin is not None
                shutil.copytree(Path(spec.origin).parent, site / name)
            for path in (path for pattern in LIBRARIES for path in site.glob(pattern) if not path.is_symlink()):
                path.write_bytes(without_cpuid(path))
            command = ["gcc", "-O1", "-shared", "-fPIC", "-x", "c", "-o", str(site / "answer.so"), "-"]
            subprocess.run(command, input=ANSWER, text=True, check=True)
    return made


def without_cpuid(path: Path) -> bytes:
    """The library at ``path`` with traps for its CPUID instructions."""
    data = bytearray(path.read_bytes())
    for offset in cpuid_offsets(path):
        assert data[offset : offset + 2] == CPUID
        data[offset : offset + 2] = TRAP
    return bytes(data)


def cpuid_offsets(path: Path) -> Iterator[int]:
    """Where in the file each CPUID instruction stands, by objdump's disassembly."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--file-offsets", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shift = 0  # of the section, between addresses and places in the file
        for line in process.stdout:
            if label := re.match(r"([0-9a-f]+) <.*\(File Offset: 0x([0-9a-f]+)\):", line):
                shift = int(label[2], 16) - int(label[1], 16)
            elif instruction := re.match(r"\s*([0-9a-f]+):\tcpuid\b", line):
                yield int(instruction[1], 16) + shift


def main() -> None:
    """Run a script of Python with its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=Path, default=Path("runs/avx2"))
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script and its arguments")
    given = parser.parse_args()
    site = prepared(given.copies.resolve())
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    here = {**os.environ, **VARIABLES, "PYTHONPATH": paths, "LD_PRELOAD": str(site / "answer.so")}
    os.execve(sys.executable, [sys.executable, *given.command], here)


if __name__ == "__main__":
    main()
