"""The whole line on the built-in world: synthesize, train, export, serve, classify, and one table at the end.

    python examples/demo.py --out runs/demo

Every step is a ``clipship`` command and is shown as typed. Results of an earlier run are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clipship.core.bundle import Bundle, read_bundle
from clipship.core.cli.main import main as clipship
from clipship.core.errors import BundleError, CheckFailed

DATASET = "prints"
RECIPES = ("zero-shot-tiny", "coop-tiny", "sync-clip-tiny")
SERVED = "sync-clip-tiny"
CANDIDATES, KEPT = 16, 8
"""Synthetic images to make of each class, and to keep by CLIP score."""
LEAST_AGREEMENT = 0.999
ROUNDS = 5

console = Console(width=110, highlight=False)


@dataclass(frozen=True)
class Places:
    """The path of every artefact."""

    root: Path

    @property
    def data(self) -> Path:
        """The data set."""
        return self.root / "world" / DATASET

    @property
    def synthetic(self) -> Path:
        """The synthetic images, where training looks for them."""
        return self.data / "synthetic"

    @property
    def bundle(self) -> Path:
        """The packed model."""
        return self.root / "bundle"

    @property
    def repository(self) -> Path:
        """The Triton model repository."""
        return self.root / "repository"

    @property
    def results(self) -> Path:
        """The server's results for every test image."""
        return self.root / "results.parquet"

    def checkpoint(self, recipe: str) -> Path:
        """The checkpoint of ``recipe``."""
        return self.root / "checkpoints" / recipe


def run(*arguments: str | Path, quiet: bool = False) -> str:
    """Show and run one clipship command in this process; returns what it prints.

    Raises:
        SystemExit: the command failed; its one-line error is on stderr already.
    """
    words = [str(argument) for argument in arguments]
    console.print(f"[bold]$ clipship {shlex.join(words)}[/bold]", markup=True, soft_wrap=True)
    with redirect_stdout(StringIO()) as printed:
        code = clipship(words)
    text = printed.getvalue().rstrip()
    if text and not quiet:
        console.print(text, markup=False, soft_wrap=True)
    if code != 0:
        raise SystemExit(code)
    return text


def synthesized(places: Places) -> str:
    """Make images of all classes with the built-in pipeline, unless an earlier run did; returns a summary line."""
    is_new = not places.synthetic.exists()
    started_s = time.monotonic()
    numbers = ("--candidates", str(CANDIDATES), "--keep", str(KEPT))
    where = ("--classes", places.data, "--out", places.synthetic)
    made = json.loads(run("synthesize", "tiny", *where, *numbers, "--json", quiet=True))
    rate = made["candidates"] / (time.monotonic() - started_s)
    line = f"{made['candidates']} made of {made['classes']} class names by text-to-image, {made['kept']} kept"
    return f"{line}; {rate:.1f} images/s" if is_new else f"{line}; by an earlier run"


def scores_of(places: Places, recipe: str) -> dict[str, Any]:
    """Train and evaluate ``recipe``, unless an earlier run did."""
    checkpoint = places.checkpoint(recipe)
    run("train", recipe, "--data", places.data, "--out", checkpoint, "--resume")
    stored = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))["scores"]
    if DATASET not in stored:
        stored = json.loads(run("evaluate", checkpoint, "--data", places.data, "--json", quiet=True))
    scores: dict[str, Any] = stored[DATASET]
    return scores


def packed(places: Places) -> Bundle:
    """Pack the served checkpoint, unless an earlier run did."""
    checkpoint = places.checkpoint(SERVED)
    learned = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))["learned_sha256"]
    try:
        bundle = read_bundle(places.bundle)
        stale = bundle.manifest.provenance.get("learned_sha256") != learned
    except BundleError:
        stale = True
    if stale:
        run("pack", checkpoint, "--images", places.data / "images", "--out", places.bundle)
        run("repository", places.bundle, "--backend", "python", "--out", places.repository)
    return read_bundle(places.bundle)


