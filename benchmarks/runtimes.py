"""Which versions of ONNX Runtime and OpenVINO run the graphs that clipship writes, and give PyTorch's features.

    python -m benchmarks.runtimes                                        # the oldest and the newest version of each
    python -m benchmarks.runtimes --minors                               # every minor version: the table of the docs
    python -m benchmarks.runtimes onnxruntime==1.18.1 openvino==2025.4.1

pip installs each version with NumPy and nothing else into an environment of its own, which is deleted afterwards. There
every graph runs in a process of its own, by the code that serves it: the image encoder in each opset and precision, the
text encoder and the classifier, of ``clipship-tiny``. What is in no version's range has its
reason in a note. Exit code 1: a version that docs/guides/precision.md promises fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.precision import zero_shot_of
from clipship.core.bundle import TEXT_ENCODER, Bundle, EncoderVariant, VocabularyFeatures
from clipship.core.classification import Cache
from clipship.core.comparison import Answers, Comparison, compare_answers, compare_features
from clipship.core.precisions import PRECISIONS, REDUCED
from clipship.core.tables import Table, write_table
from clipship.core.tolerances import TOLERANCES
from clipship.core.vocabulary import Vocabulary
from clipship.export.image_input import pictures_from_world
from clipship.export.onnx_graph import OPSET, OPSETS
from clipship.export.pack import bundle_from_method
from clipship.export.precision.encoder_variants import Profile
from clipship.export.reference import Picture
from clipship.serving.repository.classifier_graph import classifier_graph
from clipship.training.methods.base import Method
from clipship.training.model.clip import load_clip

PROMISED = {
    "onnxruntime": {18: "1.17.0", 20: "1.17.0", 23: "1.24.4"},
    "openvino": {18: "2025.0.0", 20: "2025.0.0", 23: "2026.1.0"},
}
"""By package and opset the oldest version that runs all its graphs; the newest is the newest that can be installed."""

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_ROOT = Path(__file__).resolve().parents[1]
_LAST_WITH_NUMPY_1 = (1, 18)
_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph with what it is given and how its answers are judged."""

    name: str
    opset: int
    precision: str
    path: Path
    rows: NDArray[Any]
    verdict: Callable[[Sequence[NDArray[Any]]], Comparison | Answers]
    """Of its outputs."""
    runtimes: tuple[str, ...] = ("onnxruntime", "openvino")
    """The packages that would serve it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a graph ran in one version."""

    graph: str
    opset: int
    runtime: str
    version: str
    problem: str
    """Empty where its answers are within tolerance."""


def graphs_of(method: Method, vocabulary: Vocabulary, pictures: Sequence[Picture], folder: Path) -> Iterator[Graph]:
    """Every graph that ``method`` is packed and served with, in every opset; bundles are written into ``folder``."""
    for opset in OPSETS:
        profile = Profile(opset=opset, precisions=REDUCED)
        out = folder / f"opset-{opset}"
        bundle = bundle_from_method(method, vocabulary, pictures, out, provenance={}, profile=profile)
        for variant in bundle.image_encoders:
            if variant.runtime == "onnx":
                yield image_graph(bundle, variant)
        yield text_graph(bundle, method, opset)
    yield from _classifier_graphs(bundle, folder)


def image_graph(bundle: Bundle, variant: EncoderVariant) -> Graph:
    """A variant of the image encoder on the golden samples."""
    golden, classifier = bundle.golden(), bundle.vocabulary_features()
    return Graph(
        name=f"image encoder, {variant.precision}",
        opset=variant.opset,
        precision=variant.precision,
        path=bundle.path / variant.file,
        rows=golden.pixels,
        verdict=_features_verdict(golden.embedding, classifier, variant.precision),
        runtimes=("onnxruntime",)
        if PRECISIONS[variant.precision].openvino_reads != variant.precision
        else ("onnxruntime", "openvino"),
    )


def text_graph(bundle: Bundle, method: Method, opset: int) -> Graph:
    """The text encoder on the vocabulary's prompts with all their padding."""
    tokens = method.clip.tokenize(bundle.vocabulary.prompts(method.templates[0]))
    with torch.inference_mode():
        expected = method.text_features(tokens).numpy()
    return Graph(
        name="text encoder",
        opset=opset,
        precision="fp32",
        path=bundle.path / TEXT_ENCODER,
        rows=tokens.numpy(),
        verdict=_features_verdict(expected, expected, "text-fp32"),
    )


