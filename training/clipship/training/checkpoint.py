"""A checkpoint: the learned tensors and everything that is needed to use or repeat them.

A folder with ``learned.safetensors`` (learned tensors only) and ``checkpoint.json`` (settings, class names, the base
model's digest, losses, scores, tool versions). It is written whole or not at all, and read strictly.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from clipship.core.errors import CheckpointError, RecipeError
from clipship.core.files import read_record, replace_folder, sha256_of, write_json_atomic
from clipship.training.config import Settings, TrainConfig
from clipship.training.methods import METHODS, Method, Task, build_method, config_of, method_named
from clipship.training.model.clip import Clip, load_clip

FORMAT = "clipship-checkpoint"
FORMAT_VERSION = 2
LEARNED = "learned.safetensors"
RECORD = "checkpoint.json"
GENERATOR = "generator"
"""The folder below a checkpoint's that holds the checkpoint of its feature generator, if the run learned one."""
_PLAIN = (*("dataset", "data_digest", "base_model_digest", "selection", "notes", "calibration", "scores", "versions"),)
"""Fields that the record holds unchanged."""


def tool_versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("clipship", "torch", "open_clip_torch", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a finished run leaves."""

    config: TrainConfig
    task: Task
    """All class names of the data set, how many are base classes, its templates."""
    dataset: str
    """The data set's name."""
    data_digest: str
    """SHA-256 over the real training images' names and labels."""
    base_model_digest: str
    """SHA-256 over the frozen model's tensors."""
    learned: Mapping[str, Tensor]
    """Learned tensors by name; none for zero-shot."""
    losses: Sequence[Mapping[str, float]] = ()
    """One record an epoch: learning rate and mean losses."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """What the method measured besides its losses."""
    selection: str = "last step"
    """The rule by which the weights were kept. Never: those that are best on the test images."""
    calibration: Mapping[str, Any] | None = None
    """The temperature of its probabilities, fitted on validation images, and what it changed."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """What ``clipship evaluate`` found, by the name of the data set."""
    versions: Mapping[str, str] = field(default_factory=tool_versions)

    @property
    def temperature(self) -> float | None:
        """What logits are divided by before the softmax, for calibrated probabilities."""
        return None if self.calibration is None else float(self.calibration["temperature"])

    def to_json(self) -> dict[str, Any]:
        """``checkpoint.json`` without the digest of the tensors' file."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": self.config.to_json(),
            "seed": self.config.seed,
            "base_model": self.config.base_model,
            **asdict(self.task),
            **{name: getattr(self, name) for name in _PLAIN},
            "losses": list(self.losses),
        }


def config_from_json(content: Mapping[str, Any]) -> TrainConfig:
    """The inverse of :meth:`TrainConfig.to_json`, and of the form that versions up to 0.5 wrote.

    Those wrote the settings of all methods; the other methods' are left out. The oldest lack those of synthetic images.

    Raises:
        RecipeError: a setting is missing, unknown or out of range, or the method is unknown.
    """
    content = {**_ADDED_LATER, **content}
    own = {*_names(TrainConfig), *_names(method_named(content.get("method", "")).settings_type)} - {"settings"}
    of_any_method = {name for method in METHODS.values() for name in _names(method.settings_type)}
    odd = sorted((own - set(content)) | (set(content) - own - of_any_method))
    if odd:
        raise RecipeError(f"not the settings of a run: {', '.join(odd)} missing or unknown: train again")
    values: dict[str, Any] = {name: content[name] for name in own}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    generator = None if content["generator"] is None else config_from_json(content["generator"])
    return config_of(**{**values, "generator": generator})


_ADDED_LATER = {"synthetic_shots": None, "synthetic_filter": True}
"""What the settings that the oldest checkpoints lack were then."""


def _names(settings: type[Settings]) -> set[str]:
    return {one.name for one in fields(settings)}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to the folder ``path``, replacing what the run has left there."""
    from safetensors.torch import save

    with replace_folder(path) as folder:
        (folder / LEARNED).write_bytes(save(dict(checkpoint.learned)))  # save_file would let only the owner read it
        digest = sha256_of(folder / LEARNED)
        write_json_atomic(folder / RECORD, {**checkpoint.to_json(), "learned_sha256": digest})
        if (path / GENERATOR).is_dir():
            shutil.copytree(path / GENERATOR, folder / GENERATOR)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint in the folder ``path``.

    Raises:
        CheckpointError: none there, another format version, a malformed record, or tensors that are not the ones it was
            written with.
    """
    from safetensors.torch import load_file

    content = _record_in(path)
    if not (path / LEARNED).is_file() or sha256_of(path / LEARNED) != content.get("learned_sha256"):
        raise CheckpointError(f"{path}: {LEARNED} is missing or has changed: copy the checkpoint again, or train again")
    try:
        return Checkpoint(
            config=config_from_json(content["config"]),
            task=Task(
                class_names=tuple(content["class_names"]),
                num_base=content["num_base"],
                templates=tuple(content["templates"]),
            ),
            learned=load_file(path / LEARNED),
            losses=tuple(content["losses"]),
            **{name: content[name] for name in _PLAIN},
        )
    except (KeyError, TypeError, RecipeError) as error:
        raise CheckpointError(f"{path / RECORD} is malformed ({error}): train again") from error


def _record_in(path: Path) -> dict[str, Any]:
    record = path / RECORD
    if not record.is_file():
        raise CheckpointError(f"{path}: no checkpoint there ({RECORD} is missing): write one with clipship train")
    advice = "copy the checkpoint again, or train again with this version"
    return read_record(record, record_format=FORMAT, version=FORMAT_VERSION, error=CheckpointError, advice=advice)


def save_scores(path: Path, dataset: str, scores: Mapping[str, Any]) -> None:
    """Put the ``scores`` on the data set of that name into the record of the checkpoint in the folder ``path``."""
    record = _record_in(path)
    write_json_atomic(path / RECORD, {**record, "scores": {**record["scores"], dataset: dict(scores)}})


def method_from_checkpoint(checkpoint: Checkpoint, clip: Clip | None = None) -> Method:
    """The trained method, in evaluation mode, on ``clip`` (default: the base model, loaded by its name).

    Raises:
        CheckpointError: another base model, or tensors that are missing, unknown or of another shape.
        RecipeError: the base model cannot be loaded.
    """
    clip = clip or load_clip(checkpoint.config.base_model)
    if clip.digest != checkpoint.base_model_digest:
        raise CheckpointError(
            f"the checkpoint was trained on {checkpoint.config.base_model} with digest "
            f"{checkpoint.base_model_digest[:12]}, {clip.name} has {clip.digest[:12]}: load the model it was trained on"
        )
    method = build_method(clip, checkpoint.config, checkpoint.task)
    load_learned(method, checkpoint.learned)
    return method.eval()


def load_learned(method: Method, learned: Mapping[str, Tensor]) -> None:
    """Put ``learned`` into ``method``; every tensor must be there with its shape and type, and no other.

    Raises:
        CheckpointError: they do not fit.
    """
    wanted = {name: (tuple(value.shape), str(value.dtype)) for name, value in method.state_dict().items()}
    given = {name: (tuple(value.shape), str(value.dtype)) for name, value in learned.items()}
    odd = [name for name in sorted({*wanted, *given}) if wanted.get(name) != given.get(name)]
    if odd:
        name = odd[0]
        raise CheckpointError(
            f"learned tensor {name!r} is {given.get(name, 'missing')}, {method.name} takes {wanted.get(name, 'none')}: "
            "load the checkpoint of these settings"
        )
    method.load_state_dict(dict(learned))
