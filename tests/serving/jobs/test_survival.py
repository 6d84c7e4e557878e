"""Jobs whose client or server is killed, whose images are broken, and which are very long.

What is asserted is the same every time: the folder of results has the first so many images, each once, and at last all.
The fast tests are small; ``make chaos`` runs as many rounds as the project promises.
"""

from __future__ import annotations

import io
import os
import random
import signal
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipship.core.bundle import Bundle
from clipship.serving.server.process import Server, start_server
from tests.serving.bundles import jpeg_bytes
from tests.serving.jobs.folders import assert_complete, assert_whole, manifest_of, many_images, write_tar
from tests.serving.processes import CLIPSHIP, ENVIRONMENT, children_of

SEED = 20_260


def start(
    images: Path, out: Path, *more: str | Path, python: tuple[str, ...] = CLIPSHIP[1:]
) -> subprocess.Popen[bytes]:
    """A job in a process of its own, a shard every 100 rows."""
    command = [CLIPSHIP[0], *python, "classify", images, "--out", out, "--shard-size", "100", *more]
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/"
    )


def finish(job: subprocess.Popen[bytes], *, code: int = 0) -> str:
    """Wait for the job's end; what it said on stderr."""
    said = job.communicate()[1].decode()
    assert job.returncode == code, said
    return said


def kill_the_client(rounds: int, images: Path, names: list[str], out: Path, bundle: Bundle) -> int:
    """Kill the job ``rounds`` times, each time after a random while; how often it was in mid-job."""
    chance = random.Random(SEED)
    in_mid_job = 0
    restart: tuple[str, ...] = ()
    for _ in range(rounds):
        with start(images, out, "--bundle", bundle.path, *restart) as job:
            try:
                job.wait(timeout=chance.uniform(0.5, 2.5))
            except subprocess.TimeoutExpired:
                job.send_signal(signal.SIGKILL)
                job.wait()
            assert job.stderr is not None
            assert b"Traceback" not in job.stderr.read()
        done = assert_whole(out, names)
        in_mid_job += 0 < done < len(names)
        restart = ("--restart",) if done == len(names) else ()
    finish(start(images, out, "--bundle", bundle.path))
    assert_complete(out, names)
    return in_mid_job


def test_the_client_is_killed(tmp_path: Path, bundle: Bundle) -> None:
    names = many_images(tmp_path / "images.tar", 1000)
    kill_the_client(2, tmp_path / "images.tar", names, tmp_path / "out", bundle)


@pytest.mark.chaos
def test_the_client_is_killed_at_50_moments(tmp_path: Path, bundle: Bundle) -> None:
    names = many_images(tmp_path / "images.tar", 6000)
    assert kill_the_client(50, tmp_path / "images.tar", names, tmp_path / "out", bundle) >= 10