def _features_verdict(
    expected: NDArray[np.float32], references: Any, precision: str
) -> Callable[[Sequence[NDArray[Any]]], Comparison]:
    def verdict(outputs: Sequence[NDArray[Any]]) -> Comparison:
        about: dict[str, Any] = {"references": references, "tolerance": TOLERANCES[precision]}
        return compare_features("golden samples", "", len(expected), expected, outputs[0], **about)

    return verdict


def _classifier_graphs(bundle: Bundle, folder: Path) -> Iterator[Graph]:
    """Plain, and with all that a classifier may have."""
    plain, embedding = bundle.vocabulary_features(), bundle.golden().embedding
    labels = np.arange(len(embedding), dtype=np.int64) % len(bundle.vocabulary)
    bias = np.linspace(-0.1, 0.1, len(bundle.vocabulary), dtype=np.float32)
    whole = replace(plain, bias=bias, cache=Cache(keys=embedding, labels=labels, alpha=2.0, beta=3.0))
    for name, features in (("classifier", plain), ("classifier, bias and cache", whole)):
        path = folder / f"{name}.onnx"
        path.write_bytes(classifier_graph(bundle.vocabulary, features, len(bundle.vocabulary)))
        yield Graph(
            name=name,
            opset=OPSET,
            precision="fp32",
            path=path,
            rows=embedding,
            verdict=_classes_verdict(bundle.vocabulary, features, embedding),
            runtimes=("onnxruntime",),
        )


def _classes_verdict(
    vocabulary: Vocabulary, features: VocabularyFeatures, embedding: NDArray[np.float32]
) -> Callable[[Sequence[NDArray[Any]]], Answers]:
    about: dict[str, Any] = {"batch_size": len(embedding), "count": len(embedding), "tolerance": TOLERANCES["fp32"]}
    blank = Answers(what="golden samples", model="classifier", provider="", **about)

    def verdict(outputs: Sequence[NDArray[Any]]) -> Answers:
        scores, indices, labels, _ = outputs
        expected = features.probabilities(embedding)
        return compare_answers(blank, expected, vocabulary.names, scores, indices, labels.tolist())

    return verdict


@contextmanager
def environment(requirement: str) -> Iterator[Path]:
    """The Python of a new environment with ``requirement`` ("onnxruntime==1.17.0") and NumPy, deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="clipship-runtime-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        numpy = "numpy<2" if _needs_numpy_1(requirement) else "numpy"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement, numpy]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        yield python


def _needs_numpy_1(requirement: str) -> bool:
    """ONNX Runtime before 1.19 is built for NumPy 1 and does not say so."""
    version = re.fullmatch(r"onnxruntime==(\d+)\.(\d+)\..*", requirement)
    return version is not None and (int(version[1]), int(version[2])) <= _LAST_WITH_NUMPY_1


def outcomes_in(requirement: str, graphs: Sequence[Graph]) -> list[Outcome]:
    """How every one of ``graphs`` that it would serve runs in the version ``requirement``."""
    runtime = requirement.partition("=")[0]
    with environment(requirement) as python:
        version = _output([str(python), "-c", f"import {runtime}; print({runtime}.__version__)"])
        about: dict[str, Any] = {"runtime": runtime, "version": version.partition("-")[0].strip()}
        served = [graph for graph in graphs if runtime in graph.runtimes]
        return [
            Outcome(graph=graph.name, opset=graph.opset, problem=problem_in(python, runtime, graph), **about)
            for graph in served
        ]


def problem_in(python: Path, runtime: str, graph: Graph) -> str:
    """Why ``graph`` gives no right answer there; empty where it does."""
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.npy", Path(folder) / "out.npz"
        np.save(rows, graph.rows)
        by = "openvino" if runtime == "openvino" else "onnx"
        arguments = [str(graph.path), by, graph.precision, str(rows), str(out)]
        environ = {**os.environ, "PYTHONPATH": str(_ROOT / "core")}
        command = [str(python), str(_ROOT / "benchmarks" / "run_graph.py"), *arguments]
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if ran.returncode:
            return _short((ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"])[-1], graph)
        with np.load(out) as outputs:
            return "; ".join(graph.verdict([outputs[name] for name in outputs.files]).failures)


def _short(line: str, graph: Graph) -> str:
    """The runtime's own words, without its class, its sources and the file's name."""
    line = re.sub(r"^[\w.]+: |\[ONNXRuntimeError\] : \d+ : ", "", line.replace(str(graph.path), "the graph"))
    return " ".join(re.sub(r"failed:/.*\) ", "failed: ", line).split())[:200]


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def minors_since(runtime: str) -> list[str]:
    """Requirements for the newest patch of every minor version from the oldest that is promised, by pip's own list."""
    listed = _output([sys.executable, "-m", "pip", "index", "versions", runtime, "--disable-pip-version-check"])
    found = re.search(r"Available versions: (.*)", listed)
    assert found is not None, listed
    newest: dict[tuple[int, ...], str] = {}
    for version in found[1].split(", "):  # newest first
        newest.setdefault(_numbers(version)[:2], version)
    oldest = PROMISED[runtime][OPSET]
    kept = [version for minor, version in sorted(newest.items()) if minor > _numbers(oldest)[:2]]
    return [f"{runtime}=={version}" for version in (oldest, *kept)]


