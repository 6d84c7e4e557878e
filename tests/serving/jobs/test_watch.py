from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipship.core.bundle import Bundle
from clipship.core.errors import UsageError
from clipship.serving.jobs.inputs import JobImage
from clipship.serving.jobs.watch import Watcher, is_being_written
from tests.serving.bundles import jpeg_bytes
from tests.serving.jobs.folders import assert_whole, manifest_of, names_of
from tests.serving.processes import CLIPSHIP, ENVIRONMENT, clipship

SETTLE_S = 0.05


def watcher(folder: Path, done: set[str] | None = None) -> Watcher:
    return Watcher([str(folder)], settle_s=SETTLE_S, done=done or set())


def eventually(watching: Watcher, count: int = 1) -> list[JobImage]:
    """The next ``count`` images, however slow this machine is."""
    items: list[JobImage] = []
    while len(items) < count:
        time.sleep(SETTLE_S)
        items += watching.images()
    return items


def test_images_come_once_when_they_have_settled(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "notes.txt").write_bytes(b"a")
    watching = watcher(tmp_path)
    assert list(watching.images()) == [], "seen for the first time"
    assert [item.name for item in eventually(watching)] == [str(tmp_path / "a.jpg")]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jpg").write_bytes(b"b")
    assert [item.image for item in eventually(watching)] == [tmp_path / "sub" / "b.jpg"]
    time.sleep(2 * SETTLE_S)
    assert list(watching.images()) == list(watching.images()) == []


def test_an_image_that_grows_is_waited_for(tmp_path: Path) -> None:
    """Closed after every write, so that only its changes tell."""
    watching = watcher(tmp_path)
    for number in range(5):
        with (tmp_path / "a.jpg").open("ab") as handle:
            handle.write(b"a")
        assert list(watching.images()) == []
        time.sleep(2 * SETTLE_S) if number < 4 else None
    (item,) = eventually(watching)
    assert item.name == str(tmp_path / "a.jpg")


def test_an_image_that_is_open_for_writing_is_waited_for(tmp_path: Path) -> None:
    if not has_leases(tmp_path):
        pytest.skip("this file system has no leases")
    watching = watcher(tmp_path)
    with (tmp_path / "a.jpg").open("wb") as handle:
        handle.write(b"half")
        handle.flush()
        for _ in range(5):
            assert list(watching.images()) == []
            time.sleep(2 * SETTLE_S)
    assert len(eventually(watching)) == 1


def has_leases(folder: Path) -> bool:
    with (folder / "probe").open("wb"):
        return is_being_written(str(folder / "probe"))


def test_a_writer_that_comes_while_we_look_does_not_end_us(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    program = f"while True: open({str(tmp_path / 'a.jpg')!r}, 'ab').close()"
    with subprocess.Popen(["python3", "-c", program]) as writer:
        answers = {is_being_written(str(tmp_path / "a.jpg")) for _ in range(20_000)}
        writer.kill()
    assert answers <= {True, False}
    assert not is_being_written(str(tmp_path / "gone.jpg"))


def test_what_was_done_before_does_not_come_again(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    watching = watcher(tmp_path, {str(tmp_path / "a.jpg")})
    assert [item.name for item in eventually(watching)] == [str(tmp_path / "b.jpg")]


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.05)


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


def start(folder: Path, bundle: Bundle, *more: str) -> subprocess.Popen[str]:
    command = ["classify", str(folder / "in"), "--watch", "--settle-s", "0.1", "--bundle", str(bundle.path), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*CLIPSHIP, *command], env=ENVIRONMENT, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def put(folder: Path, number: int) -> str:
    path = folder / "in" / f"{number:03d}.jpg"
    path.write_bytes(jpeg_bytes(number))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_into_shards_ends_whole_and_goes_on(watched: Path, bundle: Bundle, number: signal.Signals) -> None:
    out = watched / "out"
    options = ("--out", str(out), "--shard-size", "2", "--json")
    names = [put(watched, each) for each in range(3)]
    with start(watched, bundle, *options) as first:
        until(lambda: any(out.glob(".part-000001.*")))  # the third image may be found later than the first two
        first.send_signal(number)
        summary = json.loads(first.communicate()[0])
    assert (first.returncode, summary["images"]) == (0, 3), "the last shard is finished"
    assert assert_whole(out, names) == 3
    names += [put(watched, each) for each in (4, 3)][::-1]
    with start(watched, bundle, *options) as second:
        until(lambda: manifest_of(out)["images"] == 5)
        second.kill()
    names.append(put(watched, 5))
    names.append(put(watched, 6))
    with start(watched, bundle, *options) as third:
        until(lambda: manifest_of(out)["images"] == 7)
        third.send_signal(number)
        third.communicate()
    assert names_of(out) == names


def test_a_watch_on_the_terminal(watched: Path, bundle: Bundle) -> None:
    with start(watched, bundle, "--json") as running:
        name = put(watched, 0)
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["path"] == name
        name = put(watched, 1)
        assert json.loads(running.stdout.readline())["path"] == name
        running.send_signal(signal.SIGINT)
        assert "2 images classified" in running.communicate()[1]
    assert running.returncode == 0


def test_what_cannot_be_watched(watched: Path, bundle: Bundle) -> None:
    (watched / "a.jpg").touch()
    for more, message in (
        ([watched / "a.jpg"], "give folders that exist"),
        ([watched / "gone"], "give folders that exist"),
        ([watched / "in", "--out", watched / "out.csv"], "a watch has no end"),
        ([watched / "in", "--settle-s", "0"], "positive number of seconds"),
    ):
        done = clipship("classify", "--watch", "--bundle", bundle.path, *more)
        assert (done.returncode, message in done.stderr) == (UsageError.exit_code, True), done.stderr
    assert sorted(os.listdir(watched)) == ["a.jpg", "in"]
