"""The names of models and parameters that repository, server and client share; tensors' names: ``core/tensors.py``."""

ENCODER = "image_encoder"
CLASSIFIER = "classifier"
PREPROCESS = "preprocess"
CLASSIFY = "classify"
CLASSIFY_ENCODED = "classify_encoded"
EMBED = "embed"

BUNDLE_DIGEST = "bundle_digest"
IMAGE_SPEC = "image_spec"
VOCABULARY_DIGEST = "vocabulary_digest"
TOP_K = "top_k"
