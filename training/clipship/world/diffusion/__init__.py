"""`clipship-tiny-diffusion`, a small latent text-to-image pipeline trained on the scenes of the built-in world."""
