"""The methods by name. Each is a module of its own: settings, learned tensors and a loss, never a training loop.

Modules of this folder are found by themselves: each subclass of :class:`Method` with its own ``name`` is a method.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any

from clipship.core.errors import RecipeError, near
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Batch, FeatureGenerator, ImageSet, Method, Partners, Source, Task
from clipship.training.model.clip import Clip

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def _subclasses(of: type[Method]) -> Iterator[type[Method]]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)


METHODS: dict[str, type[Method]] = {one.name: one for one in _subclasses(Method) if "name" in vars(one)}


def method_named(name: str) -> type[Method]:
    """The method's class.

    Raises:
        RecipeError: unknown name.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}: {near(name, METHODS)}")
    return METHODS[name]


def build_method(clip: Clip, config: TrainConfig, task: Task) -> Method:
    """A fresh method on the device of ``clip``, initialised from ``config.seed``.

    Raises:
        RecipeError: an unknown method, settings of another one, or such that the model cannot take.
    """
    method = method_named(config.method)
    if type(config.settings) is not method.settings_type:
        given, taken = type(config.settings).__name__, method.settings_type.__name__
        raise RecipeError(f"recipe {config.recipe}: method {config.method} takes {taken}, not {given}")
    return method(clip, config, task).to(clip.device)


def config_of(method: str, **settings: Any) -> TrainConfig:
    """The run of ``method`` with these settings, the run's and the method's own alike.

    Raises:
        RecipeError: unknown method, or a setting out of range.
    """
    own = method_named(method).settings_type
    names = {one.name for one in fields(own)} & settings.keys()
    return TrainConfig(method=method, settings=own(**{name: settings.pop(name) for name in names}), **settings)


__all__ = [
    "METHODS",
    "Batch",
    "FeatureGenerator",
    "ImageSet",
    "Method",
    "Partners",
    "Source",
    "Task",
    "build_method",
    "config_of",
    "method_named",
]
