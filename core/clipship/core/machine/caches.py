"""The cache folder, and a home folder for users who have none that can be written.

Containers run under user ids without an account, with ``HOME=/``, with a read-only root. Nothing here fails for that:
the next best place is taken, the log names it in one line, and an optional cache is skipped.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from clipship.core.progress import log

_VARIABLE = "CLIPSHIP_CACHE"
_NAME = "clipship"


def cache_folder() -> Path | None:
    """``CLIPSHIP_CACHE``, or ``clipship`` in the user's cache folder; where they cannot be written, a temporary folder.

    It exists and this user can write to it. None: there is no such place. The log says either once a process.
    """
    lost, given = settle_home(), _given()
    refused = None
    for place in cache_places():
        reason = _why_not_written(place)
        if reason is None:
            told = refused or (None if given else lost)
            if told:
                _tell(f"{told}: caches go to {place}: set {_VARIABLE} to a folder that can be written and lasts")
            return place
        refused = refused or f"{place} cannot be written ({reason})"
    _tell(f"{refused or lost}: nothing is cached: set {_VARIABLE} to a folder that can be written")
    return None


def cache_places() -> list[Path]:
    """Where cached files may be, also in a read-only cache of a container image; the usual place first."""
    settle_home()
    private = _private_folder()
    places = [_usual(), private and private / _NAME]
    return list(dict.fromkeys(place for place in places if place is not None))


@cache
def settle_home() -> str | None:
    """Give this process, and those it starts, a home and a cache folder where the user's cannot be used.

    Without a home or a user name, libraries fail (OpenVINO, Matplotlib) or write into a folder called ``~``. A home
    that can be read keeps its settings and downloads.

    Returns: what is wrong with the user's own, None if nothing is.
    """
    _name_user()
    _find_temporary()
    home, base = _home(), _base()
    if home and base and _may(home, os.R_OK | os.X_OK) and _may_be_written(base):
        return None
    place = next((one for one in (_given(), _private_folder()) if one and _why_not_written(one) is None), None)
    if place is not None:
        _lend(place)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the number it gives a machine cannot be kept, which it logs
    return f"{base} cannot be written" if base else "there is no home folder"


def _lend(place: Path) -> None:
    """Point libraries to ``place`` for what they cannot keep at home."""
    home = _home()
    if home is None or not _may(home, os.R_OK | os.X_OK):
        os.environ["HOME"] = str(place)
    base = _base()
    if base is None or not _may_be_written(base):
        if base is None or not _may(base, os.R_OK | os.X_OK):
            os.environ["XDG_CACHE_HOME"] = str(place / ".cache")
        os.environ.setdefault("MPLCONFIGDIR", str(place / "matplotlib"))
        os.environ.setdefault("TRITON_HOME", str(place))


def _find_temporary() -> None:
    """A folder for temporary files where the usual ones cannot be written, but a cache can."""
    try:
        tempfile.gettempdir()
    except OSError:
        place = _usual()
        if place and _why_not_written(place) is None:
            (place / "tmp").mkdir(exist_ok=True)
            os.environ["TMPDIR"] = str(place / "tmp")


def _name_user() -> None:
    """A name for users without an account, whom :func:`getpass.getuser` refuses."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid_{os.geteuid()}"


def _given() -> Path | None:
    given = os.environ.get(_VARIABLE)
    return Path(given).absolute() if given else None


def _usual() -> Path | None:
    base = _base()
    return _given() or (base and base / _NAME)


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no account
        return None
    return home if home.is_absolute() else None


def _base() -> Path | None:
    """The folder of all programs' caches."""
    given, home = os.environ.get("XDG_CACHE_HOME", ""), _home()
    return Path(given) if os.path.isabs(given) else home and home / ".cache"


@cache
def _private_folder() -> Path | None:
    """A folder among the temporary files that only this user can write, the same for all processes of this user."""
    try:
        folder = Path(tempfile.gettempdir()) / f"{_NAME}-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    owned = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if owned else None  # otherwise another user made it, and could put programs into it


def _may(path: Path, what: int) -> bool:
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids) and os.path.isdir(path)


def _may_be_written(folder: Path) -> bool:
    """Whether ``folder`` can be written or created, without creating it."""
    nearest = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    return _may(nearest, os.W_OK | os.X_OK)


@cache
def _why_not_written(folder: Path) -> str | None:
    """Why this process cannot write to ``folder``, which is created; None: it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@cache
def _tell(message: str) -> None:
    log(message)
