"""A small real bundle: ONNX encoders with random weights, UTF-8 class names, golden images and their answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.bundle import Bundle, Manifest, read_bundle, write_manifest
from clipship.core.files import write_json_atomic
from clipship.core.images.decoding import ImageSpec, pixels_from_bytes
from clipship.core.tensors import TensorSpec, embedding_tensor, image_tensor, tokens_tensor
from clipship.core.vocabulary import Vocabulary

SIZE_PX = 32
EMBED_DIM = 16
CONTEXT_LENGTH = 8
NAMES = ("red fox", "Häuser", "猫", "naïve_art", "plate, with comma", 'a "quoted" name', "🦊")
SPEC = ImageSpec(size_px=SIZE_PX, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
VOCABULARY = Vocabulary(names=NAMES)
LOGIT_SCALE = 20.0


def image_encoder_model(
    size_px: int = SIZE_PX, embed_dim: int = EMBED_DIM, seed: int = 0, rounding: float = 0.0
) -> bytes:
    """uint8 [N, H, W, 3] -> cast, normalise, one matrix, unit length -> float32 [N, D].

    ``rounding``: by how much of their size the weights are off, as in a variant of reduced precision.
    """
    from onnx import TensorProto, helper

    weights = np.random.default_rng(seed).normal(size=(size_px * size_px * 3, embed_dim)).astype(np.float32)
    weights += np.float32(rounding) * np.random.default_rng(seed + 1).normal(size=weights.shape).astype(np.float32)
    constants: dict[str, NDArray[np.float32]] = {
        "scale": np.array([1 / (255 * std) for std in SPEC.std], dtype=np.float32),
        "shift": np.array([mean / std for mean, std in zip(SPEC.mean, SPEC.std, strict=True)], dtype=np.float32),
        "weights": weights,
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["cast", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "shift"], ["normalised"]),
        helper.make_node("Flatten", ["normalised"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["features"]),
        helper.make_node("LpNormalization", ["features"], ["embedding"], axis=1, p=2),
    ]
    return _model(nodes, image_tensor(size_px), embedding_tensor(embed_dim), constants)


def text_encoder_model() -> bytes:
    """int64 [C, L] -> float32 [C, D]: a stand-in that nothing in the serving stage runs."""
    from onnx import TensorProto, helper

    weights = np.random.default_rng(1).normal(size=(CONTEXT_LENGTH, EMBED_DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["tokens"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["cast", "weights"], ["features"]),
        helper.make_node("LpNormalization", ["features"], ["embedding"], axis=1, p=2),
    ]
    return _model(nodes, tokens_tensor(CONTEXT_LENGTH), embedding_tensor(EMBED_DIM, "classes"), {"weights": weights})


def _model(
    nodes: list[object], source: TensorSpec, result: TensorSpec, constants: dict[str, NDArray[np.float32]]
) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    types = {"uint8": TensorProto.UINT8, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    infos = [helper.make_tensor_value_info(t.name, types[t.dtype], list(t.shape)) for t in (source, result)]
    initialisers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", infos[:1], infos[1:], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


def text_features() -> NDArray[np.float32]:
    """[C, D], rows of unit length."""
    features = np.random.default_rng(2).normal(size=(len(NAMES), EMBED_DIM)).astype(np.float32)
    norms: NDArray[np.float32] = np.linalg.norm(features, axis=1, keepdims=True)
    return features / norms


def jpeg_bytes(seed: int, width: int = 48, height: int = 40) -> bytes:
    """A smooth random image as JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def reference_answers(
    pixels: NDArray[np.uint8], encoder: bytes, k: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Embedding [N, D], scores and indices [N, k] in this process: ONNX Runtime for the encoder, NumPy behind it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"image": pixels})
    logits = LOGIT_SCALE * (embedding.astype(np.float64) @ text_features().astype(np.float64).T)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    indices = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return embedding, np.take_along_axis(probabilities, indices, axis=1).astype(np.float32), indices


def write_bundle(folder: Path, *, passed: bool = True, seed: int = 0) -> Bundle:
    """Write a bundle to ``folder`` and read it back."""
    from safetensors.numpy import save_file

    encoder = image_encoder_model(seed=seed)
    (folder / "golden").mkdir(parents=True)
    (folder / "image_encoder.onnx").write_bytes(encoder)
    (folder / "text_encoder.onnx").write_bytes(text_encoder_model())
    (folder / "labels.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    scale = np.array([LOGIT_SCALE], dtype=np.float32)
    save_file({"features": text_features(), "logit_scale": scale}, folder / "vocabulary.safetensors")
    _write_golden(folder / "golden", encoder)
    write_json_atomic(folder / "verification.json", {"passed": passed})
    write_manifest(folder, _manifest())
    return read_bundle(folder)


def _write_golden(folder: Path, encoder: bytes) -> None:
    from safetensors.numpy import save_file

    files = {f"{seed}.jpg": jpeg_bytes(seed) for seed in range(3)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pixels = np.stack([pixels_from_bytes(data, SPEC) for data in files.values()])
    embedding, scores, indices = reference_answers(pixels, encoder, k=5)
    tensors = {"pixels": pixels, "embedding": embedding, "scores": scores, "indices": np.ascontiguousarray(indices)}
    save_file(tensors, folder / "golden.safetensors")
    (folder / "files.json").write_text(json.dumps(list(files)))


def _manifest() -> Manifest:
    return Manifest(
        base_model="stand-in",
        base_model_digest="0" * 64,
        method="zero-shot",
        image_spec=SPEC,
        inputs_outputs={
            "image_encoder.onnx": (image_tensor(SIZE_PX), embedding_tensor(EMBED_DIM)),
            "text_encoder.onnx": (tokens_tensor(CONTEXT_LENGTH), embedding_tensor(EMBED_DIM, "classes")),
        },
        embed_dim=EMBED_DIM,
        vocabulary=VOCABULARY,
        provenance={"purpose": "tests of the serving stage"},
    )
