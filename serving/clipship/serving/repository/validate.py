"""Validates a model repository by Triton's rules, without Triton.

The rules are those of Triton 2.51 with ``--disable-auto-complete-config``; a slow test checks each against the real
server. One is stricter: see :data:`STRICTER`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from clipship.serving.errors import RepositoryError
from clipship.serving.repository.backends import BACKENDS
from clipship.serving.repository.requirements import read_configs

STRICTER = "dynamic_batching needs a max_batch_size above 0"
"""Our own rule: Triton would load such a model, and not batch."""

_SHOWN = 5


def repository_problems(path: Path) -> list[str]:
    """Every reason why Triton would not load the repository at ``path``, as "model: reason".

    Raises:
        RepositoryError: there is no repository at ``path``.
    """
    configs, unreadable = read_configs(path)
    problems = [f"{folder}: {message}" for folder, message in unreadable.items()]
    for folder, config in configs.items():
        rules = _ENSEMBLE_RULES if config.platform == "ensemble" else _MODEL_RULES
        for rule in (*_COMMON_RULES, *rules):
            problems += [f"{folder}: {message}" for message in rule(config, path / folder, configs)]
    return problems + list(_cycles(configs))


def validate_repository(path: Path) -> None:
    """Validate that Triton would load the repository at ``path``.

    Raises:
        RepositoryError: it would not; names the first few problems.
    """
    problems = repository_problems(path)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "; ".join(problems[:_SHOWN])
        raise RepositoryError(f"Triton would not load {path}: {listed}{more}: write it again with clipship repository")


Rule = Callable[[Any, Path, Mapping[str, Any]], Iterable[str]]
"""``rule(config, folder, all configs)``: messages of what is wrong with one model."""


def _name(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    if config.name != folder.name:
        yield f"its name is {config.name!r}, and must be that of its folder"


def _tensors(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            yield f"it has no {kind}"
        repeated = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
        yield from (f"{kind} {name!r} occurs twice" for name in repeated)
        for tensor in tensors:
            yield from _tensor(kind, tensor)


def _tensor(kind: str, tensor: Any) -> Iterator[str]:
    if not tensor.name:
        yield f"an {kind} has no name"
    if tensor.data_type == 0:
        yield f"{kind} {tensor.name!r} has no data_type"
    if not tensor.dims or any(size == 0 or size < -1 for size in tensor.dims):
        yield f"{kind} {tensor.name!r} has dims {list(tensor.dims)}: give positive sizes, or -1 for a free one"


def _batch_size(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}: give 0 or more"
    if config.max_batch_size == 0 and config.HasField("dynamic_batching"):
        yield STRICTER


def _versions(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    """Every kind of model needs a folder named by a positive number, and those that its version policy names."""
    if not _version_folders(folder):
        yield "it has no version folder (1/)"
    elif not _served_folders(config, folder):
        named = ", ".join(map(str, config.version_policy.specific.versions))
        yield f"its version_policy names versions that do not exist ({named})"


def _version_folders(folder: Path) -> list[Path]:
    """By their numbers, ascending."""
    children = [child for child in folder.iterdir() if child.is_dir() and child.name.isdecimal()]
    return sorted((child for child in children if int(child.name) > 0), key=lambda child: int(child.name))


def _served_folders(config: Any, folder: Path) -> list[Path]:
    """The versions that the version policy selects; Triton ignores the others."""
    folders, policy = _version_folders(folder), config.version_policy
    if policy.HasField("specific"):
        return [each for each in folders if int(each.name) in policy.specific.versions]
    return folders if policy.HasField("all") else folders[-(policy.latest.num_versions or 1) :]


def _batching(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            yield f"dynamic_batching prefers batches of {size}: give 1 to max_batch_size, {config.max_batch_size}"


def _model_files(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    if config.backend not in BACKENDS:
        yield f"backend {config.backend!r} is not one of {', '.join(BACKENDS)}"
        return
    usual = config.default_model_filename or BACKENDS[config.backend].model_file
    for version in _served_folders(config, folder):
        for file_name in sorted({usual, *config.cc_model_filenames.values()}):
            if not (version / file_name).is_file():
                yield f"{version.name}/{file_name} is missing"


def _warmups(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    inputs = {tensor.name: tensor for tensor in config.input}
    for warmup in config.model_warmup:
        where = f"warm-up {warmup.name!r}"
        if not 1 <= warmup.batch_size <= max(1, config.max_batch_size):
            yield f"{where} has batch size {warmup.batch_size}, the model at most {config.max_batch_size}"
        if set(warmup.inputs) != set(inputs):
            yield f"{where} feeds {sorted(warmup.inputs)}, the model takes {sorted(inputs)}"
        for name, sample in warmup.inputs.items():
            yield from _warmup_input(f"{where}, input {name!r}", sample, inputs.get(name), folder)


def _warmup_input(where: str, sample: Any, tensor: Any, folder: Path) -> Iterator[str]:
    if tensor is not None and (sample.data_type != tensor.data_type or not _dims_fit(sample.dims, tensor.dims)):
        yield f"{where}: type or dims differ from the model's"
    if any(size < 1 for size in sample.dims):
        yield f"{where}: dims {list(sample.dims)} must all be positive"
    if sample.HasField("input_data_file") and not (folder / "warmup" / sample.input_data_file).is_file():
        yield f"{where}: warmup/{sample.input_data_file} is missing"


def _dims_fit(first: Iterable[int], second: Iterable[int]) -> bool:
    """Whether two shapes can be the same: equal rank, and equal sizes where both are fixed."""
    one, other = list(first), list(second)
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _forbidden(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    fields = {
        "instance_group": len(config.instance_group) > 0,
        "optimization": config.HasField("optimization"),
        "model_warmup": len(config.model_warmup) > 0,
        "dynamic_batching": config.HasField("dynamic_batching"),
        "sequence_batching": config.HasField("sequence_batching"),
    }
    yield from (f"an ensemble must not have {name}" for name, present in fields.items() if present)
    if not config.ensemble_scheduling.step:
        yield "an ensemble must have at least one step"


def _steps(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    """Each step's model exists, takes the ensemble's batches, and has all its inputs fed."""
    for position, step in enumerate(config.ensemble_scheduling.step, start=1):
        where = f"step {position} ({step.model_name})"
        model = configs.get(step.model_name)
        if model is None:
            yield f"{where}: no such model"
            continue
        if config.max_batch_size > model.max_batch_size:
            yield f"{where}: max_batch_size {model.max_batch_size} is below the ensemble's {config.max_batch_size}"
        inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (model.input, model.output))
        yield from (f"{where}: its input {name!r} is not fed" for name in sorted(inputs - set(step.input_map)))
        yield from (f"{where}: it has no input {name!r}" for name in sorted(set(step.input_map) - inputs))
        yield from (f"{where}: it has no output {name!r}" for name in sorted(set(step.output_map) - outputs))


def _data_flow(config: Any, folder: Path, configs: Mapping[str, Any]) -> Iterator[str]:
    """Each tensor has one producer, and all who use it agree on its type and dims."""
    produced = [(tensor.name, "the ensemble's input", tensor) for tensor in config.input]
    consumed = [(tensor.name, "the ensemble's output", tensor) for tensor in config.output]
    for step in config.ensemble_scheduling.step:
        if (model := configs.get(step.model_name)) is not None:
            for uses, tensors, names in (
                (consumed, model.input, step.input_map),
                (produced, model.output, step.output_map),
            ):
                mapped = [tensor for tensor in tensors if tensor.name in names]
                uses += [(names[tensor.name], f"{step.model_name}'s {tensor.name}", tensor) for tensor in mapped]
    producers: dict[str, tuple[str, Any]] = {}
    for name, where, tensor in produced:
        if name in producers:
            yield f"tensor {name!r} has two producers: {producers[name][0]} and {where}"
        producers.setdefault(name, (where, tensor))
    for name, where, tensor in consumed:
        if name not in producers:
            yield f"tensor {name!r}, which is {where}, has no producer"
            continue
        source, declared = producers[name]
        if declared.data_type != tensor.data_type or not _dims_fit(declared.dims, tensor.dims):
            yield f"tensor {name!r}: {source} and {where} differ in type or dims"


def _cycles(configs: Mapping[str, Any]) -> Iterator[str]:
    """An ensemble that contains itself, directly or through others."""
    steps = {name: {step.model_name for step in config.ensemble_scheduling.step} for name, config in configs.items()}
    try:
        TopologicalSorter(steps).prepare()
    except CycleError as error:
        yield f"{error.args[1][0]}: the ensemble holds itself"


_COMMON_RULES: tuple[Rule, ...] = (_name, _tensors, _batch_size, _versions)
_MODEL_RULES: tuple[Rule, ...] = (_model_files, _warmups, _batching)
_ENSEMBLE_RULES: tuple[Rule, ...] = (_forbidden, _steps, _data_flow)
