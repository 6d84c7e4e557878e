"""The second stage: the latents of all pictures, drawn and encoded once and kept in files.

Every file names the autoencoder that made it: a resumed run continues with the next file, and never takes latents of
another autoencoder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipship.core.files import replace_file
from clipship.training.model.clip import digest_of_tensors
from clipship.world.diffusion.autoencoder import signed_from_pixels
from clipship.world.diffusion.training_images import draw_pictures, pictures_ahead
from clipship.world.drawing.attributes import WORLD_VERSION
from clipship.world.drawing.stencils import Bytes
from clipship.world.training_run import round_to_half

# Shapes: N pictures, C latent channels, S latent side.

PICTURES_PER_FILE = 4096
_PICTURES_AT_ONCE = 64


@torch.no_grad()
def normalise_latents(model: Any, seed: int, count: int) -> None:
    """Normalise every latent channel to mean 0 and spread 1, in the weights of the autoencoder, in place.

    Mean and spread are those of the first `count` pictures of the stream.

    Pipelines of diffusers have one scaling factor for all channels and no offset, so both go into the 1 x 1
    convolutions beside the latent. The weights are rounded to float16 afterwards.
    """
    pixels = signed_from_pixels(draw_pictures(seed, 0, count))
    latents = torch.cat([model.encode(part).latent_dist.mean for part in torch.split(pixels, _PICTURES_AT_ONCE)])
    mean_C, std_C = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out_of = model.quant_conv, model.post_quant_conv
    channels = len(mean_C)
    out_of.bias += out_of.weight[..., 0, 0] @ mean_C
    out_of.weight *= std_C.view(1, -1, 1, 1)
    into.weight[:channels] /= std_C.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean_C) / std_C
    into.bias[channels:] -= 2 * std_C.log()  # the second half are log variances
    model.register_to_config(scaling_factor=1.0)
    round_to_half(model)


def encoded_pictures(folder: Path, model: Any, seed: int, count: int, *, workers: int = 1) -> Tensor:
    """Return the latent means of the first `count` pictures, float16 [N, C, S, S], made once and kept in `folder`."""
    identity = {"world": str(WORLD_VERSION), "seed": str(seed), "autoencoder": digest_of_tensors(model.state_dict())}
    parts = []
    for first in range(0, count, PICTURES_PER_FILE):
        last = min(first + PICTURES_PER_FILE, count)
        path = folder / f"latents_{first:06d}_{last:06d}.safetensors"
        if not _is_made_by(path, identity):
            ahead = pictures_ahead(seed, first, last, _PICTURES_AT_ONCE, workers=workers)
            with replace_file(path) as temporary:
                save_file({"latents": torch.cat(list(_encoded(model, ahead)))}, temporary, metadata=identity)
        with safe_open(path, framework="pt") as file:
            parts.append(file.get_tensor("latents"))
    return torch.cat(parts)


@torch.no_grad()
def _encoded(model: Any, ahead: Iterator[Bytes]) -> Iterator[Tensor]:
    for pictures in ahead:
        yield model.encode(signed_from_pixels(pictures)).latent_dist.mean.half().contiguous()


def _is_made_by(path: Path, identity: dict[str, str]) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return bool(file.metadata() == identity)
