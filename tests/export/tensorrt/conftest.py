"""A bundle of the small random CLIP with a variant in every precision, and TensorRT-RTX where it is installed."""

from __future__ import annotations

import onnx
import pytest

from clipship.core.bundle import Bundle, EncoderVariant
from clipship.core.precisions import Precision
from clipship.core.vocabulary import Vocabulary
from clipship.export.pack import bundle_from_method
from clipship.export.reference import Picture
from clipship.export.tensorrt.runtime import Loaded, load_runtime
from clipship.training.model.clip import Clip
from tests.export.conftest import NAMES, method_of
from tests.export.tensorrt.graphs import typed, with_variants

TYPED: tuple[Precision, ...] = ("fp16", "bf16", "int8")


@pytest.fixture(scope="session")
def bundle(clip: Clip, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles")
    words = Vocabulary(names=NAMES)
    plain = bundle_from_method(method_of(clip, "sync-clip"), words, pictures, folder / "plain", provenance={})
    model = onnx.load(plain.image_encoder)
    variants = [
        (
            EncoderVariant(file=f"image_encoder.{precision}.onnx", precision=precision, runtime="onnx", opset=18),
            typed(model, precision).SerializeToString(),
        )
        for precision in TYPED
    ]
    return with_variants(plain, folder / "typed", variants)


@pytest.fixture(scope="session")
def rtx() -> Loaded:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'clipship[tensorrt-rtx]'")
    return load_runtime("tensorrt-rtx")
