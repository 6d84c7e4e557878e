"""How far ahead of a model the one before it runs, by a clock of the test's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import numpy as np
import pytest

from clipship.serving.repository.write import sources_folder


class Clock:
    """Sleeping takes no time."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def doors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as Triton's processes import it, with memory of this test only."""
    prefix = f"clipship_test_{uuid4().hex}_"
    monkeypatch.setenv("CLIPSHIP_SHM_PREFIX", prefix)
    spec = importlib.util.spec_from_file_location("clipship_doors", sources_folder() / "python" / "doors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "time", clock)
    yield module
    for file in Path("/dev/shm").glob(f"{prefix}*"):
        file.unlink()


def waited_s(doors: ModuleType, outside: object, work: int) -> float:
    before_s: float = doors.time.now_s
    outside.wait(work)  # type: ignore[attr-defined]
    waited: float = doors.time.now_s - before_s
    return round(waited, 3)


def test_nobody_waits_where_there_is_no_door(doors: ModuleType) -> None:
    doors.Door("other_0_0")
    assert waited_s(doors, doors.Doors("model"), 10**9) == 0


def test_a_turns_work_sets_out_to_an_idle_model_and_more_when_that_was_dropped(doors: ModuleType, clock: Clock) -> None:
    door, outside = doors.Door("model_0_0"), doors.Doors("model")
    with door.closed(100):
        clock.sleep(1)
    assert [waited_s(doors, outside, work) for work in (20, 10)] == [0, 0]
    assert waited_s(doors, outside, 1) == pytest.approx(0.021, abs=0.002)
    clock.sleep(1)
    assert waited_s(doors, outside, 1000) == 0, "a request is never parted"


def test_a_turns_work_waits_for_a_model_at_work(doors: ModuleType, clock: Clock) -> None:
    door, outside = doors.Door("model_0_0"), doors.Doors("model")
    with door.closed(100):
        clock.sleep(1)
    with door.closed(100):
        assert [waited_s(doors, outside, work) for work in (20, 10)] == [0, 0]
        assert waited_s(doors, outside, 1) == doors._LONGEST_S + 0.001, "a dead model takes none of it"
    with door.closed(20):
        assert waited_s(doors, outside, 1) > 0, "10 are still on their way; it has become slower, a turn's work is less"


def test_a_model_between_two_turns_has_dropped_nothing(doors: ModuleType, clock: Clock) -> None:
    door, outside = doors.Door("model_0_0"), doors.Doors("model")
    with door.closed(100):
        clock.sleep(1)
    with door.closed(100):
        assert waited_s(doors, outside, 30) == 0
        clock.sleep(1)
    assert waited_s(doors, outside, 1) == pytest.approx(0.021, abs=0.002)


def test_one_of_several_instances_is_enough(doors: ModuleType, clock: Clock) -> None:
    busy, idle = doors.Door("model_0_0"), doors.Door("model_0_1")
    for door in (busy, idle):
        with door.closed(100):
            clock.sleep(1)
    outside = doors.Doors("model")
    with busy.closed(1000):
        assert [waited_s(doors, outside, 30) for _ in range(2)] == [0, 0]


def test_all_who_send_share_what_may_be_on_its_way(doors: ModuleType, clock: Clock) -> None:
    """Files and pixels come to the encoder from two models, and a decoder may have several instances."""
    door, senders = doors.Door("model_0_0"), [doors.Doors("model") for _ in range(3)]
    with door.closed(100):
        clock.sleep(1)
    queue, longest = 0, 0
    for _ in range(20):
        with door.closed(10):
            for sender in senders:
                while sender._look() and any(side.admits(5) for side in sender._sides.values()):
                    queue += 5
            clock.sleep(0.1)
        longest = max(longest, queue)
        queue -= min(queue, 10)
    assert 20 <= longest <= 30, "0.3 s of work, whoever sent it"


def test_an_instance_that_starts_again_is_seen_at_once(doors: ModuleType, clock: Clock) -> None:
    outside = doors.Doors("model")
    dead = doors.Door("model_0_0")
    with dead.closed(1):
        clock.sleep(1)
    with dead.closed(100):
        assert waited_s(doors, outside, 1) == 0
        assert waited_s(doors, outside, 1) == doors._LONGEST_S + 0.001
        doors.Door("model_0_0")
        assert waited_s(doors, outside, 1) < 0.03


def test_work_is_images_or_bytes(doors: ModuleType) -> None:
    assert doors.work_of(np.zeros((3, 4, 4, 3), dtype=np.uint8)) == 3
    assert doors.work_of(np.array([[b""], [b"12"]], dtype=np.object_)) == 4
