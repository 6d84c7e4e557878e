"""Image encoders side by side on this machine's processors: what a bundle holds against what people use today.

    python benchmarks/encoder.py --out runs/encoder

Every path is a process of its own; they take turns, so that noise meets all alike. A ratio is that of one round to
open_clip's own model (float32, ``no_grad``) in the same round; the table has their median and range. Weights are
random (they do not change the time) and pixels are real images where a folder is given. "Differs" is against that
model on the same pixels: the largest difference of any value of the unit features, and the smallest cosine after the
mean over the images is taken off, which is what tells images apart.

The limit of a call is the time of its products at the speed that PyTorch's kernels (oneDNN) multiply matrices of the
model's own shapes at in that precision, and the time to read all weights once from memory; both speeds are measured in
the same run. "Of the limit" is the share of it that a path reaches, at the smallest and at the largest batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.machine.runtimes import available_cores, open_encoder
from clipship.core.precisions import PRECISIONS
from clipship.core.tables import Table, machine, with_spread, write_table

MODELS = ("ViT-B-32/random", "ViT-B-16/random")
BATCHES = (1, 8, 32)
EAGER = "open_clip fp32"
PEERS = {
    EAGER: "fp32",
    "open_clip fp32, torch.compile + freezing": "fp32",
    "ONNX Runtime, plain export": "fp32",
    "OpenVINO, plain export": "fp32",
    "open_clip bf16 autocast": "bf16",
    "open_clip.bfloat16()": "bf16",
    "open_clip.bfloat16(), torch.compile + freezing": "bf16",
    "OpenVINO bf16, plain export": "bf16",
}
"""What the bundle's variants are compared with, and the precision of each."""

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
_PLAIN = "plain.onnx"


def bundle_of(model: str, folder: Path, images: Path | None) -> Path:
    """A bundle of ``model`` without prompts, with a variant for every precision; made once."""
    from clipship.export.image_input import pictures_for
    from clipship.export.pack import bundle_from_method
    from clipship.export.precision.encoder_variants import Profile

    if not (folder / "manifest.json").is_file():
        method = method_of(model)
        pictures = pictures_for(images)
        profile = Profile(precisions=("bf16", "int8"))
        bundle_from_method(method, _vocabulary(), pictures, folder, provenance={}, profile=profile)
    return folder


def _vocabulary() -> Any:
    from clipship.core.vocabulary import Vocabulary

    return Vocabulary(names=("cat", "dog", "bird", "fish"))


@cache
def method_of(model: str) -> Any:
    """The plain CLIP ``model`` as a method, loaded once a process."""
    from dataclasses import replace

    from clipship.training.methods import Task, build_method
    from clipship.training.model.clip import load_clip
    from clipship.training.recipes import config_from_recipe

    config = replace(config_from_recipe("zero-shot"), base_model=model)
    task = Task(class_names=_vocabulary().names, num_base=4, templates=("a photo of a {}.",))
    return build_method(load_clip(model), config, task).eval()


def export_plain(model: str, path: Path) -> None:
    """open_clip's image tower as PyTorch's exporter writes it: float32 [N, 3, H, W] -> [N, D]."""
    import torch

    if path.is_file():
        return
    clip = method_of(model).clip
    sample = torch.zeros((2, 3, clip.image_spec.size_px, clip.image_spec.size_px))
    free = {0: torch.export.Dim("batch", min=1, max=2**20)}
    program = torch.onnx.export(clip.visual, (sample,), dynamo=True, opset_version=18, dynamic_shapes=(free,))
    assert program is not None
    program.save(path)


