"""The third stage: a `UNet2DConditionModel` that denoises latents step by step, conditioned on a caption.

It predicts the velocity (arXiv 2202.00512) with min-SNR weights (arXiv 2303.09556); one caption in ten is left out, for
classifier-free guidance (arXiv 2207.12598). The result is a moving average of the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipship.world.diffusion.autoencoder import LATENT_CHANNELS, LATENT_PX
from clipship.world.diffusion.pipeline import new_scheduler
from clipship.world.diffusion.training_images import caption_at
from clipship.world.training_run import ResumableRun, RunSettings, decayed_optimizer, descend

# Shapes: N pictures, C latent channels, S latent side, L tokens, W text width.

LOG_FILE = "denoiser.log.jsonl"
CHECKPOINT_FILE = "denoiser.pt"
_CHANNELS = (48, 96, 160)
_HEADS = 4
_GROUPS = 16
_BATCH_STREAM = 7_301


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(RunSettings):
    """The settings of the committed denoiser.

    `snr_limit` caps the weight of steps with little noise, `no_caption_chance` is the share of captions left out,
    `average_decay` is how much of the averaged weights is kept at a step.
    """

    steps: int = 8400
    learning_rate: float = 8e-4
    warmup_steps: int = 300
    log_every: int = 100
    evaluate_every: int = 1000
    pictures: int = 32_768
    snr_limit: float = 5.0
    no_caption_chance: float = 0.1
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 1 or self.snr_limit <= 0:
            raise ValueError(f"pictures is {self.pictures} and snr_limit {self.snr_limit}; both must be above 0")
        if not (0 <= self.no_caption_chance < 1 and 0 <= self.average_decay < 1):
            raise ValueError(
                f"no_caption_chance is {self.no_caption_chance} and average_decay {self.average_decay}; "
                "both must be at least 0 and below 1"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisyBatch:
    """The training data of one step: latents and noise are float32 [N, C, S, S]."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    """int64 [N], steps of the noise schedule."""
    captions: tuple[str, ...]
    """N texts, empty where the caption is left out."""


def new_denoiser(seed: int, text_width: int) -> Any:
    """Return a fresh diffusers `UNet2DConditionModel` over latents of the autoencoder, attention at 8 x 8 and 4 x 4."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=LATENT_PX,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=_HEADS,  # diffusers means the number of heads by it
        norm_num_groups=_GROUPS,
    )
    torch.nn.init.zeros_(model.conv_out.weight)  # the first prediction is zero
    return model.to(memory_format=torch.channels_last)


def noisy_batch(settings: DenoiserSettings, latents: Tensor, step: int, times: int) -> NoisyBatch:
    """Return the batch of a step, a function of the seed and the step; `times` is the length of the noise schedule."""
    draw = torch.Generator().manual_seed(_BATCH_STREAM * 1_000_000_007 + settings.seed * 1_000_003 + step)
    chosen = torch.randint(len(latents), (settings.batch_size,), generator=draw)
    left_out = torch.rand(settings.batch_size, generator=draw) < settings.no_caption_chance
    captions = [caption_at(settings.seed, index, step) for index in chosen.tolist()]
    return NoisyBatch(
        latents=latents[chosen].float(),
        noise=torch.randn((settings.batch_size, *latents.shape[1:]), generator=draw),
        times=torch.randint(times, (settings.batch_size,), generator=draw),
        captions=tuple("" if out else text for out, text in zip(left_out.tolist(), captions, strict=True)),
    )


def min_snr_weights(signal: Tensor, limit: float) -> Tensor:
    """Return the weights of the squared velocity error, [N], from the share of signal in the variance, [N].

    min(SNR, limit) / (SNR + 1), which weighs errors of the clean latent by min(SNR, limit).
    """
    snr = signal / (1 - signal)
    return snr.clamp(max=limit) / (snr + 1)


class DenoiserRun(ResumableRun[DenoiserSettings, NoisyBatch]):
    """The training of the denoiser, which `judge` measures."""

    log_file, checkpoint_file = LOG_FILE, CHECKPOINT_FILE

    def __init__(
        self,
        out: Path,
        settings: DenoiserSettings,
        *,
        latents: Tensor,
        text_encoder: Any,
        tokenizer: Any,
        judge: Callable[[Any], dict[str, float]],
    ) -> None:
        self.latents, self.text_encoder, self.tokenizer, self.judge = latents, text_encoder, tokenizer, judge
        self.model = new_denoiser(settings.seed, text_encoder.config.hidden_size)
        moving_average = get_ema_multi_avg_fn(settings.average_decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average)
        self.optimizer = decayed_optimizer(self.model, settings, betas=(0.9, 0.99))
        self.signal: Tensor = new_scheduler().alphas_cumprod
        super().__init__(
            out,
            settings,
            {"pictures": settings.pictures},
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
        )

    def batches(self) -> Iterator[NoisyBatch]:
        """Yield the batches of the remaining steps."""
        for step in range(self.step, self.settings.steps):
            yield noisy_batch(self.settings, self.latents, step, len(self.signal))

    def take_step(self, batch: NoisyBatch) -> float:
        """Learn from a batch and return the weighted loss."""
        signal = self.signal[batch.times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
        velocity = signal.sqrt() * batch.noise - (1 - signal).sqrt() * batch.latents
        guess = self.model(noisy, batch.times, self.text_states(batch.captions)).sample
        error_N = (guess - velocity).square().mean((1, 2, 3))
        loss = (error_N * min_snr_weights(signal.flatten(), self.settings.snr_limit)).mean()
        value = descend(self.optimizer, loss, self.settings.learning_rate_at(self.step))
        self.average.update_parameters(self.model)
        return value

    @torch.no_grad()
    def text_states(self, captions: tuple[str, ...]) -> Tensor:
        """Return the states of the text encoder, float32 [N, L, W], of captions padded as the pipeline pads them."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = self.text_encoder(tokens.input_ids).last_hidden_state
        return states

    def measure(self) -> dict[str, float]:
        """Return the judgement of the averaged weights."""
        return self.judge(self.average.module)
