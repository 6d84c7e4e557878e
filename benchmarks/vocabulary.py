"""Adding classes to a bundle without PyTorch, beside open_clip's eager text tower on the same names in the same run.

    python benchmarks/vocabulary.py --out runs/vocabulary

A bundle of ViT-B/16 with random weights (they do not change the time) is packed with 10 classes; `clipship vocab add`
builds it up to 1,000, then adds 100 more to it, several times to a copy. A process is timed from its start to its end:
Python, the check of all the bundle's files, tokens, features, the new bundle. open_clip encodes the same 100 names, in
turn with it, in a process that has loaded everything. open_clip computes all 77 tokens of a row, the bundle's text
encoder no more than the longest name of a batch has.

    python benchmarks/vocabulary.py --model clipship-tiny --many 100000 --out runs/vocabulary-many

adds that many names to the 10 and nothing else, with the process killed (SIGKILL) after a while and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import read_bundle
from clipship.core.progress import log
from clipship.core.tables import Table, with_spread, write_table
from clipship.core.vocabulary import Vocabulary, prompt_of
from clipship.training.model.builtin import TINY
from clipship.training.model.clip import Clip, load_clip
from clipship.world.drawing.attributes import COLOURS

CLASSES, ADDED, PACKED = 1000, 100, 10
BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def class_names() -> tuple[str, ...]:
    """1,100 names: ImageNet's, then the first of them in red."""
    from open_clip import IMAGENET_CLASSNAMES

    distinct = list(dict.fromkeys(IMAGENET_CLASSNAMES))
    return tuple([*distinct, *(f"red {name}" for name in distinct)][: CLASSES + ADDED])


def packed_bundle(clip: Clip, names: Sequence[str], path: Path) -> None:
    """A zero-shot bundle, verified as every other."""
    from clipship.export.image_input import pictures_for
    from clipship.export.pack import bundle_from_method
    from clipship.training.methods import Task, build_method
    from clipship.training.recipes import config_from_recipe

    task = Task(class_names=tuple(names), num_base=len(names), templates=("a photo of a {}.",))
    method = build_method(clip, config_from_recipe("zero-shot"), task).eval()
    bundle_from_method(method, Vocabulary(names=tuple(names)), pictures_for(None)[:8], path, provenance={})


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def add(bundle: Path, names: Sequence[str], out: Path) -> float:
    """Seconds of one `clipship vocab add`, the process and all; the new bundle is ``out``."""
    file = out.with_suffix(".txt")
    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    command = [sys.executable, "-m", "clipship", "vocab", "add", str(bundle), "--from", str(file), "--json"]
    return seconds_of(lambda: subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL))


def many_names(count: int) -> list[str]:
    """Distinct names of two to a dozen tokens: ImageNet's with numbers."""
    distinct = class_names()[:CLASSES]
    return [f"{distinct[place % CLASSES]} {place // CLASSES}" for place in range(count)]


def add_many(bundle: Path, count: int, out: Path, kill_after_s: float) -> Table:
    """`clipship vocab add` of ``count`` names, killed after ``kill_after_s``, and the run that continues."""
    file = out.with_suffix(".txt")
    file.write_text("".join(f"{name}\n" for name in many_names(count)), encoding="utf-8")
    command = [sys.executable, "-m", "clipship", "vocab", "add", str(bundle), "--from", str(file)]
    command += ["--out", str(out)]
    with subprocess.Popen(command) as first:
        try:
            first.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            first.kill()
    killed = first.returncode != 0
    started = time.perf_counter()
    with subprocess.Popen(command) as second:
        _, status, usage = os.wait4(second.pid, 0)
        second.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    classes = len(read_bundle(out).vocabulary.names)
    assert classes == PACKED + count
    return Table(
        header=("names", "killed after s", "then s", "classes", "peak memory MiB"),
        rows=(
            (
                f"{count:,}",
                f"{kill_after_s:.0f}" if killed else "-",
                f"{seconds:.1f}",
                f"{classes:,}",
                f"{usage.ru_maxrss / 1024:.0f}",
            ),
        ),
        text_columns=0,
    )