def peer(name: str, model: str, folder: Path) -> Run:
    """One of :data:`PEERS` as a function of uint8 pixels [N, H, W, 3]; normalisation is part of what is timed."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(available_cores())
    clip = method_of(model).clip
    if "export" in name:
        return _exported_peer(name, clip, folder)
    bf16 = ".bfloat16()" in name
    if "autocast" in name:  # casts of weights are kept from call to call only where weights could learn
        clip.model.requires_grad_(True)
    tower = clip.visual.bfloat16() if bf16 else clip.visual
    if "compile" in name:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        tower = torch.compile(tower, dynamic=False)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in name):
            inputs = clip.normalize(torch.from_numpy(pixels))
            features = tower(inputs.bfloat16() if bf16 else inputs).float()
            result: NDArray[np.float32] = functional.normalize(features, dim=-1).numpy()
        return result

    return run


def _exported_peer(name: str, clip: Any, folder: Path) -> Run:
    import torch

    runtime = "openvino" if "OpenVINO" in name else "onnxruntime"
    encode = open_encoder(str(folder / _PLAIN), runtime, PEERS[name]) if runtime == "onnxruntime" else None
    if encode is None:
        encode = _plain_openvino(folder / _PLAIN, "bf16" if "bf16" in name else "f32")

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = encode(clip.normalize(torch.from_numpy(pixels)).numpy())
        unit: NDArray[np.float32] = features / np.linalg.norm(features, axis=1, keepdims=True)
        return unit

    return run


def _plain_openvino(path: Path, precision: str) -> Run:
    """As OpenVINO's own example does it: one request on all cores."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": available_cores()}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda rows: request.infer([rows])[0].copy()


class Worker:
    """Run a path in its own process."""

    def __init__(self, name: str, what: dict[str, Any], log: IO[str]) -> None:
        self.name = name
        command = [sys.executable, __file__, "--work", json.dumps({"name": name, **what})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        )
        self.is_ready = self._answer() == "ready"

    def seconds(self, pixels: Path, save: Path | None = None) -> float:
        """One call on the array in the file ``pixels``; its features go to ``save``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"pixels": str(pixels), "save": save and str(save)}) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def work(what: dict[str, Any]) -> None:
    """The worker's side: a line ``{"pixels": FILE, "save": FILE or null}`` is answered with the seconds it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not get among the answers
    folder = Path(what["bundle"])
    if "variant" in what:
        variant = what["variant"]
        run = open_encoder(str(folder / variant["file"]), variant["runtime"], variant["precision"])
    else:
        run = peer(what["name"], what["model"], folder.parent)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pixels = np.load(asked["pixels"])
        started = time.perf_counter()
        features = run(pixels)
        seconds = time.perf_counter() - started
        if asked["save"]:
            np.save(asked["save"], features)
        print(seconds, file=answers, flush=True)


def limits(model: str) -> dict[str, float]:
    """Billion operations a second of matrix products of the model's shapes, by precision, the best of several."""
    import torch

    torch.set_num_threads(available_cores())
    clip = method_of(model).clip
    width, rows = clip.image_width, 8 * clip.visual.positional_embedding.shape[0]
    best = dict.fromkeys(("fp32", "bf16", "int8"), 0.0)
    for inputs, outputs in ((width, 3 * width), (width, 4 * width), (4 * width, width)):
        for precision in best:
            product = _product(precision, rows, inputs, outputs)
            times = [_timed(product) for _ in range(12)]
            best[precision] = max(best[precision], 2e-9 * rows * inputs * outputs / min(times))
    return best


def weights_gb(model: str, precision: str) -> float:
    """What one call reads of the image tower's weights, in units of 10^9 bytes."""
    count = sum(weight.numel() for weight in method_of(model).clip.visual.parameters())
    bytes_each = {"fp32": 4, "bf16": 2, "int8": 1}
    return 1e-9 * int(count) * bytes_each[precision]


def bandwidth() -> float:
    """10^9 bytes a second that all cores together read from memory, the best of several."""
    import torch

    torch.set_num_threads(available_cores())
    values = torch.ones(2**27)
    return 1e-9 * values.numel() * values.element_size() / min(_timed(values.sum) for _ in range(12))


