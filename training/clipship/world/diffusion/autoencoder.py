"""The first stage: an `AutoencoderKL` that turns a picture into a latent of a quarter of its side, and back.

The loss is the mean absolute error, of pixels and of means over small squares, plus a small Kullback-Leibler term that
keeps the latents near a normal distribution (latent diffusion, arXiv 2112.10752, without its adversarial and perceptual
terms).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipship.world.diffusion.training_images import draw_pictures, pictures_ahead
from clipship.world.drawing.stencils import PICTURE_PX, Bytes
from clipship.world.training_run import ResumableRun, RunSettings, decayed_optimizer, descend

# Shapes: N pictures, C latent channels, S latent side.

LATENT_CHANNELS = 4
LATENT_PX = PICTURE_PX // 4
LOG_FILE = "autoencoder.log.jsonl"
CHECKPOINT_FILE = "autoencoder.pt"
_CHANNELS = (16, 32, 64)
_GROUPS = 8
_COARSE_PX = 4
_MEASURED_SEED = 7_101
_MEASURED_PICTURES = 64


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(RunSettings):
    """The settings of the committed autoencoder; `kl_weight` is per value of the latent."""

    steps: int = 3000
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    log_every: int = 50
    evaluate_every: int = 250
    kl_weight: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be 0 or more")


def new_autoencoder(seed: int) -> Any:
    """Return a fresh diffusers `AutoencoderKL`: [N, 3, PICTURE_PX, PICTURE_PX] in [-1, 1] to [N, C, S, S]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(_CHANNELS),
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=_GROUPS,
        sample_size=PICTURE_PX,
        mid_block_add_attention=False,
    )
    return model.to(memory_format=torch.channels_last)  # twice as fast on CPUs


def signed_from_pixels(pixels: Bytes) -> Tensor:
    """Return float32 [N, 3, H, W] in [-1, 1] from uint8 [N, H, W, 3]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean absolute error, plus that of means over 4 x 4 pixels: without it colours are learned late."""
    coarse = F.l1_loss(F.avg_pool2d(decoded, _COARSE_PX), F.avg_pool2d(pixels, _COARSE_PX))
    return F.l1_loss(decoded, pixels) + coarse


class AutoencoderRun(ResumableRun[AutoencoderSettings, Bytes]):
    """The training of the autoencoder."""

    log_file, checkpoint_file = LOG_FILE, CHECKPOINT_FILE

    def __init__(self, out: Path, settings: AutoencoderSettings) -> None:
        self.model = new_autoencoder(settings.seed)
        self.optimizer = decayed_optimizer(self.model, settings, betas=(0.9, 0.99))
        self.unseen = signed_from_pixels(draw_pictures(_MEASURED_SEED, 0, _MEASURED_PICTURES))
        super().__init__(out, settings, model=self.model, optimizer=self.optimizer)

    def batches(self, *, workers: int) -> Iterator[Bytes]:
        """Return the pictures of the remaining steps."""
        size = self.settings.batch_size
        return pictures_ahead(self.settings.seed, self.step * size, self.settings.steps * size, size, workers=workers)

    def take_step(self, batch: Bytes) -> float:
        """Learn from pictures and return the loss."""
        pixels = signed_from_pixels(batch)
        posterior = self.model.encode(pixels).latent_dist
        # Seeded by the step: a resumed run draws the same noise.
        noise = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        decoded = self.model.decode(posterior.sample(generator=noise)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(decoded, pixels) + self.settings.kl_weight * kl
        return descend(self.optimizer, loss, self.settings.learning_rate_at(self.step))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the peak signal-to-noise ratio in dB of decoded pictures, and the spread of the latents."""
        posterior = self.model.encode(self.unseen).latent_dist
        error = F.mse_loss(self.model.decode(posterior.mean).sample.clamp(-1, 1), self.unseen)
        psnr_db = 10 * math.log10(4 / float(error))  # the range of the pixels is 2
        latent_std, noise_std = float(posterior.mean.std()), float(posterior.std.mean())
        return {"psnr_db": round(psnr_db, 2), "latent_std": round(latent_std, 3), "noise_std": round(noise_std, 3)}


def train_autoencoder(out: Path, settings: AutoencoderSettings, *, resume: bool, workers: int) -> Any:
    """Train the autoencoder, and return it in evaluation mode.

    Raises:
        DataError: as `ResumableRun.begin`.
    """
    run = AutoencoderRun(out, settings)
    if not run.is_finished(resume=resume):
        run.begin(resume=resume)
        run.train(run.batches(workers=workers))
        run.log(event="finished", step=run.step, train_s=round(run.train_s), **run.measure())
    return run.model.eval().requires_grad_(False)
