"""Worker processes end with the process that started them, and with the block that uses them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipship.training.worker_pool import worker_pool


def remember(value: str) -> None:
    os.environ["REMEMBERED"] = value


def test_the_initializer_is_called_in_every_process() -> None:
    with worker_pool(1, remember, "it") as pool:
        assert pool.submit(os.getenv, "REMEMBERED").result() == "it"
    assert "REMEMBERED" not in os.environ


def interrupted() -> None:
    with worker_pool(1) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 60)
        raise KeyboardInterrupt


def test_a_block_that_raises_ends_work_at_once() -> None:
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - started_s < 30


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from clipship.training.worker_pool import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().strip()
        assert worker.name.isdigit()
        parent.kill()
    deadline = time.monotonic() + 20
    while worker.exists() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the process outlives its parent"
        time.sleep(0.05)