def _product(precision: str, rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
    import torch

    if precision == "int8":
        left = torch.randint(-128, 127, (rows, inputs), dtype=torch.int8)
        right = torch.randint(-128, 127, (inputs, outputs), dtype=torch.int8)
        return lambda: torch._int_mm(left, right)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(rows, inputs, dtype=kind), torch.randn(outputs, inputs, dtype=kind)
    return lambda: torch.nn.functional.linear(x, weight)


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def operations(model: str) -> float:
    """Billion operations of one image in open_clip's tower; a multiplication and an addition are two."""
    clip = method_of(model).clip
    width, layers, tokens = clip.image_width, clip.image_layers, clip.visual.positional_embedding.shape[0]
    a_block = 24 * tokens * width**2 + 4 * tokens**2 * width
    patches = 2 * (tokens - 1) * clip.visual.conv1.weight[0].numel() * width
    total: float = 1e-9 * (layers * a_block + patches + 2 * width * clip.embed_dim)
    return total


def openvino_shares(bundle: Path, pixels: Path) -> list[str]:
    """For each of the bundle's variants on OpenVINO, what shares of its time its operations take."""
    import openvino

    variants = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["image_encoders"]
    lines = []
    for variant in (variant for variant in variants if variant["runtime"] == "openvino"):
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[variant["precision"]].openvino_type,
            "INFERENCE_NUM_THREADS": 1,
            "PERF_COUNT": True,
        }
        request = openvino.Core().compile_model(str(bundle / variant["file"]), "CPU", settings).create_infer_request()
        for _ in range(5):
            request.infer([np.load(pixels)])
        taken: Counter[str] = Counter()
        for node in request.profiling_info:
            taken[node.node_type] += node.real_time.total_seconds()
        parts = ", ".join(f"{kind} {took / taken.total():.0%}" for kind, took in taken.most_common(4))
        lines.append(f"clipship {variant['precision']}, OpenVINO, one thread: {parts}.")
    return lines


def differences(given: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, float]:
    """The largest difference, and the smallest cosine of the features without their mean."""
    a, b = (features - expected.mean(axis=0) for features in (given, expected))
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(np.abs(given - expected).max()), float(cosines.min())


