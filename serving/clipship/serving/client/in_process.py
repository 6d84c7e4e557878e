"""A server's models in this process: the same client, answered by ONNX Runtime or OpenVINO.

>>> with Classifier(LocalTransport(read_bundle(Path("bundles/prints")))) as classifier:
...     classifier.classify(["photo.jpg"])

It runs the graphs that a repository would contain, so its answers are the server's. The bundle's golden samples are
verified first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Unpack

import numpy as np
import PIL
from numpy.typing import NDArray

from clipship.core.bundle import GOLDEN, Bundle, Golden, Runtime
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.images.decoding import ImageDecodeError, pixels_from_bytes
from clipship.core.machine.processor import this_processor
from clipship.core.machine.runtimes import available_cores, open_encoder, runtime_name
from clipship.core.precisions import Precision
from clipship.core.tensors import embedding_tensor, image_tensor
from clipship.core.tolerances import advice, encoder_problem, pixels_problem
from clipship.serving.errors import ModelsMissing
from clipship.serving.model_names import CLASSIFY, EMBED, of_vocabulary
from clipship.serving.repository.backends import ONNXRUNTIME
from clipship.serving.repository.classifier_graph import classifier_graph
from clipship.serving.repository.golden_check import validate_classifier_model
from clipship.serving.repository.golden_samples import FILES, truth_from_bundle
from clipship.serving.repository.models import configs_from_settings, model_settings_from_bundle
from clipship.serving.repository.vocabularies import validate_same_encoder
from clipship.serving.transport.base import CallOptions, Tensors, config_json


class LocalTransport:
    """A :class:`~clipship.serving.transport.base.Transport` that runs ``bundle`` in this process.

    Images are decoded by the client only.

    Args:
        others: bundles with the same image encoder, whose vocabularies are served too, by their names.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: a number is below 1, a bundle of ``others`` has another encoder, or nothing here runs ``precision``.
        CheckFailed: golden samples come out otherwise than the bundle says; names the variant, its precision, the
            runtime and the processor, and what to do.
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
            raise MissingExtraError("onnxruntime", "serving") from error
        variant = bundle.fastest_encoder(precision, _runtimes(), processor=this_processor())
        validate_same_encoder(bundle, others or {}, variant)
        settings = model_settings_from_bundle(
            bundle, max_batch_size=max_batch_size, top_k=top_k, encoder=variant, others=others
        )
        self.url = str(bundle.path)
        self.on_this_machine = True
        self._configs = {name: config_json(each) for name, each in configs_from_settings(settings, ONNXRUNTIME).items()}
        self._encode = open_encoder(str(bundle.path / variant.file), variant.runtime, variant.precision)
        self._variant, self._golden, self._verified = variant, bundle.golden(), set[bool]()
        self._image = image_tensor(settings.image_spec.size_px).name
        self._embedding = embedding_tensor(settings.embed_dim).name
        self._validate_encoder(few=False)
        _validate_decoder(bundle, self._golden)
        self._classifiers: dict[str, Any] = {}
        for each, source in zip(settings.vocabularies, (bundle, *(others or {}).values()), strict=True):
            graph = classifier_graph(source.vocabulary, source.vocabulary_features(), each.top_k)
            session = InferenceSession(graph, providers=["CPUExecutionProvider"])
            model = of_vocabulary(CLASSIFY, each.name)
            self._classifiers[model] = session
            validate_classifier_model(self._classify, model, truth_from_bundle(source))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipship-local")

    def infer(
        self, model: str, inputs: Tensors, outputs: Sequence[str], **options: Unpack[CallOptions]
    ) -> Future[Tensors]:
        """See :meth:`Transport.infer`; requests run one after the other, without a timeout."""
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
        pixels = inputs[self._image]
        self._validate_encoder(few=len(pixels) < available_cores())
        embedding = self._encode(pixels)
        classes = [name for name in outputs if name != self._embedding]
        answer = self._classify(model, self._embedding, embedding, classes) if classes else {}
        return {name: embedding if name == self._embedding else answer[name] for name in outputs}

    def _classify(self, model: str, name: str, rows: NDArray[np.float32], outputs: Sequence[str]) -> Tensors:
        answer = dict(zip(outputs, self._classifiers[model].run(list(outputs), {name: rows}), strict=True))
        # ONNX Runtime gives str, a server gives bytes
        return {name: _as_bytes(array) if array.dtype.kind in "OU" else array for name, array in answer.items()}

    def _validate_encoder(self, *, few: bool) -> None:
        """Verify the golden samples, in one batch with at least as many rows as cores, or with fewer.

        The runtimes compute batches of fewer rows than cores by other code, and OpenVINO compiles it on demand: larger
        batches are verified at the start, smaller ones before the first is answered.
        """
        if few in self._verified:
            return
        golden, variant = self._golden, self._variant
        count = 1 if few else max(len(golden.pixels), available_cores())
        problem = encoder_problem(self._encode, golden.pixels, golden.embedding, variant.precision, count)
        if problem:
            runtime = runtime_name(variant.runtime)
            raise CheckFailed(
                f"{self.url}/{variant.file} ({variant.precision}) by {runtime} on {this_processor()} "
                f"answers wrongly: {problem}: {advice(variant.precision)}"
            )
        self._verified.add(few)


def _validate_decoder(bundle: Bundle, golden: Golden) -> None:
    """Verify that this process decodes the bundle's first golden images to the same pixels."""
    files = [(bundle.path / GOLDEN / name).read_bytes() for name in golden.files[:FILES]]
    try:
        pixels = np.stack([pixels_from_bytes(data, bundle.image_spec) for data in files])
        problem = pixels_problem(golden.pixels[:FILES], pixels)
    except ImageDecodeError as error:
        problem = str(error)
    if problem:
        raise CheckFailed(
            f"{bundle.path}: Pillow {PIL.__version__} decodes its golden images wrongly: {problem}: install the Pillow "
            "that packed the bundle"
        )


def _runtimes() -> tuple[Runtime, ...]:
    """What can run a variant of the image encoder in this process."""
    has_openvino = importlib.util.find_spec("openvino") is not None
    return ("onnx", "openvino") if has_openvino else ("onnx",)


def _as_bytes(strings: Any) -> Any:
    return np.array([text.encode() for text in strings.ravel()], np.object_).reshape(strings.shape)
