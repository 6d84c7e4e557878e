"""The names of models and parameters that repository, server and client share; tensors' names: ``core/tensors.py``."""

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
"""Which of the plans run in later TensorRT versions, too: "all" or "some"; absent: none."""

OPSET = "opset"
"""Of the ONNX file that runs."""

PRECISION = "precision"
RUNTIME = "runtime"
MEASURED_WITH = "measured_with"
"""The instruction sets of the processor that the runtime was the fastest on; one without them takes the portable."""
NEXT = "next"
"""The model that an admission is to."""
THREADS = "intra_op_thread_count"
"""Of one product on the CPU; the ONNX Runtime backend knows it by this name."""

ENCODER_DIGEST = "encoder_digest"
"""Of the ONNX file that runs, or that the plans were built from: a vocabulary must be of the same encoder."""


def of_vocabulary(model: str, vocabulary: str | None) -> str:
    """The name of ``model`` for ``vocabulary``: "classify-birds"; the repository's first vocabulary has no name."""
    return model if vocabulary is None else f"{model}-{vocabulary}"