def test_a_kill_between_a_shard_and_its_manifest(tmp_path: Path, bundle: Bundle) -> None:
    """The moment that random kills hardly ever meet: the second shard has its name, the manifest does not name it."""
    names = many_images(tmp_path / "images.tar", 350)
    program = (
        "import os; from clipship.core.cli.main import main; from clipship.serving.jobs import shards\n"
        "whole = shards.sha256_of\n"
        "shards.sha256_of = lambda path: os.kill(os.getpid(), 9) if '000001' in path.name else whole(path)\n"
        f"main(['classify', {str(tmp_path / 'images.tar')!r}, '--bundle', {str(bundle.path)!r},\n"
        f"      '--out', {str(tmp_path / 'out')!r}, '--shard-size', '100'])"
    )
    killed = subprocess.run([CLIPSHIP[0], "-c", program], env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "part-000001.parquet").exists()
    assert assert_whole(tmp_path / "out", names) == 100
    finish(start(tmp_path / "images.tar", tmp_path / "out", "--bundle", bundle.path))
    assert_complete(tmp_path / "out", names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_says_how_to_go_on(tmp_path: Path, bundle: Bundle, number: signal.Signals) -> None:
    names = many_images(tmp_path / "images.tar", 450)
    out = tmp_path / "out"
    program = (  # the third shard takes its time, so that the signal comes in mid-job on any machine
        "import sys, time; from clipship.core.cli.main import main; from clipship.serving.jobs import shards\n"
        "whole = shards.sha256_of\n"
        "shards.sha256_of = lambda path: '000002' in path.name and time.sleep(600) or whole(path)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with start(tmp_path / "images.tar", out, "--bundle", bundle.path, python=("-c", program)) as job:
        while manifest_of(out)["images"] < 200:
            time.sleep(0.02)
        job.send_signal(number)
        said = finish(job, code=130)
    done = assert_whole(out, names)
    assert done >= 200
    assert f"{done} images are kept: give the same command again to resume" in said
    assert len([path for path in out.iterdir() if path.name.startswith(".")]) == 0
    finish(start(tmp_path / "images.tar", out, "--bundle", bundle.path))
    assert_complete(out, names)


def kill_triton(server: Server) -> None:
    """SIGKILL to Triton itself, the guard's child, if it lives; the guard then clears up behind it."""
    if not server.running:
        return
    for child in children_of(server._process.pid):
        os.kill(child, signal.SIGKILL)
    server.wait()


class Revived:
    """A Triton on one port that is killed, and started again each time."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._server = start_server(repository)
        self.endpoints = self._server.endpoints

    def kill(self) -> None:
        kill_triton(self._server)

    def kill_and_start(self) -> None:
        self.kill()
        self._server.stop()
        self._server = start_server(self._repository, grpc_port=self.endpoints.grpc_port)

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def revived(repository: Path) -> Iterator[Revived]:
    server = Revived(repository)
    try:
        yield server
    finally:
        server.stop()


def kill_the_server(rounds: int, images: Path, names: list[str], out: Path, repository: Path) -> None:
    """Kill Triton ``rounds`` times in mid-job; the client is not started again but when it has come to its end."""
    chance = random.Random(SEED)
    with revived(repository) as server:
        where = ("--url", server.endpoints.url, "--window", "2")
        job = start(images, out, *where)
        for _ in range(rounds):
            before = manifest_of(out)["images"]
            while job.poll() is None and manifest_of(out)["images"] == before:  # it is at work
                time.sleep(0.05)
            if job.poll() is not None:
                finish(job)
                assert_complete(out, names)
                job = start(images, out, *where, "--restart")
            time.sleep(chance.uniform(0.0, 1.0))
            server.kill_and_start()
            assert_whole(out, names)
        finish(job)
    assert_complete(out, names)


@pytest.mark.triton
def test_the_server_is_killed(tmp_path: Path, repository: Path) -> None:
    names = many_images(tmp_path / "images.tar", 1500)
    kill_the_server(1, tmp_path / "images.tar", names, tmp_path / "out", repository)


@pytest.mark.triton
@pytest.mark.chaos
def test_the_server_is_killed_at_20_moments(tmp_path: Path, repository: Path) -> None:
    names = many_images(tmp_path / "images.tar", 20_000)
    kill_the_server(20, tmp_path / "images.tar", names, tmp_path / "out", repository)


@pytest.mark.triton
def test_a_server_that_does_not_come_back(tmp_path: Path, repository: Path) -> None:
    names = many_images(tmp_path / "images.tar", 2000)
    out = tmp_path / "out"
    with revived(repository) as server:
        where = ("--url", server.endpoints.url)
        one_by_one = ("--window", "1", "--batch-size", "1")  # slow enough to be met in mid-job on any machine
        job = start(tmp_path / "images.tar", out, *where, "--retry-s", "4", *one_by_one)
        while manifest_of(out)["images"] == 0 and job.poll() is None:
            time.sleep(0.02)
        server.kill()
        said = finish(job, code=1)
        done = assert_whole(out, names)
        assert 0 < done < len(names)
        assert said.startswith("clipship: ")
        assert said.endswith(f"{done} images are kept in {out}: give the same command again to resume\n")
        assert said.count("\n") == 1
        server.kill_and_start()
        finish(start(tmp_path / "images.tar", out, *where))
    assert_complete(out, names)


def png_bytes(width: int, height: int) -> bytes:
    """A PNG of one colour, or no more than its header where it would be huge."""
    if width * height > 10_000:
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def malformed(number: int) -> tuple[bytes, bool | None]:
    """A broken image, and whether it is sure to be an error (None: some of its kind can be read all the same)."""
    whole = bytearray(jpeg_bytes(number % 7, width=64, height=48))
    chance = np.random.default_rng(number)
    kind = number % 7
    if kind == 0:
        return bytes(whole[: int(chance.integers(1, len(whole) // 2))]), True
    if kind == 1:
        for place in chance.integers(2, len(whole), size=20):
            whole[place] ^= 1 << int(chance.integers(8))
        return bytes(whole), None
    if kind == 2:
        return png_bytes(60_000, 60_000), True
    if kind == 3:
        return png_bytes(9, 9), False  # called .jpg
    if kind == 4:
        return b"<!DOCTYPE html><html><title>404</title></html>", True
    if kind == 5:
        return b"", True
    return chance.bytes(int(chance.integers(1, 3000))), True


def rss_bytes(pid: int) -> int:
    """Memory that a process holds now; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def memory_of(job: subprocess.Popen[bytes], out: Path) -> list[tuple[int, int]]:
    """(images done, bytes held), sampled until the job ends."""
    samples: list[tuple[int, int]] = []
    said = threading.Thread(target=job.communicate)
    said.start()
    while job.poll() is None:
        if held := rss_bytes(job.pid):
            samples.append((int(manifest_of(out)["images"]), held))
        time.sleep(0.1)
    said.join()
    return samples


def classify_malformed(good: int, bad: int, folder: Path, *where: str | Path) -> list[tuple[int, int]]:
    """``good`` images and ``bad`` ones mixed: every one has its row, and the good ones are classified. The memory."""
    broken = [malformed(number) for number in range(bad)]
    order = random.Random(SEED).sample(range(good + bad), good + bad)
    picture = jpeg_bytes(3)
    members = [broken[number][0] if number < bad else picture for number in order]
    names = [f"{folder}/images.tar/{place:06d}.jpg" for place in range(good + bad)]
    write_tar(
        folder / "images.tar", ((name.rpartition("/")[2], data) for name, data in zip(names, members, strict=True))
    )
    job = start(folder / "images.tar", folder / "out", *where, "--shard-size", "1000")
    samples = memory_of(job, folder / "out")
    assert job.returncode == 1
    assert_complete(folder / "out", names)
    errors = errors_of(folder / "out")
    for place, number in enumerate(order):
        expected = broken[number][1] if number < bad else False
        assert expected is None or (names[place] in errors) is expected, (names[place], number)
    assert manifest_of(folder / "out")["errors"] == len(errors)
    return samples


def errors_of(folder: Path) -> set[str]:
    import pyarrow.parquet as pq

    found: set[str] = set()
    for shard in manifest_of(folder)["shards"]:
        rows = pq.read_table(folder / shard["file"], columns=["path", "error"]).to_pylist()
        found |= {row["path"] for row in rows if row["error"] is not None}
    return found


def test_malformed_images(tmp_path: Path, bundle: Bundle) -> None:
    classify_malformed(400, 140, tmp_path, "--bundle", bundle.path)


@pytest.mark.triton
def test_malformed_images_that_the_server_decodes(tmp_path: Path, server: Server) -> None:
    classify_malformed(400, 140, tmp_path, "--url", server.endpoints.url, "--decode", "server")
    assert server.running


@pytest.mark.chaos
def test_5000_malformed_images_among_20000(tmp_path: Path, bundle: Bundle) -> None:
    refuse_growth(classify_malformed(20_000, 5000, tmp_path, "--bundle", bundle.path))


@pytest.mark.triton
@pytest.mark.chaos
def test_5000_malformed_images_among_20000_that_the_server_decodes(tmp_path: Path, server: Server) -> None:
    refuse_growth(classify_malformed(20_000, 5000, tmp_path, "--url", server.endpoints.url, "--decode", "server"))
    assert server.running


def refuse_growth(samples: list[tuple[int, int]]) -> None:
    """Memory under 1 GiB, and no more than a tenth more after 5,000 images than before."""
    print(f"growth {growth(samples, 5000):.2%}, at most {max(held for _, held in samples) / 2**20:.0f} MiB")
    assert growth(samples, 5000) < 0.1
    assert max(held for _, held in samples) < 2**30


def growth(samples: list[tuple[int, int]], after: int) -> float:
    """By how much the memory grows after ``after`` images, against the most until a little later."""
    first = max(held for done, held in samples if done <= after)
    return max(held for _, held in samples) / first - 1


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_the_memory_of_100000_images_is_flat(tmp_path: Path, bundle: Bundle) -> None:
    names = many_images(tmp_path / "images.tar", 100_000)
    job = start(tmp_path / "images.tar", tmp_path / "out", "--bundle", bundle.path, "--shard-size", "5000")
    samples = memory_of(job, tmp_path / "out")
    assert job.returncode == 0
    assert_complete(tmp_path / "out", names)
    print(f"growth {growth(samples, 10_000):.2%}, at most {max(held for _, held in samples) / 2**20:.0f} MiB")
    assert growth(samples, 10_000) < 0.05
    assert max(held for _, held in samples) < 2**30
