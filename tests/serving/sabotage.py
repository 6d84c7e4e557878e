"""Runtimes that answer wrongly: features off by five per cent, names shifted, colours exchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from clipship.core.bundle import Bundle, EncoderVariant, read_bundle, write_manifest
from tests.serving.bundles import EMBED_DIM, write_bundle

Mistake = Literal["scale", "direction"]
MISTAKES: tuple[Mistake, ...] = ("scale", "direction")


def sabotaged_encoder(path: Path, mistake: Mistake) -> bytes:
    """The graph at ``path`` with features off by 5 %: 1.05 times as long, or moved in a random direction."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    (last,) = [node for node in model.graph.node if node.output[0] == "embedding"]
    last.output[0] = "right"
    direction = np.random.default_rng(5).normal(size=EMBED_DIM)
    values = {"scale": np.array(1.05), "direction": 0.05 * direction / np.linalg.norm(direction)}[mistake]
    model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), "mistake"))
    if mistake == "scale":
        nodes = [helper.make_node("Mul", ["right", "mistake"], ["embedding"])]
    else:
        moved = helper.make_node("Add", ["right", "mistake"], ["moved"])
        nodes = [moved, helper.make_node("LpNormalization", ["moved"], ["embedding"], axis=1, p=2)]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def sabotaged_bundle(folder: Path, mistake: Mistake, variant: EncoderVariant) -> Bundle:
    """The stand-in bundle whose ``variant`` has the mistake; all digests fit: only the golden samples can tell."""
    bundle = write_bundle(folder)
    (folder / variant.file).write_bytes(sabotaged_encoder(folder / "image_encoder.onnx", mistake))
    others = [each for each in bundle.image_encoders if each.file != variant.file]
    write_manifest(folder, replace(bundle.manifest, image_encoders=(*others, variant)))
    return read_bundle(folder)


def replace_in(file: Path, old: str, new: str) -> None:
    """Edit a source in a repository."""
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file}: {old!r}"
    file.write_text(text.replace(old, new), encoding="utf-8")
