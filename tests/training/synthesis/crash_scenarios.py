"""Run by the tests in a process of its own: work that is killed at its n-th change of a folder, and goes on.

Every life is a forked child that sends itself SIGKILL when Python is about to create, rename, cut or delete the n-th
file or folder below the one it works in.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clipship.training.synthesis.workspace import CandidateRecord, Workspace

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def row(place: int, reason: str | None = None) -> CandidateRecord:
    return CandidateRecord(
        place=place,
        attempt=0,
        class_name="é",
        seed=place,
        prompt=f"p{place}",
        source=None,
        path=f"images/c/{place}.webp",
        batch=place // 2 * 2,
        reason=reason,
    )


def add(workspace: Workspace, *places: int) -> None:
    workspace.add([row(one) for one in places], {f"images/c/{one}.webp": bytes([one]) for one in places})


def life(work: Callable[[], object], folder: Path, last: int | None, environment: dict[str, str] | None = None) -> int:
    """Start ``work`` in a child that dies at change ``last`` (None: of old age); returns its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment or {})
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and str(arguments[0]).startswith(str(folder)) and (event != "open" or _writes(arguments)):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        work()
    except BaseException:  # noqa: BLE001 - shown, and the child must never come back into the test's code
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def ended(child: int) -> bool:
    """Whether the child came to its end by itself."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise SystemExit("a life ended with an error")
    return not os.WIFSIGNALED(status)


def batches(root: Path) -> list[list[int]]:
    """Two batches, killed at each change in turn, then finished: the places that were there after the kill."""

    def work(folder: Path) -> None:
        workspace = Workspace(folder=folder)
        for places in ((0, 1), (2, 3)):
            if (places[0], 0) not in workspace.records():
                add(workspace, *places)

    outcomes: list[list[int]] = []
    finished = False
    while not finished:
        folder = root / str(len(outcomes))
        folder.mkdir()
        finished = ended(life(partial(work, folder), folder, len(outcomes) + 1))
        outcomes.append(sorted(place for place, _ in Workspace(folder=folder).records()))
        work(folder)
    return outcomes


def sets(root: Path) -> dict[str, Any]:
    """The set of ``root/settings.json``: in one life, in many, and by two processes."""
    import torch

    from clipship.training.synthesis.candidate_filter import Scorer
    from clipship.training.synthesis.class_prompts import class_prompts_of, vocabulary_of
    from clipship.training.synthesis.config import SynthesisConfig
    from clipship.training.synthesis.image_generator import ImageGenerator
    from clipship.training.synthesis.pipelines import pipeline_folder
    from clipship.training.synthesis.run import synthesize

    torch.set_num_threads(1)
    settings = json.loads((root / "settings.json").read_text())
    config = SynthesisConfig.from_json(settings["config"])
    class_prompts = class_prompts_of(config, vocabulary_of(Path(settings["classes"])))

    ImageGenerator(pipeline_folder(config), config, torch.device("cpu"))  # what is imported here, no life imports again
    Scorer(config.scorer, class_prompts)

    def make(name: str) -> None:
        def once(self: ImageGenerator, batch: Any) -> Any:
            assert not Workspace(folder=root / name).records().keys() & {one.key for one in batch}, "made twice"
            return plain(self, batch)

        plain, ImageGenerator.make = ImageGenerator.make, once  # type: ignore[method-assign]
        synthesize(config, class_prompts, out=root / name, device="cpu")

    def work(name: str, last: int | None, environment: dict[str, str] | None = None) -> int:
        return life(partial(make, name), root / name, last, environment)

    ended(work("whole", None))
    lives = 1
    while not ended(work("killed", settings["lasts"][(lives - 1) % len(settings["lasts"])])):
        lives += 1
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": settings["port"]}
    ranks = [work("shared", None, {**launched, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    return {"lives": lives, "ranks": [ended(rank) for rank in ranks]}


if __name__ == "__main__":
    root = Path(sys.argv[2])
    sys.stdout.write(json.dumps(batches(root) if sys.argv[1] == "batches" else sets(root)))
