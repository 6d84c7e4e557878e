"""Triton's model configurations: dict -> protobuf -> ``config.pbtxt``, and back.

Everything is explicit, because the server runs with ``--disable-auto-complete-config``. The message class is the one
that ``tritonclient`` ships (``model_config.proto``), so a misspelt field cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipship.core.tensors import TensorSpec
from clipship.serving.errors import RepositoryError

TRITON_TYPES = {"uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "float32": "TYPE_FP32", "string": "TYPE_STRING"}
"""Triton's name of each dtype a :class:`TensorSpec` may have."""

_HEADER = "# Written by `clipship repository`; checked by `clipship serve`.\n"


def type_and_dims(tensor: TensorSpec) -> dict[str, Any]:
    """Triton's type of a tensor, and its shape without the batch axis, which ``max_batch_size`` stands for."""
    dims = [-1 if isinstance(size, str) else size for size in tensor.shape[1:]]
    return {"data_type": TRITON_TYPES[tensor.dtype], "dims": dims}


def config_from_fields(fields: Mapping[str, Any]) -> Any:
    """The ``inference.ModelConfig`` message with ``fields``, by the names in model_config.proto; None: not set.

    Raises:
        google.protobuf.json_format.ParseError: the message has no such field.
    """
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    return json_format.ParseDict(fields, model_config_pb2.ModelConfig())


def text_from_config(config: Any) -> str:
    """The text of ``config.pbtxt``; map entries come sorted, so equal configurations give equal text."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, as_utf8=True)
    return _HEADER + text


def config_from_text(text: str) -> Any:
    """The inverse of :func:`text_from_config`.

    Raises:
        ValueError: not the text form of a model configuration; says the line and column.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"not a model configuration: {error}") from error


def read_config(folder: Path) -> Any:
    """The configuration of the model in ``folder``.

    Raises:
        RepositoryError: it is missing or malformed.
    """
    path = folder / "config.pbtxt"
    try:
        return config_from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path}: cannot be read ({error}): write it again with clipship repository") from error
