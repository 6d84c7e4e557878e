"""What is exported: the two towers with their prompts, from what a client has to what a classifier takes.

Shape legend: N images, H = W pixels, C class names, L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from clipship.training.methods.base import Method


class ImageEncoder(nn.Module):
    """uint8 RGB pixels [N, H, W, 3] -> float32 features of unit length [N, D].

    Cast and normalisation are part of the graph, so that a client cannot get them wrong.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.clip = method.clip.model  # registered here, so that the exporter sees the frozen tower's weights

    def forward(self, image: Tensor) -> Tensor:
        """As the class says."""
        # Cast first: TensorRT takes uint8 at a network's input only, and nothing but a cast may follow.
        features: Tensor = self.method.image_features(self.method.clip.normalize(image.float()))
        return features


class TextEncoder(nn.Module):
    """Token ids int64 [C, L] -> float32 features of unit length [C, D], learned context included."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.clip = method.clip.model

    def forward(self, tokens: Tensor) -> Tensor:
        """As the class says."""
        features: Tensor = self.method.text_features(tokens)
        return features
