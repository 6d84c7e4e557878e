"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipship.core.errors import UsageError
from clipship.core.files import locked_folder, replace_file, replace_folder, sha256_of, write_json_atomic


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_while_writing(final: Path) -> None:
    with replace_file(final) as temporary:
        temporary.write_text("new, but")
        raise RuntimeError("half way")


def fail_while_writing_folder(final: Path) -> None:
    with replace_folder(final) as temporary:
        (temporary / "file").write_text("new, but")
        raise RuntimeError("half way")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "result"
    final.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        fail_while_writing(final)
    assert final.read_text() == "old"
    assert listing(tmp_path) == ["result"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    for content in ("first", "second"):
        with replace_folder(final) as temporary:
            (temporary / "file").write_text(content)
    assert (final / "file").read_text() == "second"
    assert listing(tmp_path) == ["folder"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with replace_folder(final) as temporary:
        (temporary / "file").write_text("first")
    with pytest.raises(RuntimeError, match="half way"):
        fail_while_writing_folder(final)
    assert (final / "file").read_text() == "first"
    assert listing(tmp_path) == ["folder"]


KILLED = """
import sys, time
from pathlib import Path
from clipship.core.files import replace_folder
with replace_folder(Path(sys.argv[1])) as temporary:
    (temporary / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_hidden_and_removed_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(final)], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    assert run.stdout.readline() == b"writing\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not final.exists()
    assert all(name.startswith(".folder.") for name in listing(tmp_path))
    with replace_folder(final) as temporary:
        (temporary / "file").write_text("whole")
    assert listing(tmp_path) == ["folder"]


def test_a_running_writers_temporary_is_left_alone(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with replace_folder(final) as first, replace_folder(final) as second:
        (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (final / "file").read_text() == "first"  # the outer one finished last


def test_json_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json_atomic(path, {"ä": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "ä": 1\n}\n'
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_locked_folder_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path, "somebody is at work: wait"),
        pytest.raises(UsageError, match=f"{tmp_path}: somebody is at work: wait"),
        locked_folder(tmp_path, "somebody is at work: wait"),
    ):
        pass
    with locked_folder(tmp_path, "somebody is at work: wait"):
        pass


def test_a_lock_on_a_folder_that_is_no_more_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced between opening and locking: the lock would be on a folder that nobody sees."""
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    opened = os.open

    def replaced(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        (tmp_path / "out").rename(tmp_path / "gone")
        (tmp_path / "other").rename(tmp_path / "out")
        return descriptor

    monkeypatch.setattr(os, "open", replaced)
    with pytest.raises(UsageError, match="somebody"), locked_folder(tmp_path / "out", "somebody is at work"):
        pass
