"""The in-process twin of a server: the same client, answered by ONNX Runtime in this process.

>>> with Classifier(LocalTransport(read_bundle(Path("bundles/prints")))) as classifier:
...     classifier.classify(["photo.jpg"])

It runs the very graphs a repository would hold, so its answers are the server's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from clipship.core.bundle import Bundle, Precision, Runtime
from clipship.core.cpu import open_encoder
from clipship.core.errors import MissingExtraError
from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.serving.errors import ModelsMissing
from clipship.serving.graphs import classifier_graph
from clipship.serving.names import CLASSIFY
from clipship.serving.repository import configs_from_facts, facts_from_bundle
from clipship.serving.transport import Tensors, config_json


class LocalTransport:
    """A :class:`~clipship.serving.transport.Transport` that serves ``bundle`` by itself; it decodes on the client only.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: a number is below 1.
    """

    def __init__(
        self, bundle: Bundle, *, precision: Precision = "fp32", max_batch_size: int = 64, top_k: int = 5
    ) -> None:
        try:
            from onnxruntime import InferenceSession
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export") from error
        form = bundle.fastest_encoder(precision, _runtimes())
        facts = facts_from_bundle(bundle, max_batch_size=max_batch_size, top_k=top_k, encoder=form)
        self.url = str(bundle.path)
        self._configs = {name: config_json(each) for name, each in configs_from_facts(facts, "onnxruntime").items()}
        graph = classifier_graph(bundle.vocabulary, bundle.vocabulary_features(), facts.top_k)
        self._encode = open_encoder(str(bundle.path / form.file), form.runtime, form.precision)
        self._classifier = InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._image = image_tensor(facts.image_spec.size_px).name
        self._embedding = embedding_tensor(facts.embed_dim).name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipship-local")

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str], *, timeout_s: float) -> Future[Tensors]:
        """See :meth:`Transport.infer`; requests run one after the other, ``timeout_s`` is not needed."""
        if model != CLASSIFY:
            raise ModelsMissing(f"{self.url}: {model} needs a server: decode on the client")
        return self._thread.submit(self._classify, inputs, outputs)

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        return self._configs[model]

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return sorted(self._configs)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._thread.shutdown()

    def _classify(self, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        embedding = self._encode(inputs[self._image])
        values = self._classifier.run(list(outputs), {self._embedding: embedding})
        answer = dict(zip(outputs, values, strict=True))
        # ONNX Runtime gives str, a server gives bytes
        return {name: _as_bytes(value) if value.dtype.kind in "OU" else value for name, value in answer.items()}


def _runtimes() -> tuple[Runtime, ...]:
    """What can run a form of the image encoder in this process."""
    has_openvino = importlib.util.find_spec("openvino") is not None
    return ("onnx", "onnxruntime", "openvino") if has_openvino else ("onnx", "onnxruntime")


def _as_bytes(strings: Any) -> Any:
    import numpy as np

    return np.array([text.encode() for text in strings.ravel()], np.object_).reshape(strings.shape)
