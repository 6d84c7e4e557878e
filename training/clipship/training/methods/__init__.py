"""The methods by name. Each is a module of its own: learned tensors and a loss, never a training loop."""

from __future__ import annotations

from clipship.core.errors import RecipeError, near
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Batch, FeatureGenerator, FeatureSamples, Method, Source, Task
from clipship.training.methods.clip_adapter import ClipAdapter
from clipship.training.methods.cocoop import CoCoOp
from clipship.training.methods.coop import CoOp
from clipship.training.methods.ivlp import Ivlp
from clipship.training.methods.ivlp_synthetic import IvlpSynthetic
from clipship.training.methods.kgcoop import KgCoOp
from clipship.training.methods.linear_probe import LinearProbe
from clipship.training.methods.maple import Maple
from clipship.training.methods.promptsrc import PromptSrc
from clipship.training.methods.ship import ShipGenerator
from clipship.training.methods.sync_clip import SyncClip
from clipship.training.methods.tip_adapter import TipAdapter, TipAdapterF
from clipship.training.methods.vpt import Vpt
from clipship.training.methods.zero_shot import ZeroShot
from clipship.training.model.clip import Clip

_METHODS: tuple[type[Method], ...] = (
    *(ZeroShot, CoOp, CoCoOp, KgCoOp),
    *(Vpt, Ivlp, IvlpSynthetic, Maple, PromptSrc, SyncClip),
    *(ClipAdapter, TipAdapter, TipAdapterF, LinearProbe, ShipGenerator),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _METHODS}


def method_named(name: str) -> type[Method]:
    """The method's class.

    Raises:
        RecipeError: unknown name.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}: {near(name, METHODS)}")
    return METHODS[name]


def build_method(clip: Clip, config: TrainConfig, task: Task) -> Method:
    """A fresh method of ``config.method``, initialised from ``config.seed``, its learned tensors where ``clip`` lives.

    Raises:
        RecipeError: an unknown method, or settings the model cannot take.
    """
    return method_named(config.method)(clip, config, task).to(clip.device)


__all__ = [
    "METHODS",
    "Batch",
    "CoOp",
    "FeatureGenerator",
    "FeatureSamples",
    "Method",
    "Source",
    "SyncClip",
    "Task",
    "ZeroShot",
    "build_method",
    "method_named",
]
