"""The classifier as an ONNX graph: embedding -> scores, indices and label strings of the top k.

Features, scale and names are constants of one graph, so scores and labels always come from the same vocabulary. The
rule is that of :mod:`clipship.core.classification`; a bias and a cache are in the graph where the classifier has them.
Legend: N images, D embedding size, C classes, K keys of the cache, k = min(top_k, C).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.classification import VocabularyFeatures
from clipship.core.errors import MissingExtraError
from clipship.core.tensors import (
    TensorSpec,
    embedding_tensor,
    indices_tensor,
    labels_tensor,
    passthrough_tensor,
    scores_tensor,
)
from clipship.core.vocabulary import Vocabulary

_OPSET = 18
_IR_VERSION = 8  # the IR of opset 18: ONNX Runtime 1.14 and every Triton since 23.03 read it


def classifier_outputs(top_k: int) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Scores, indices and labels, k of each."""
    return scores_tensor(top_k), indices_tensor(top_k), labels_tensor(top_k)


def classifier_graph(vocabulary: Vocabulary, features: VocabularyFeatures, top_k: int) -> bytes:
    """The serialised ONNX model: float32 [N, D] -> float32, int64 and string [N, k], and what it was given [N, D].

    Ties go to the class that comes first in the vocabulary. Equal arguments give equal bytes.

    Raises:
        MissingExtraError: the ``onnx`` package is not installed.
    """
    try:
        from onnx import checker, helper
    except ImportError as error:
        raise MissingExtraError("onnx", "serving") from error

    k = min(top_k, len(vocabulary))
    scores, indices, labels = (tensor.name for tensor in classifier_outputs(k))
    embed_dim = features.features.shape[1]
    embedding, passed = embedding_tensor(embed_dim), passthrough_tensor(embed_dim)
    nodes = [
        *_logit_nodes(embedding.name, features),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("TopK", ["probabilities", "k"], [scores, indices], axis=-1, largest=1, sorted=1),
        helper.make_node("Gather", ["names", indices], [labels], axis=0),
        helper.make_node("Identity", [embedding.name], [passed.name]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [_value_info(embedding)],
        [_value_info(tensor) for tensor in (*classifier_outputs(k), passed)],
        _constants(vocabulary, features, k),
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="clipship"
    )
    helper.set_model_props(model, {"vocabulary_digest": vocabulary.digest})
    checker.check_model(model)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def _logit_nodes(embedding: str, features: VocabularyFeatures) -> list[Any]:
    """``embedding`` [N, D] -> "logits" [N, C]."""
    from onnx import helper

    biased = "cosines" if features.bias is None else "biased"
    plain = "plain_logits" if _has_keys(features) else "logits"
    nodes = [helper.make_node("MatMul", [embedding, "features"], ["cosines"])]
    if features.bias is not None:
        nodes.append(helper.make_node("Add", ["cosines", "bias"], [biased]))
    nodes.append(helper.make_node("Mul", [biased, "logit_scale"], [plain]))
    return [*nodes, *_vote_nodes(embedding, plain)] if _has_keys(features) else nodes


def _vote_nodes(embedding: str, plain: str) -> list[Any]:
    """``plain`` logits [N, C] plus ``alpha exp(beta (f F^T - 1))`` of each key at its label: no constant [K, C]."""
    from onnx import helper

    return [
        helper.make_node("MatMul", [embedding, "cache_keys"], ["key_cosines"]),  # [N, K]
        helper.make_node("Sub", ["key_cosines", "one"], ["distances"]),
        helper.make_node("Mul", ["distances", "cache_beta"], ["exponents"]),
        helper.make_node("Exp", ["exponents"], ["affinities"]),
        helper.make_node("Mul", ["affinities", "cache_alpha"], ["votes"]),
        helper.make_node("Shape", ["votes"], ["votes_shape"]),
        helper.make_node("Expand", ["cache_labels", "votes_shape"], ["vote_classes"]),
        helper.make_node("ScatterElements", [plain, "vote_classes", "votes"], ["logits"], axis=1, reduction="add"),
    ]


def _has_keys(features: VocabularyFeatures) -> bool:
    """A cache may be left without keys: none of its classes is in the vocabulary."""
    return features.cache is not None and len(features.cache.labels) > 0


def _constants(vocabulary: Vocabulary, features: VocabularyFeatures, k: int) -> list[Any]:
    from onnx import TensorProto, helper, numpy_helper

    weights = np.ascontiguousarray(features.features.T, dtype=np.float32)  # [D, C]
    names = [name.encode() for name in vocabulary]
    return [
        numpy_helper.from_array(weights, "features"),
        numpy_helper.from_array(np.float32(features.logit_scale).reshape(()), "logit_scale"),
        *(numpy_helper.from_array(array, name) for name, array in _part_constants(features).items()),
        numpy_helper.from_array(np.array([k], dtype=np.int64), "k"),
        helper.make_tensor("names", TensorProto.STRING, [len(names)], names),
    ]


def _part_constants(features: VocabularyFeatures) -> dict[str, NDArray[Any]]:
    """Those of the bias and of the cache, by name."""
    constants: dict[str, NDArray[Any]] = {}
    if features.bias is not None:
        constants["bias"] = np.ascontiguousarray(features.bias, np.float32)
    if features.cache is not None and _has_keys(features):
        constants["cache_keys"] = np.ascontiguousarray(features.cache.keys.T, np.float32)  # [D, K]
        constants["cache_labels"] = np.ascontiguousarray(features.cache.labels[None], np.int64)  # [1, K]
        constants["cache_alpha"] = np.array(features.cache.alpha, np.float32)
        constants["cache_beta"] = np.array(features.cache.beta, np.float32)
        constants["one"] = np.array(1, np.float32)
    return constants


def _value_info(tensor: TensorSpec) -> Any:
    from onnx import TensorProto, helper

    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "string": TensorProto.STRING}
    return helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape))