@contextmanager
def serving(repository: Path) -> Iterator[str]:
    """Run a real Triton in another process; yields its gRPC address."""
    command = ["serve", str(repository), "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--json"]
    console.print(f"[bold]$ clipship {shlex.join(command)} &[/bold]", soft_wrap=True)
    server = subprocess.Popen([sys.executable, "-m", "clipship", *command], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line:
            raise SystemExit(server.wait() or 1)
        yield f"127.0.0.1:{json.loads(line)['grpc_port']}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def test_paths(places: Places) -> list[Path]:
    """The data set's test images, as its split file lists them."""
    (split,) = places.data.glob("split_zhou_*.json")
    listed = json.loads(split.read_text(encoding="utf-8"))["test"]
    return [places.data / "images" / path for path, _, _ in listed]


def served_labels(places: Places, url: str, paths: list[Path]) -> list[str]:
    """The best class of every test image by the server."""
    import pyarrow.parquet as pq

    run("classify", places.data / "images" / "*" / "test_*.jpg", "--url", url, "--out", places.results)
    table = pq.read_table(places.results, columns=["path", "label"])
    labels = dict(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    return [labels[str(path)] for path in paths]


def pytorch_labels(places: Places, bundle: Bundle, paths: list[Path]) -> list[str]:
    """The best class of every test image by PyTorch running the checkpoint."""
    from clipship.export.reference import Picture, image_features, pixels_of
    from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint

    method = method_from_checkpoint(load_checkpoint(places.checkpoint(SERVED)))
    pictures = [Picture(name=path.name, data=path.read_bytes()) for path in paths]
    embedding = image_features(method, pixels_of(pictures, bundle.image_spec))
    classes = method.class_features(bundle.vocabulary.names).detach().numpy()
    return [bundle.vocabulary.names[best] for best in (embedding @ classes.T).argmax(axis=1)]


def paired_rates(bundle: Bundle, url: str, paths: list[Path]) -> tuple[list[float], list[float]]:
    """Images per second from JPEG files to labels, in process and through the server, in turn: one pair a round."""
    from clipship.serving.client.classifier import Classifier
    from clipship.serving.client.in_process import LocalTransport

    def rate(classifier: Classifier) -> float:
        started_s = time.perf_counter()
        classifier.classify(paths)
        return len(paths) / (time.perf_counter() - started_s)

    with Classifier(LocalTransport(bundle)) as local, Classifier(url) as served:
        for classifier in (local, served):
            classifier.classify(paths[:64])  # not counted: first use is slower
        rounds = [(rate(local), rate(served)) for _ in range(ROUNDS)]
    return [one for one, _ in rounds], [other for _, other in rounds]


def spread(values: list[float], digits: int = 0) -> str:
    """The median, and the least and greatest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def accuracy_table(scores: dict[str, dict[str, Any]]) -> Table:
    """Zero-shot, CoOp and SYNC-CLIP side by side."""
    title = f"top-1 % on {DATASET}, 16 real images a base class, none of a new class"
    table = Table("", "base", "new", "harmonic mean", "open-vocabulary base", "new", "harmonic mean", title=title)
    keys = ("base", "new", "harmonic_mean", "open_base", "open_new", "open_harmonic_mean")
    for recipe, values in scores.items():
        table.add_row(re.sub("-tiny$", "", recipe), *(f"{values[key]:.1f}" for key in keys))
    return table


def summary_table(rows: dict[str, str]) -> Table:
    """Names and values."""
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def main() -> None:
    """Run the line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    places = Places(Path(os.path.relpath(parser.parse_args().out)))
    started_s = time.monotonic()
    run("world", "--only", DATASET, "--out", places.root / "world", "--no-synthetic")
    synthetic = synthesized(places)
    scores = {recipe: scores_of(places, recipe) for recipe in RECIPES}
    bundle = packed(places)
    paths = test_paths(places)
    with serving(places.repository) as url:
        labels = served_labels(places, url, paths)
        local, served = paired_rates(bundle, url, paths)
    agreement = float(np.mean([a == b for a, b in zip(labels, pytorch_labels(places, bundle, paths), strict=True)]))
    console.print(accuracy_table(scores))
    rows = {
        "synthetic images": synthetic,
        "served top-1 equal to PyTorch's": f"{100 * agreement:.2f} % of {len(paths)} test images",
        "in process": f"{spread(local)} images/s from JPEG files to labels, median of {ROUNDS}",
        "through Triton over gRPC": f"{spread(served)} images/s",
        "ratio of the two": spread([one / other for one, other in zip(served, local, strict=True)], 2),
        "data, checkpoints": f"{places.data}, {places.root / 'checkpoints'}",
        "bundle, repository, results": f"{places.bundle}, {places.repository}, {places.results}",
        "time": f"{time.monotonic() - started_s:.0f} s",
    }
    console.print(summary_table(rows))
    if agreement < LEAST_AGREEMENT:
        raise CheckFailed(
            f"the server agrees with PyTorch on {agreement:.4f} of the images, less than {LEAST_AGREEMENT}"
        )


if __name__ == "__main__":
    main()
