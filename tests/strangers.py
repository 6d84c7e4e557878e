"""Programs run by a user id without an account, as containers run them."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

UID = 54321
_HOME_VARIABLES = {"HOME", "USER", "LOGNAME", "TMPDIR", "CLIPSHIP_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"}
_READ_ALL = "+dac_read_search"  # the interpreter may lie in root's home
_STRANGER = (
    *("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *(f"--inh-caps={_READ_ALL}", f"--ambient-caps={_READ_ALL}"),
)
_READ_ONLY = ("for each in /tmp /var/tmp; do mount --rbind $each $each; mount -o remount,bind,ro $each; done",)


def stranger(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    read_only: bool = False,
    mounted: Mapping[Path, Path] | None = None,
    **environment: str,
) -> list[str]:
    """``command`` as such a user's, with no variable about homes but those of ``environment``; skips where it cannot.

    ``read_only``: no folder for temporary files can be written. ``mounted``: by folder that exists, what it shows.
    """
    refuse_elsewhere()
    given = {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    variables = [*(f"-u{name}" for name in _HOME_VARIABLES), *(f"{name}={value}" for name, value in given.items())]
    whole = ["env", f"--chdir={cwd}", *variables, *_STRANGER, *map(str, command)]
    mounts = [shlex.join(["mount", "--bind", str(shown), str(place)]) for place, shown in (mounted or {}).items()]
    steps = [*mounts, *(_READ_ONLY if read_only else ())]
    if steps and not _mounts():
        pytest.skip("a file system of one's own needs the right to mount")
    return ["unshare", "--mount", "sh", "-ec", "; ".join([*steps, f"exec {shlex.join(whole)}"])] if steps else whole


def run_as_stranger(command: Sequence[str | Path], *, cwd: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(stranger(command, cwd=cwd, **how), capture_output=True, text=True, timeout=300)


def own(folder: Path) -> Path:
    """Give ``folder``, which is made if it is not there, and all in it to the stranger; skips where it cannot."""
    refuse_elsewhere()
    folder.mkdir(exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UID, UID)
    return folder


def refuse_elsewhere() -> None:
    """Skip where there can be no process of another user id."""
    reason = _why_not()
    if reason:
        pytest.skip(f"a process of another user id: {reason}")


@functools.cache
def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    try:
        done = subprocess.run([*_STRANGER, sys.executable, "-c", ""], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "needs setpriv (util-linux)"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@functools.cache
def _mounts() -> bool:
    done = subprocess.run(["unshare", "--mount", "mount", "--bind", "/tmp", "/tmp"], capture_output=True)
    return done.returncode == 0
