"""`clipship-tiny-diffusion`, a small latent text-to-image pipeline trained on the scenes of the built-in world."""

from pathlib import Path

TINY_DIFFUSION: Path = Path(__file__).resolve().parents[2] / "models" / "clipship-tiny-diffusion"
"""The committed pipeline, in diffusers' folder format: `DiffusionPipeline.from_pretrained(TINY_DIFFUSION)` loads it."""