def ends_of(runtime: str) -> list[str]:
    """Requirements for the oldest version that is promised and for the newest that can be installed."""
    return [f"{runtime}=={PROMISED[runtime][OPSET]}", runtime]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def broken_promises(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that are wrong in a version that :data:`PROMISED` has."""
    return [
        one
        for one in outcomes
        if one.problem
        and _numbers(one.version) >= _numbers(PROMISED[one.runtime][one.opset])
        and (one.runtime, one.graph) != ("onnxruntime", "image encoder, bf16")  # for GPUs
    ]


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Graph x opset: the versions that run it right, and notes on those that do not."""
    notes: dict[tuple[str, str], list[str]] = {}
    for one in outcomes:
        if one.problem:
            notes.setdefault((one.runtime, one.problem), []).append(one.version)
    rows = []
    for graph, opset in dict.fromkeys((one.graph, one.opset) for one in outcomes):
        of_graph = [one for one in outcomes if (one.graph, one.opset) == (graph, opset)]
        cells = (_cell([one for one in of_graph if one.runtime == runtime], list(notes)) for runtime in NAMES)
        rows.append((graph, str(opset), *cells))
    told = (f"{NAMES[runtime]} {_span(versions)}: {problem}" for (runtime, problem), versions in notes.items())
    return Table(header=("graph", "opset", *NAMES.values()), rows=tuple(rows), notes=tuple(told), text_columns=4)


def _cell(outcomes: Sequence[Outcome], notes: Sequence[tuple[str, str]]) -> str:
    """The versions that are right, and the marks of the notes on the others."""
    if not outcomes:
        return "not served by it"
    right = [one.version for one in outcomes if not one.problem]
    marks = sorted({notes.index((one.runtime, one.problem)) + 1 for one in outcomes if one.problem})
    return " ".join([_span(right) if right else "none", *(f"[{mark}]" for mark in marks)])


def _span(versions: Sequence[str]) -> str:
    ordered = sorted(set(versions), key=_numbers)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def main() -> None:
    """Export, install, run, write the table."""
    options = _options()
    clip = load_clip("clipship-tiny")
    requirements = options.requirements or [
        one for runtime in NAMES for one in (minors_since(runtime) if options.minors else ends_of(runtime))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        method, vocabulary = zero_shot_of(clip)
        graphs = list(graphs_of(method, vocabulary, pictures_from_world(40), Path(scratch)))
        outcomes = [one for requirement in requirements for one in outcomes_in(requirement, graphs)]
    made = table_of(outcomes)
    write_table(options.out, "runtimes", [asdict(one) for one in outcomes], made)
    print(made.to_markdown())
    broken = broken_promises(outcomes)
    sys.exit("\n".join(f"promised: {one}" for one in broken) if broken else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", nargs="*", metavar="PACKAGE==VERSION")
    parser.add_argument("--minors", action="store_true", help="every minor version since the oldest promised")
    parser.add_argument("--out", type=Path, default=Path("runs/runtimes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
