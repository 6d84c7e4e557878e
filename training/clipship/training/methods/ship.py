"""SHIP: image features for classes that have only a name (arXiv 2307.07397).

A variational autoencoder of frozen CLIP image features whose decoder is CLIP's own text tower: the latent becomes one
vector that is added to every learned prompt token, before the class name.

Shapes: B images of a batch, G features to generate, N images, D joint and latent dimensions, L tokens, M prompt tokens,
W text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clipship.core.progress import log
from clipship.training.config import Settings, TrainConfig, at_least
from clipship.training.losses import raised
from clipship.training.methods.base import Batch, Method, Source, Task, chunked
from clipship.training.methods.layers import normal_linear
from clipship.training.model import prompts
from clipship.training.model.clip import Clip

COLLAPSED_NATS = math.log(2)
"""The divergence bounds the information of the latent about an image; one bit distinguishes two images."""
COLLAPSED_SHARE = 0.05
"""Generated features of a class that vary less than this share of the real ones are nearly copies of each other."""


@dataclass(frozen=True, kw_only=True)
class ShipSettings(Settings):
    """The shape of the autoencoder, and the weight of its prior."""

    text_tokens: int = at_least(1, 4)
    """Learned tokens that all prompts share."""
    context_init: str = ""
    """Words whose embeddings start them; empty: random."""
    encoder_width: int = at_least(1, 2048)
    """Hidden width of the encoder."""
    decoder_width: int = at_least(1, 4096)
    """Hidden width of the decoder, before the text tower."""
    decoder_slope: float = at_least(0, 0.0)
    """Negative slope of the decoder's ReLU."""
    kl_weight: float = at_least(0, 1.0)
    """The weight of the posterior's divergence from N(0, I)."""


class ShipGenerator(Method):
    """Encoder D -> posterior N(mean, exp(log_variance)), decoder D -> W, global prompt tokens [1, M, W].

    As a classifier it is its global tokens before the class names, which are not learned for that.
    """

    name = "ship"
    settings_type = ShipSettings
    settings: ShipSettings
    not_exportable = "it makes features and is no classifier: pack the run that learned from them"

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        settings = self.settings
        self.templates = (prompts.placeholder_template(clip, settings.text_tokens),)
        generator = torch.Generator().manual_seed(config.seed)
        dim = clip.embed_dim
        self.encoder = normal_linear(dim, settings.encoder_width, prompts.INIT_STD, generator)
        self.mean = normal_linear(settings.encoder_width, dim, prompts.INIT_STD, generator)
        self.log_variance = normal_linear(settings.encoder_width, dim, prompts.INIT_STD, generator)
        self.decoder_in = normal_linear(dim, settings.decoder_width, prompts.INIT_STD, generator)
        self.decoder_out = normal_linear(settings.decoder_width, clip.text_width, prompts.INIT_STD, generator)
        self.context = prompts.context_prompts(clip, 1, settings.text_tokens, settings.context_init, generator)
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    draws: Tensor
    """How often the posterior was sampled; in the state, so that a resumed run draws the same noise."""

    def text_prompts(self) -> Tensor:
        """[1, M, W], the tokens that every prompt shares."""
        return self.context

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [B, D] -> mean and log variance, each float32 [B, D]."""
        hidden = functional.relu(self.encoder(features))
        return self.mean(hidden).float(), self.log_variance(hidden).float()

    def decoded(self, latent: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
        """Latents [B, D] of the classes ``names[label]``, labels [B] -> unit features, float32 [B, D]."""
        tokens_BL = self._tokens_of(tuple(names))[0][labels]
        hidden = functional.leaky_relu(self.decoder_in(latent), self.settings.decoder_slope)
        shift_B1W = self.decoder_out(hidden)[:, None]
        return chunked(self._through_text_tower, tokens_BL, shift_B1W, size=self.config.text_chunk)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Squared error of the decoded feature plus ``kl_weight`` times the posterior's divergence from N(0, I)."""
        mean, log_variance = self.posterior(batch.real.images)
        latent = mean + (0.5 * log_variance).exp() * self._noise(len(mean)).to(mean.device)
        decoded = self.decoded(latent, batch.real.labels, self.task.base_names)
        reconstruction = reconstruction_loss(decoded, batch.real.images)
        kl = posterior_divergence(mean, log_variance)
        total = reconstruction + self.settings.kl_weight * kl
        return {"total": total, "reconstruction": reconstruction.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def generate(self, labels: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
        """Unit features, float32 [G, D], of the classes ``names[label]``; labels int64 [G].

        Latents are drawn on the CPU, so equal generators give equal features on any device, but for rounding.
        """
        latent = torch.randn(len(labels), self.clip.embed_dim, generator=generator)
        if not len(labels):
            return latent.to(self.clip.device)
        return self.decoded(latent.to(self.clip.device), labels.to(self.clip.device), names)

    @torch.no_grad()
    def end(self, source: Source) -> None:
        """Note how far the posterior is from N(0, I) and how much features of a class vary; warn of a collapse."""
        samples = source.train(1)
        features, labels = samples.images.to(self.clip.device), samples.labels.to(self.clip.device)
        made = self.generate(labels, self.task.base_names, torch.Generator().manual_seed(self.config.seed))
        kl = float(posterior_divergence(*self.posterior(features)))
        real, generated = variance_within_classes(features, labels), variance_within_classes(made, labels)
        self.notes |= {"kl": kl, "real_variance": real, "generated_variance": generated}
        if kl < COLLAPSED_NATS or generated < COLLAPSED_SHARE * real:
            log(
                f"warning: the generator's posterior has collapsed: {kl:.3g} nats an image (from {COLLAPSED_NATS:.2f} "
                f"on it is of use), features of a class vary by {generated:.3g}, those of real images by {real:.3g} "
                f"(from {COLLAPSED_SHARE:.0%} of that on): lower kl_weight"
            )

    def _noise(self, rows: int) -> Tensor:
        """[rows, D] from N(0, I), keyed by the process, the seed and the number of draws so far."""
        process = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        key = (process << 48) + (self.config.seed << 32) + int(self.draws)
        generator = torch.Generator().manual_seed(key)
        self.draws += 1
        return torch.randn(rows, self.clip.embed_dim, generator=generator)

    def _through_text_tower(self, tokens_BL: Tensor, shift_B1W: Tensor) -> Tensor:
        tokens_BL = prompts.without_padding(self.clip, tokens_BL)
        contexts_BMW = self.context[0] + shift_B1W
        return functional.normalize(prompts.pairwise_text_features(self.clip, tokens_BL, contexts_BMW).float(), dim=-1)


def reconstruction_loss(decoded: Tensor, features: Tensor) -> Tensor:
    """The squared distance of [B, D] and [B, D], summed over D, mean over B."""
    return (raised(decoded) - raised(features)).square().sum(dim=-1).mean()


def posterior_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) in nats, each [B, D], summed over D, mean over B."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=-1).mean()


def variance_within_classes(features: Tensor, labels: Tensor) -> float:
    """The mean squared distance of features [N, D] from the mean of their class, labels [N]; 0 where N is 0."""
    if not len(labels):
        return 0.0
    one_hot_NC = functional.one_hot(labels).to(features.dtype)
    means_CD = (one_hot_NC.T @ features) / one_hot_NC.sum(dim=0)[:, None].clamp(min=1)
    return float((features - means_CD[labels]).square().sum(dim=-1).mean())
