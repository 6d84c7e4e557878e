"""The names of models and parameters that repository, server and client share. Tensors: ``core/tensors.py``."""

ENCODER = "image_encoder"
CLASSIFIER = "classifier"
PREPROCESS = "preprocess"
ADMISSION = "admission"
"""Of files, to ``preprocess``."""
PIXELS_ADMISSION = "admission_pixels"
"""Of pixels, to the image encoder."""
CLASSIFY = "classify"
CLASSIFY_ENCODED = "classify_encoded"
EMBED = "embed"

BUNDLE_DIGEST = "bundle_digest"
IMAGE_SPEC = "image_spec"
VOCABULARY_DIGEST = "vocabulary_digest"
TOP_K = "top_k"
TENSORRT_VERSION = "tensorrt_version"
VERSION_COMPATIBLE = "version_compatible"
"""Which plans run in later TensorRT versions too: "all" or "some"; absent: none."""

OPSET = "opset"
"""Of the ONNX file that runs."""

PRECISION = "precision"
RUNTIME = "runtime"
MEASURED_WITH = "measured_with"
"""Instruction sets of the processor on which the runtime was the fastest; without them the portable one is used."""
NEXT = "next"
"""The model behind an admission model."""
THREADS = "intra_op_thread_count"
"""Of one product on the CPU; the ONNX Runtime backend's own parameter."""

ENCODER_DIGEST = "encoder_digest"
"""Of the ONNX file that runs, or from which the plans were built. A vocabulary belongs to one encoder."""


def of_vocabulary(model: str, vocabulary: str | None) -> str:
    """The name of ``model`` for ``vocabulary``: "classify-birds"; the first vocabulary has no name."""
    return model if vocabulary is None else f"{model}-{vocabulary}"