def race(
    model: str, folder: Path, images: Path | None, rounds: int, batches: list[int], without: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every path's seconds a call by batch size, ``rounds`` of each in turn, and how it differs."""
    bundle = bundle_of(model, folder / "bundle", images)
    export_plain(model, folder / _PLAIN)
    variants = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["image_encoders"]
    paths: dict[str, dict[str, Any]] = {name: {"precision": precision} for name, precision in PEERS.items()}
    for variant in variants:
        runtime = "OpenVINO" if variant["runtime"] == "openvino" else "ONNX Runtime"
        paths[f"clipship {variant['precision']}, {runtime}"] = {"precision": variant["precision"], "variant": variant}
    paths = {name: what for name, what in paths.items() if not any(word in name for word in without)}
    files = _pixel_files(model, folder, images, batches)
    rows = []
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        started = {n: Worker(n, {"model": model, "bundle": str(bundle), **what}, log) for n, what in paths.items()}
        workers = [worker for worker in started.values() if worker.is_ready]
        expected = _features(started[EAGER], files[0], folder)
        for worker in workers:
            max_abs, cosine = differences(_features(worker, files[0], folder), expected)
            what = {"precision": paths[worker.name]["precision"], "max_abs": max_abs, "centred_cosine": cosine}
            rows.append({"model": model, "path": worker.name, **what, "seconds": {}})
        for batch in batches:
            _in_turn(workers, files[batch], rounds, batch, rows)
        for worker in started.values():
            worker.close()
    return rows


def _in_turn(workers: list[Worker], pixels: Path, rounds: int, batch: int, rows: list[dict[str, Any]]) -> None:
    for worker in workers:
        worker.seconds(pixels)  # compiles, allocates
    for _ in range(rounds):
        for worker, row in zip(workers, rows, strict=True):
            best = min(worker.seconds(pixels) for _ in range(max(1, 4 // batch)))
            row["seconds"].setdefault(str(batch), []).append(best)
    sys.stderr.write(f"batch {batch} done\n")


def _pixel_files(model: str, folder: Path, images: Path | None, batches: list[int]) -> dict[int, Path]:
    """By batch size an array on disk; under 0 the images that features are compared on."""
    from clipship.export.image_input import pictures_for
    from clipship.export.reference import pixels_of

    spec = method_of(model).clip.image_spec
    pixels = pixels_of(pictures_for(images)[: max(32, *batches)], spec)
    files = {}
    for size in (0, *batches):
        files[size] = folder / f"pixels{size}.npy"
        np.save(files[size], np.resize(pixels, (size or len(pixels), *pixels.shape[1:])))
    return files


def _features(worker: Worker, pixels: Path, folder: Path) -> NDArray[np.float32]:
    worker.seconds(pixels, folder / "features.npy")
    features: NDArray[np.float32] = np.load(folder / "features.npy")
    return features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """What this machine can do."""

    gops: dict[str, float]
    """By precision, billion operations a second."""
    gb_s: float
    gop: float
    """Of one image, billion operations."""
    weights_gb: dict[str, float]
    """By precision."""

    def seconds(self, precision: str, batch: int) -> float:
        """The least time of a call."""
        return batch * self.gop / self.gops[precision] + self.weights_gb[precision] / self.gb_s

    def __str__(self) -> str:
        each = ", ".join(
            f"{name} {speed:,.0f} billion operations and {1e3 * self.weights_gb[name]:,.0f} MB of weights"
            for name, speed in self.gops.items()
        )
        return f"Limit: {each}; memory {self.gb_s:.0f} GB/s; an image needs {self.gop:.1f} billion operations."


def limit_of(model: str) -> Limit:
    """Measured now."""
    gops = limits(model)
    weights = {precision: weights_gb(model, precision) for precision in gops}
    return Limit(gops=gops, gb_s=bandwidth(), gop=operations(model), weights_gb=weights)


def table(rows: list[dict[str, Any]], model: str, limit: Limit) -> Table:
    """A row a path; images a second of the eager model in its header."""
    eager = next(row["seconds"] for row in rows if row["path"] == EAGER)
    ends = (min(eager, key=int), max(eager, key=int))
    cells = []
    for row in rows:
        ratios = {
            batch: [a / b for a, b in zip(eager[batch], took, strict=True)] for batch, took in row["seconds"].items()
        }
        shares = [
            limit.seconds(row["precision"], int(batch)) / statistics.median(row["seconds"][batch]) for batch in ends
        ]
        reached = " / ".join(f"{share:.0%}" for share in dict.fromkeys(shares))
        differs = (f"{row['max_abs']:.0e}", f"{row['centred_cosine']:.5f}")
        cells.append((row["path"], *(with_spread(each) for each in ratios.values()), reached, *differs))
    rates = [f"batch {batch} ({int(batch) / statistics.median(took):.1f}/s = 1)" for batch, took in eager.items()]
    header = ("path", *rates, "of the limit", "differs by", "centred cosine")
    return Table(
        title=f"{model}, {machine()}",
        header=header,
        rows=tuple(cells),
        notes=(str(limit),),
        text_columns=1,
    )


def main() -> None:
    """Measure every model and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--images", type=Path, help="real images to compare features on [default: built-in scenes]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out paths with one of these words, e.g. compile"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(json.loads(given.work))
        return
    for model in given.models:
        name = model.split("/")[0]
        folder = given.out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = race(model, folder, given.images, given.rounds, given.batches, given.without)
        made = table(rows, model, limit_of(model))
        shares = openvino_shares(folder / "bundle", folder / f"pixels{given.batches[-1]}.npy")
        made = dataclasses.replace(made, notes=(*made.notes, *shares))
        write_table(given.out, name, rows, made)
        sys.stdout.write(made.to_markdown() + "\n")


if __name__ == "__main__":
    main()
