"""The in-process twin of a server: the same client, answered by ONNX Runtime in this process.

>>> with Classifier(LocalTransport(read_bundle(Path("bundles/prints")))) as classifier:
...     classifier.classify(["photo.jpg"])

It runs the very graphs a repository would hold, so its answers are the server's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from clipship.core.bundle import Bundle, Precision, Runtime
from clipship.core.cpu import open_encoder
from clipship.core.errors import MissingExtraError
from clipship.core.processor import this_processor
from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.serving.errors import ModelsMissing
from clipship.serving.graphs import classifier_graph
from clipship.serving.models import configs_from_facts, facts_from_bundle
from clipship.serving.names import CLASSIFY, EMBED, of_vocabulary
from clipship.serving.transport import Tensors, config_json
from clipship.serving.vocabularies import refuse_others


class LocalTransport:
    """A :class:`~clipship.serving.transport.Transport` that serves ``bundle`` by itself; it decodes on the client only.

    Args:
        others: bundles with the same image encoder, whose vocabularies are served too, by their names.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: a number is below 1, a bundle of ``others`` has another encoder, or nothing here runs ``precision``.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: Precision = "fp32",
        max_batch_size: int = 64,
        top_k: int = 5,
        others: Mapping[str, Bundle] | None = None,
    ) -> None:
        try:
            from onnxruntime import InferenceSession
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export") from error
        form = bundle.fastest_encoder(precision, _runtimes(), processor=this_processor())
        refuse_others(bundle, others or {}, form)
        facts = facts_from_bundle(bundle, max_batch_size=max_batch_size, top_k=top_k, encoder=form, others=others)
        self.url = str(bundle.path)
        self.on_this_machine = True
        self._configs = {name: config_json(each) for name, each in configs_from_facts(facts, "onnxruntime").items()}
        self._encode = open_encoder(str(bundle.path / form.file), form.runtime, form.precision)
        self._classifiers: dict[str, Any] = {}
        for each, source in zip(facts.vocabularies, (bundle, *(others or {}).values()), strict=True):
            graph = classifier_graph(source.vocabulary, source.vocabulary_features(), each.top_k)
            session = InferenceSession(graph, providers=["CPUExecutionProvider"])
            self._classifiers[of_vocabulary(CLASSIFY, each.name)] = session
        self._image = image_tensor(facts.image_spec.size_px).name
        self._embedding = embedding_tensor(facts.embed_dim).name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipship-local")

    def infer(
        self,
        model: str,
        inputs: Tensors,
        outputs: Sequence[str],
        *,
        timeout_s: float,
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Future[Tensors]:
        """See :meth:`Transport.infer`; requests run one after the other, without a time limit."""
        if model != EMBED and model not in self._classifiers:
            refused: Future[Tensors] = Future()
            refused.set_exception(ModelsMissing(f"{self.url}: {model} needs a server: decode on the client"))
            return refused
        return self._thread.submit(self._answer, model, inputs, outputs)

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        if model not in self._configs:
            raise ModelsMissing(f"{self.url}: no model {model!r}")
        return self._configs[model]

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return sorted(self._configs)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._thread.shutdown()

    def _answer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        embedding = self._encode(inputs[self._image])
        answer = {self._embedding: embedding}
        classes = [name for name in outputs if name != self._embedding]
        if classes:
            answer.update(zip(classes, self._classifiers[model].run(classes, answer), strict=True))
        # ONNX Runtime gives str, a server gives bytes
        return {name: _as_bytes(answer[name]) if answer[name].dtype.kind in "OU" else answer[name] for name in outputs}


def _runtimes() -> tuple[Runtime, ...]:
    """What can run a form of the image encoder in this process."""
    has_openvino = importlib.util.find_spec("openvino") is not None
    return ("onnx", "openvino") if has_openvino else ("onnx",)


def _as_bytes(strings: Any) -> Any:
    import numpy as np

    return np.array([text.encode() for text in strings.ravel()], np.object_).reshape(strings.shape)
