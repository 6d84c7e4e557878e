"""Tip-Adapter and Tip-Adapter-F: a cache of few-shot features votes beside CLIP's logits (arXiv 2207.09519).

Shapes: N images, C classes, K keys, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipship.core.classification import Cache, VocabularyFeatures
from clipship.core.errors import DataError, RecipeError
from clipship.training.config import Settings, TrainConfig, at_least
from clipship.training.methods.base import Classify, ImageSet, Method, Source, Task
from clipship.training.model.clip import Clip

ALPHAS = tuple(0.1 + step * (3 - 0.1) / 20 for step in range(20))
BETAS = tuple(0.1 + step * (7 - 0.1) / 200 for step in range(200))
"""What is searched, for every data set: the authors' grid for ImageNet. Theirs for other data sets reach further."""


@dataclass(frozen=True, kw_only=True)
class TipAdapterSettings(Settings):
    """The cache, and the start of the search for its weights."""

    cache_alpha: float = at_least(0, 1.0)
    """The weight of the cache's votes beside CLIP's logits; start of the search."""
    cache_beta: float = at_least(0, 5.5)
    """How fast a vote falls with the distance to the key; start of the search."""
    cache_views: int = at_least(1, 10)
    """Augmented views of an image whose mean feature is its key."""
    generated_shots: int = at_least(0, 16)
    """Generated keys for each class without images."""


class TipAdapter(Method):
    """Logits ``s f W^T + alpha exp(-beta (1 - f F^T)) L``: keys F [K, D], votes L [K, C] one-hot by the keys' classes.

    Keys are the means of ``cache_views`` augmented views of the few-shot images, ``shots`` a class; a run with a
    generator adds ``generated_shots`` for each class without images. Classes without keys get no votes. alpha and beta
    are those with the best accuracy on the few-shot validation images. These show classes with real images only; with a
    generator they are classified among all classes. Without validation images the settings are kept.
    """

    name = "tip-adapter"
    settings_type = TipAdapterSettings
    settings: TipAdapterSettings
    selection = "alpha and beta on validation images"

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        if not config.shots:
            raise RecipeError(f"recipe {config.recipe}: shots=0: a cache has the same number of keys a class: give one")
        shots = [config.shots] * task.num_base
        if config.generator is not None:
            shots += [self.settings.generated_shots] * (len(task.class_names) - task.num_base)
        labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots, dtype=torch.long))
        self.register_buffer("key_labels", labels, persistent=False)
        self.register_buffer("alpha", torch.tensor(self.settings.cache_alpha))
        self.register_buffer("beta", torch.tensor(self.settings.cache_beta))
        self._register_keys(torch.zeros(len(labels), clip.embed_dim))

    key_labels: Tensor
    alpha: Tensor
    beta: Tensor
    keys: Tensor

    def _register_keys(self, keys: Tensor) -> None:
        self.register_buffer("keys", keys)

    def begin(self, source: Source) -> None:
        """Fill the cache.

        Raises:
            DataError: a class has another number of images than the settings require.
        """
        parts = [source.train(self.settings.cache_views)]
        if self.config.generator is not None and self.settings.generated_shots:
            generated = source.generated(self.settings.generated_shots)
            parts += [] if generated is None else [generated]
        labels = torch.cat([part.labels.to(self.key_labels.device) for part in parts])
        order = labels.argsort(stable=True)
        if not torch.equal(labels[order], self.key_labels):
            raise DataError(
                f"{len(labels)} images for a cache of {len(self.key_labels)} keys: every class needs "
                f"{self.config.shots} training images: lower --shots"
            )
        with torch.no_grad():
            self.keys.copy_(torch.cat([part.images.to(self.keys) for part in parts])[order])

    def end(self, source: Source) -> None:
        """Choose alpha and beta on the validation images, if there are any."""
        samples = source.validation()
        if len(samples.labels):
            alpha, beta, accuracy = self._best_weights(samples)
            self.alpha.fill_(alpha)
            self.beta.fill_(beta)
            self.notes["validation_accuracy"] = accuracy
        self.notes |= {"cache_alpha": float(self.alpha), "cache_beta": float(self.beta)}

    def classifier(self, names: Sequence[str]) -> Classify:
        """CLIP's logits plus the cache's votes; any names."""
        classes_CD = self.class_features(names)

        def classify(features: Tensor) -> Tensor:
            return self.logits(features, classes_CD) + self.alpha * self._votes(features, names, self.beta)

        return classify

    @torch.no_grad()
    def exported_classifier(self, names: Sequence[str]) -> VocabularyFeatures:
        """Class features and the keys of those classes that are among ``names``."""
        column_K = self._columns(names)
        cache = Cache(
            keys=self.keys[column_K >= 0].float().cpu().numpy(),
            labels=column_K[column_K >= 0].cpu().numpy(),
            alpha=float(self.alpha),
            beta=float(self.beta),
        )
        return replace(super().exported_classifier(names), cache=cache)

    def _columns(self, names: Sequence[str]) -> Tensor:
        """int64 [K]: the place in ``names`` of each key's class, -1 where it is not among them."""
        position = {name: place for place, name in enumerate(names)}
        columns = [position.get(name, -1) for name in self.task.class_names]
        return torch.tensor(columns, device=self.keys.device)[self.key_labels]

    def _votes(self, features_ND: Tensor, names: Sequence[str], beta: Tensor | float) -> Tensor:
        """[N, C], before alpha."""
        column_K = self._columns(names)
        is_asked_K = column_K >= 0
        one_hot_KC = functional.one_hot(column_K[is_asked_K], len(names)).to(features_ND.dtype)
        affinity_NK = features_ND @ self.keys[is_asked_K].T.to(features_ND.dtype)
        return torch.exp(-beta * (1 - affinity_NK)) @ one_hot_KC

    @torch.no_grad()
    def _best_weights(self, samples: ImageSet) -> tuple[float, float, float]:
        """alpha, beta and their accuracy in percent; of equal ones the smallest alpha, then the smallest beta."""
        features, labels = samples.images.to(self.keys), samples.labels.to(self.keys.device)
        names = self.task.base_names if self.config.generator is None else self.task.class_names
        plain_NC = self.logits(features, self.class_features(names))
        votes = {beta: self._votes(features, names, beta) for beta in BETAS}

        def correct(weights: tuple[float, float]) -> int:
            alpha, beta = weights
            return int(((plain_NC + alpha * votes[beta]).argmax(dim=1) == labels).sum())

        best = max(product(ALPHAS, BETAS), key=correct)  # of equals, max keeps the first
        return *best, 100 * correct(best) / len(labels)


class TipAdapterF(TipAdapter):
    """Tip-Adapter with learned keys, trained at the alpha and beta of the settings."""

    name = "tip-adapter-f"

    def _register_keys(self, keys: Tensor) -> None:
        self.keys = nn.Parameter(keys)
