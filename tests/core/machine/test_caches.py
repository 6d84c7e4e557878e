"""Where caches go for users whose home cannot be written, and for those who have none."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from clipship.core.cli import doctor
from clipship.core.cli import main as cli
from clipship.core.machine.caches import cache_folder
from tests.strangers import UID, own, run_as_stranger

PROGRAM = """
import getpass, json, os
from pathlib import Path
from clipship.core.machine.caches import cache_folder, cache_places, settle_home
folders = [str(cache_folder()), str(cache_folder())]
told = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR")}
print(json.dumps({"folder": folders[0], "home": str(Path.home()), "user": getpass.getuser(), **told}))
"""


def found(cwd: Path, **environment: str) -> tuple[dict[str, str], list[str]]:
    """What the program finds as a stranger, and the lines of its log."""
    done = run_as_stranger([sys.executable, "-c", PROGRAM], cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    return answer, done.stderr.splitlines()


@pytest.fixture
def own_temporary(tmp_path: Path) -> Path:
    return own(tmp_path / "tmp")


def line(what: str, folder: Path) -> str:
    return f"{what}: caches go to {folder}: set CLIPSHIP_CACHE to a folder that can be written and lasts"


def test_no_home_at_all(own_temporary: Path) -> None:
    answer, log = found(own_temporary, TMPDIR=str(own_temporary))
    private = own_temporary / f"clipship-{UID}"
    assert answer["home"] == str(private)
    assert answer["folder"] == str(private / ".cache" / "clipship")
    assert answer["user"] == f"uid_{UID}"
    assert log == [line("there is no home folder", private / ".cache" / "clipship")]
    assert private.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["slash", "read-only", "file", "absent"])
def test_a_home_that_cannot_be_written(own_temporary: Path, tmp_path: Path, kind: str) -> None:
    home = {"slash": Path("/")}.get(kind, tmp_path / kind)
    if kind == "read-only":
        home.mkdir()
    if kind == "file":
        home.touch()
    answer, log = found(own_temporary, TMPDIR=str(own_temporary), HOME=str(home))
    private = own_temporary / f"clipship-{UID}"
    assert answer["home"] == str(home if home.is_dir() else private), "what can be read is kept"
    assert Path(answer["folder"]).parent == private / ".cache"
    assert log == [line(f"{home / '.cache'} cannot be written", Path(answer["folder"]))]
    assert answer["MPLCONFIGDIR"] == (str(private / "matplotlib") if home.is_dir() else None)


def test_downloads_in_a_read_only_home_are_still_found(own_temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    answer, log = found(own_temporary, TMPDIR=str(own_temporary), HOME=str(tmp_path / "home"))
    assert answer["XDG_CACHE_HOME"] is None
    assert answer["home"] == str(tmp_path / "home")
    assert answer["folder"] == str(own_temporary / f"clipship-{UID}" / "clipship")
    assert len(log) == 1


def test_a_given_folder_is_taken_without_a_word_and_lends_libraries_a_home(own_temporary: Path) -> None:
    given = own(own_temporary / "given")
    answer, log = found(own_temporary, CLIPSHIP_CACHE=str(given), TMPDIR=str(own_temporary))
    assert (answer["folder"], answer["home"], log) == (str(given), str(given), [])


def test_a_given_folder_that_cannot_be_written(own_temporary: Path, tmp_path: Path) -> None:
    home = own(tmp_path / "home")
    answer, log = found(
        own_temporary, CLIPSHIP_CACHE=str(tmp_path / "given"), HOME=str(home), TMPDIR=str(own_temporary)
    )
    assert answer["folder"] == str(own_temporary / f"clipship-{UID}" / "clipship")
    assert answer["home"] == str(home)
    assert log == [line(f"{tmp_path / 'given'} cannot be written (Permission denied)", Path(answer["folder"]))]


def test_a_folder_that_somebody_else_made_is_not_trusted(own_temporary: Path) -> None:
    (own_temporary / f"clipship-{UID}").mkdir()
    os.chmod(own_temporary / f"clipship-{UID}", 0o777)
    program = "from clipship.core.machine.caches import cache_folder; print(cache_folder(), cache_folder())"
    done = run_as_stranger([sys.executable, "-c", program], cwd=own_temporary, TMPDIR=str(own_temporary))
    assert done.stdout == "None None\n"
    expected = "there is no home folder: nothing is cached: set CLIPSHIP_CACHE to a folder that can"
    assert done.stderr == f"{expected} be written\n"


def test_no_place_at_all(tmp_path: Path) -> None:
    program = "from clipship.core.machine.caches import cache_folder; print(cache_folder())"
    done = run_as_stranger([sys.executable, "-c", program], cwd=Path("/"), read_only=True, HOME="/")
    assert done.stdout == "None\n"
    assert done.stderr.startswith("/.cache/clipship cannot be written (")
    assert "nothing is cached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cache_lends_temporary_files_a_place(stranger_folder: Path) -> None:
    """A container whose root is read-only, with one volume that is not."""
    volume = own(stranger_folder / "volume")
    program = (
        "import tempfile\n"
        "from clipship.core.machine.caches import cache_folder\n"
        "print(cache_folder(), tempfile.gettempdir())"
    )
    command = [sys.executable, "-c", program]
    place = {"mounted": {volume: volume}, "CLIPSHIP_CACHE": str(volume)}
    done = run_as_stranger(command, cwd=Path("/"), read_only=True, **place)
    assert (done.stdout, done.stderr) == (f"{volume} {volume / 'tmp'}\n", "")


def test_a_good_home_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPSHIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = dict(os.environ)
    assert cache_folder() == tmp_path / "caches" / "clipship"
    assert dict(os.environ) == before
    monkeypatch.setenv("CLIPSHIP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_no_place_for_temporary_files_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    monkeypatch.setattr(cli, "settle_home", lambda: None)
    monkeypatch.setattr(doctor, "findings", tempfile.gettempdir)
    assert cli.main(["doctor"]) == 2
    expected = "no folder for temporary files can be written: set TMPDIR or CLIPSHIP_CACHE to one that can"
    assert capsys.readouterr().err == f"clipship: {expected}\n"


@pytest.mark.parametrize("verb", [("doctor",), ("recipes",)])
def test_verbs_without_a_home(own_temporary: Path, verb: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "clipship", *verb]
    done = run_as_stranger(command, cwd=own_temporary, TMPDIR=str(own_temporary))
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr
