"""Installs NVIDIA's perf_analyzer, which the wheel of tritonclient carries, into the cache folder.

The wheel's binary needs two libraries that it does not carry: libcudart, of which there is a wheel, and libb64, which
lies in the embedded Triton. ``clipship bench`` finds it there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from clipship.core.errors import ClipshipError
from clipship.core.files import replace_folder
from clipship.core.machine.caches import cache_folder
from clipship.serving.bench.perf_analyzer import FOLDER, VERSION, Analyzer, installed
from clipship.serving.server.install import embedded_environment


def found() -> Analyzer:
    """The program on the PATH, or the wheel's, installed on first use.

    Raises:
        ClipshipError: it cannot be installed here, or does not start.
    """
    if (there := installed()) is not None:
        return there
    cache = cache_folder()
    if cache is None:
        raise ClipshipError("perf_analyzer has no folder: set CLIPSHIP_CACHE to one that can be written")
    _install(cache / FOLDER)
    if (there := installed()) is None:
        raise ClipshipError(f"the perf_analyzer in {cache / FOLDER} does not start: put another on the PATH")
    return there


def _install(folder: Path) -> None:
    libraries = embedded_environment().variables["LD_LIBRARY_PATH"].split(os.pathsep)
    bundled = [path for library in libraries for path in Path(library).glob("libb64-*.so.0d")]
    with replace_folder(folder) as temporary:
        wheels = [f"tritonclient=={VERSION}", "nvidia-cuda-runtime-cu12"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary), *wheels]
        if subprocess.run(command, check=False).returncode != 0 or not bundled:
            raise ClipshipError("perf_analyzer could not be installed: check the network, or put one on the PATH")
        shutil.copyfile(bundled[0], temporary / "libb64.so.0d")
        (temporary / "bin" / "perf_analyzer").chmod(0o755)