def eager_features(clip: Clip, prompts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
    """open_clip's own tokenizer and text tower, float32."""
    import torch

    with torch.inference_mode():
        parts = [
            clip.model.encode_text(clip.tokenizer(list(prompts[start : start + batch_size])), normalize=True)
            for start in range(0, len(prompts), batch_size)
        ]
    features: NDArray[np.float32] = torch.cat(parts).numpy()
    return features


def batch_rates(clip: Clip, bundle: Path, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Names a second by batch size: the bundle's text encoder and open_clip's, in turn, loaded before."""
    from clipship.export.vocab.encode import WordEncoder

    opened = read_bundle(bundle)
    prompts = [prompt_of(name, opened.vocabulary.templates[0]) for name in names]
    rows = []
    for batch_size in BATCH_SIZES:
        encoder = WordEncoder(bundle=opened, batch_size=batch_size)
        ways: dict[str, Callable[[], Any]] = {
            "bundle": lambda encoder=encoder: encoder.features(names),  # type: ignore[misc]
            "eager": lambda size=batch_size: eager_features(clip, prompts, size),  # type: ignore[misc]
        }
        for way in ways.values():
            way()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(len(names) / seconds_of(way))
        rows.append({"batch_size": batch_size, **rates})
        log(json.dumps(rows[-1]))
    return rows


def tables(measured: dict[str, Any]) -> tuple[Table, Table]:
    """What was measured, for people."""
    adding, eager, build = measured["add_s"], measured["eager_s"], measured["build_s"]
    ratios = [theirs / ours for theirs, ours in zip(eager, adding, strict=True)]
    first = Table(
        header=("step", "seconds", "names/s", "against open_clip eager"),
        rows=(
            (f"build {CLASSES} from {PACKED}", f"{build:.1f}", f"{(CLASSES - PACKED) / build:.1f}", ""),
            (
                f"add {ADDED} to {CLASSES}, whole process",
                with_spread(adding, ".1f"),
                f"{ADDED / statistics.median(adding):.1f}",
                with_spread(ratios),
            ),
            (
                f"open_clip eager, {ADDED} names",
                with_spread(eager, ".1f"),
                f"{ADDED / statistics.median(eager):.1f}",
                "1",
            ),
        ),
        text_columns=1,
        notes=(f"largest difference of a feature from open_clip's: {measured['max_abs']:.1e}",),
    )
    rows = tuple(
        (
            str(row["batch_size"]),
            with_spread(row["bundle"], ".1f"),
            with_spread(row["eager"], ".1f"),
            with_spread([ours / theirs for ours, theirs in zip(row["bundle"], row["eager"], strict=True)]),
        )
        for row in measured["batches"]
    )
    header = ("batch size", "text_encoder.onnx, names/s", "open_clip eager, names/s", "ratio")
    return first, Table(header=header, rows=rows, text_columns=0)


def packed(given: argparse.Namespace) -> Path:
    """The bundle of 10 classes, packed by an earlier run or now."""
    start: Path = given.out / "packed"
    if not start.exists():
        names = tuple(COLOURS)[:PACKED] if given.model == TINY else class_names()[:PACKED]
        packed_bundle(load_clip(given.model), names, start)
    return start


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All numbers of both tables."""
    names = class_names()
    start, base, out = packed(given), given.out / "base", given.out / "more"
    clip = load_clip(given.model)
    measured: dict[str, Any] = {"model": given.model, "add_s": [], "eager_s": []}
    measured["build_s"] = add(start, names[PACKED:CLASSES], base)
    prompts = [prompt_of(name, "a photo of a {}.") for name in names[CLASSES:]]
    expected = eager_features(clip, prompts, given.batch_size)
    for _ in range(given.rounds):
        measured["add_s"].append(add(base, names[CLASSES:], out))
        measured["eager_s"].append(seconds_of(lambda: eager_features(clip, prompts, given.batch_size)))
        log(json.dumps(measured))
    features = read_bundle(out).vocabulary_features().features
    measured["max_abs"] = float(np.abs(features[CLASSES:] - expected).max())
    measured["batches"] = batch_rates(clip, start, names[: given.batch_names], given.rounds)
    return measured


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vocabulary"))
    parser.add_argument("--model", default="ViT-B-16/random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="of open_clip in the first table")
    parser.add_argument("--batch-names", type=int, default=64, help="names of the second table")
    parser.add_argument("--many", type=int, metavar="N", help="only add N names, killed in between")
    parser.add_argument("--kill-after-s", type=float, default=15.0, help="with --many")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for left in ("base", "more", "many"):
        shutil.rmtree(given.out / left, ignore_errors=True)
    if given.many is not None:
        table = add_many(packed(given), given.many, given.out / "many", given.kill_after_s)
        write_table(given.out, "vocabulary-many", [{"model": given.model, "names": given.many}], table)
        sys.stdout.write(table.to_markdown() + "\n")
        return
    measured = measure(given)
    for name, table in zip(("vocabulary", "vocabulary-batches"), tables(measured), strict=True):
        write_table(given.out, name, [measured], table)
        sys.stdout.write(table.to_markdown() + "\n")


if __name__ == "__main__":
    main()
