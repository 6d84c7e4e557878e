"""TensorRT-RTX plans of every precision for GPUs that are not here: build time, size, and what the parser made of it.

    python benchmarks/engines.py --out runs/engines
    python benchmarks/engines.py --models clipship-tiny --gpus sm89 --precisions fp32 fp16 --out runs/engines

A model is exported once; float16, bfloat16 and int8 variants are calibrated on scenes of the built-in world. Each row
is one plan for one GPU with batches of 1 to 64, tuned for 8. The network is compared with the graph first, so
a row with a plan has no unsupported node and no tensor of another type than the graph's. What failed is a row with the
reason. Rows are kept in the JSON file as they come; started again, what is there is not built again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipship.core.errors import ClipshipError
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.progress import log
from clipship.core.tables import Table, write_table
from clipship.core.tensors import TensorSpec, embedding_tensor, image_tensor

MODELS = ("clipship-tiny", "ViT-B-32/random", "ViT-B-16/random", "ViT-L-14/random")
GPUS = ("sm80", "sm86", "sm89", "sm120")
PICTURES = 32  # the fewest that a reduced precision is calibrated on
SHOWN = ("MATRIX_MULTIPLY", "CONVOLUTION", "NORMALIZATION", "SOFTMAX", "QUANTIZE", "DEQUANTIZE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """One model's image encoder, and what its further variants are calibrated on."""

    path: Path
    specs: tuple[TensorSpec, TensorSpec]
    pixels: Any


def exported(model: str, folder: Path) -> Exported:
    """Write ``image_encoder.onnx`` of ``model`` into ``folder``."""
    import torch

    from clipship.export.fused_encoder import FusedImageEncoder
    from clipship.export.image_input import pictures_for
    from clipship.export.onnx_graph import onnx_from_module
    from clipship.export.reference import pixels_of
    from clipship.training.methods import Task, build_method
    from clipship.training.model.clip import load_clip
    from clipship.training.recipes import config_from_recipe

    clip = load_clip(model)
    config = dataclasses.replace(config_from_recipe("zero-shot"), base_model=model)
    task = Task(class_names=("a", "b"), num_base=1, templates=("a photo of a {}.",))
    size, path = clip.image_spec.size_px, folder / "image_encoder.onnx"
    specs = (image_tensor(size), embedding_tensor(clip.embed_dim))
    with torch.inference_mode():
        onnx_from_module(
            FusedImageEncoder(build_method(clip, config, task).eval()),
            torch.zeros((2, size, size, 3), dtype=torch.uint8),
            path,
            input_spec=specs[0],
            output_spec=specs[1],
            metadata={},
        )
    return Exported(path=path, specs=specs, pixels=pixels_of(pictures_for(None)[:PICTURES], clip.image_spec))


def variant_path(one: Exported, precision: Precision) -> Path:
    """The graph in ``precision``, written on first use."""
    from clipship.export.precision.half_precision import typed_onnx
    from clipship.export.precision.quantization import quantized_onnx

    path = one.path if precision == "fp32" else one.path.with_name(f"image_encoder.{precision}.onnx")
    if not path.exists():
        if PRECISIONS[precision].quantized:
            quantized_onnx(one.path, path, one.pixels)
        elif precision != "fp32":
            typed_onnx(one.path, path, precision, one.pixels)
    return path


def built(one: Exported, precision: Precision, gpu: str) -> dict[str, Any]:
    """Build one plan, or say why that fails."""
    from clipship.export.tensorrt.build import Settings, build_plan
    from clipship.export.tensorrt.runtime import load_runtime

    loaded = load_runtime("tensorrt-rtx")
    try:
        path = variant_path(one, precision)
        started = time.perf_counter()
        data, found = build_plan(loaded, path, one.specs, precision, Settings(gpus=(gpu,)))
    except ClipshipError as error:
        return {"failed": str(error)}
    return {
        "runtime": f"tensorrt-rtx {loaded.version}",
        "build_s": round(time.perf_counter() - started, 2),
        "plan_mb": round(len(data) / 1e6, 1),
        "onnx_mb": round(sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6, 1),
        "unsupported_nodes": 0,  # else the parser had refused, and the reason were here
        "tensors_compared": found.compared,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "layers": dict(found.layers),
    }


def rows(
    models: Sequence[str], precisions: Sequence[Precision], gpus: Sequence[str], done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every plan that is not in ``done``."""
    there = {(row["model"], row["precision"], row["gpu"]) for row in done if "failed" not in row}
    for model in models:
        wanted = [(precision, gpu) for precision in precisions for gpu in gpus if (model, precision, gpu) not in there]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            one = exported(model, Path(folder))
            for precision, gpu in wanted:
                row = {"model": model, "precision": precision, "gpu": gpu, **built(one, precision, gpu)}
                log(f"{model} {precision} {gpu}: {row.get('failed') or '{build_s} s, {plan_mb} MB'.format(**row)}")
                yield row


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A line for each model and precision, the GPUs side by side."""
    gpus = sorted({row["gpu"] for row in found}, key=lambda gpu: int(gpu.removeprefix("sm")))
    lines, notes = [], []
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in found):
        by_gpu = {row["gpu"]: row for row in found if (row["model"], row["precision"]) == (model, precision)}
        notes += [f"{model} {precision} {gpu}: {row['failed']}" for gpu, row in by_gpu.items() if "failed" in row]
        good = next((row for row in by_gpu.values() if "failed" not in row), None)
        if good is None:
            continue
        times = [str(by_gpu.get(gpu, {}).get("build_s", "-")) for gpu in gpus]
        sizes = (f"{good['onnx_mb']:,}", f"{good['plan_mb']:,}")
        counts = (str(good["unsupported_nodes"]), str(good["tensors_compared"]))
        lines.append((model, precision, layers_text(good["layers"]), *sizes, *times, *counts))
    header = ("model", "precision", "layers", "ONNX MB", "plan MB", *(f"{gpu} s" for gpu in gpus))
    return Table(header=(*header, "unsupported", "compared"), rows=tuple(lines), notes=tuple(notes), text_columns=3)


def layers_text(layers: dict[str, int]) -> str:
    """The layers that a precision is about: "25 MATRIX_MULTIPLY HALF, 10 NORMALIZATION FLOAT"."""
    return ", ".join(f"{count} {name}" for name, count in layers.items() if name.startswith(SHOWN))


def main() -> None:
    """Parse the arguments, build, write ``engines.json`` and ``engines.md`` after each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--gpus", nargs="+", default=GPUS)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = arguments.out / "engines.json"
    found: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    for row in rows(arguments.models, arguments.precisions, arguments.gpus, found):
        key = ("model", "precision", "gpu")
        found = [old for old in found if any(old[name] != row[name] for name in key)] + [row]
        write_table(arguments.out, "engines", found, table(found))
    print(table(found).to_markdown())


if __name__ == "__main__":
    main()
