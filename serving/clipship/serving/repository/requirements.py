"""What a repository's models require of the server that loads them, read from their configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from clipship.serving.errors import RepositoryError
from clipship.serving.model_names import (
    ADMISSION,
    ENCODER,
    OPSET,
    PIXELS_ADMISSION,
    PRECISION,
    PREPROCESS,
    RUNTIME,
    TENSORRT_VERSION,
    VERSION_COMPATIBLE,
)
from clipship.serving.repository.backends import BACKENDS, PYTHON
from clipship.serving.repository.config_pbtxt import config_from_text

_TYPE_BYTES = {2: 1, 9: 8, 11: 4}
"""Of TYPE_UINT8, TYPE_INT64 and TYPE_FP32, by their numbers in model_config.proto."""
_WITHOUT_ONNXRUNTIME = (PREPROCESS, ADMISSION, PIXELS_ADMISSION)


def read_configs(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The configurations of the repository at ``path`` by folder, and by folder what is wrong with the others.

    Raises:
        RepositoryError: there is no repository at ``path``.
    """
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    if not folders:
        raise RepositoryError(f"{path}: no model repository there: write one with clipship repository")
    configs: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for folder in folders:
        try:
            configs[folder.name] = config_from_text((folder / "config.pbtxt").read_text(encoding="utf-8"))
        except FileNotFoundError:
            problems[folder.name] = "config.pbtxt is missing"
        except ValueError as error:
            problems[folder.name] = f"config.pbtxt: {error}"
    return configs, problems


class Requirements:
    """What the models of the repository at ``path`` require.

    Raises:
        RepositoryError: there is no repository at ``path``.
    """

    def __init__(self, path: Path) -> None:
        self._configs: Mapping[str, Any] = read_configs(path)[0]

    @property
    def backends(self) -> set[str]:
        """Backends by Triton's names."""
        return {config.backend for config in self._configs.values() if config.platform != "ensemble"}

    @property
    def tensorrt_version(self) -> str | None:
        """The TensorRT version of the plans; None without plans."""
        return self._parameter(TENSORRT_VERSION)

    @property
    def version_compatible_plans(self) -> str | None:
        """How many plans also run in later TensorRT versions: "all", "some" or None."""
        return self._parameter(VERSION_COMPATIBLE)

    @property
    def opset(self) -> tuple[int, str] | None:
        """Opset and precision of the image encoder where Triton's own ONNX Runtime loads it and they are recorded."""
        encoder = self._configs.get(ENCODER)
        backend = None if encoder is None else BACKENDS.get(encoder.backend)
        if encoder is None or backend is None or not backend.triton_runs_onnx or OPSET not in encoder.parameters:
            return None
        return int(encoder.parameters[OPSET].string_value), encoder.parameters[PRECISION].string_value

    @cached_property
    def accelerator(self) -> dict[str, str]:
        """Parameters of the TensorRT accelerator, which builds engines while a model loads; empty without one."""
        optimizations = [config.optimization.execution_accelerators for config in self._configs.values()]
        accelerators = (one for each in optimizations for one in each.gpu_execution_accelerator)
        return next((dict(one.parameters) for one in accelerators), {})

    @property
    def engine_cache(self) -> str | None:
        """The folder where the TensorRT accelerator keeps its engines."""
        return self.accelerator.get("trt_engine_cache_path")

    @property
    def response_cache(self) -> bool:
        """Whether a model answers from the server's response cache."""
        return any(config.response_cache.enable for config in self._configs.values())

    @property
    def uses_gpu(self) -> bool:
        """Whether a model runs on a GPU where the machine has one."""
        return bool(self._instance_kinds & {"KIND_GPU", "KIND_AUTO"})

    @property
    def needs_gpu(self) -> bool:
        """Whether a model does not run without a GPU."""
        return "KIND_GPU" in self._instance_kinds

    @cached_property
    def _instance_kinds(self) -> set[str]:
        groups = [group for config in self._configs.values() for group in config.instance_group]
        return {group.Kind.Name(group.kind) for group in groups}

    @property
    def largest_message_bytes(self) -> int:
        """The largest sum of a Python model's inputs and outputs for a full batch, without strings."""
        return max((_message_bytes(config) for config in self._in_python.values()), default=0)

    @property
    def packages(self) -> tuple[str, ...]:
        """Python packages that the models need besides ONNX Runtime and Pillow."""
        return ("openvino",) if self._parameter(RUNTIME, "openvino") else ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that the models in Python import."""
        graphs = set(self._in_python) - set(_WITHOUT_ONNXRUNTIME)
        return ("numpy", "PIL", *(["onnxruntime"] if graphs else []), *self.packages)

    @property
    def _in_python(self) -> dict[str, Any]:
        return {name: config for name, config in self._configs.items() if config.backend == PYTHON.name}

    def _parameter(self, name: str, value: str | None = None) -> str | None:
        """The value of a parameter in the models that have it; where ``value`` is given, only if one has that."""
        values = {
            config.parameters[name].string_value for config in self._configs.values() if name in config.parameters
        }
        return next((each for each in sorted(values) if value in (None, each)), None)


def _message_bytes(config: Any) -> int:
    tensors = (*config.input, *config.output)
    sizes = (_TYPE_BYTES.get(tensor.data_type, 0) * math.prod(map(abs, tensor.dims)) for tensor in tensors)
    return int(max(1, config.max_batch_size) * sum(sizes))


def model_names(path: Path) -> list[str]:
    """The models of the repository at ``path``, sorted."""
    return sorted(file.parent.name for file in path.glob("*/config.pbtxt"))
