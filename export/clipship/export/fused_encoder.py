"""The image encoder arranged for speed: the same numbers from fewer operations.

What it leaves out or folds into constants, all of it exact but for the order of summation:

- scaling and normalisation of the pixels are part of the patch projection, its bias part of the position embedding
  (pixels enter it as whole numbers around zero, so that a reduced precision rounds the weights only);
- class token and prompts, which no image changes, enter the first block already normalised;
- one product gives queries, keys and values; the softmax's scale is in the queries' weights, a layer scale in the
  weights before it;
- where the next block replaces the prompts, this one does not compute their outputs;
- of the last block only the class token is needed, where the tower pools by it.

Legend: N images, H = W pixels, G patches a side, S pixels a patch, P tokens, Q tokens that are needed, W width of the
tower, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipship.export.onnx_graph import ATTENTION_OPSET, OPSET

if TYPE_CHECKING:
    from clipship.training.methods.base import Method


class FusedImageEncoder(nn.Module):
    """uint8 RGB pixels [N, H, W, 3] -> float32 features of unit length [N, D], as the method's own to 1e-5.

    Args:
        opset: what the graph is for: from :data:`~clipship.export.onnx_graph.ATTENTION_OPSET` on attention is one node.
    """

    def __init__(self, method: Method, *, opset: int = OPSET) -> None:
        super().__init__()
        visual, prompts = method.clip.visual, method.image_prompts()
        self.method = method
        self.visual = visual
        spec = method.clip.image_spec
        self.grid, self.patch_px = spec.size_px // visual.conv1.stride[0], int(visual.conv1.stride[0])
        weight, bias = _patch_projection(visual.conv1, spec.mean, spec.std)
        self.register_buffer("patches", weight)
        self.register_buffer("middle", _middle(spec.mean))
        self.register_buffer("positions", visual.positional_embedding[1:].detach() + bias)
        first = visual.ln_pre((visual.class_embedding + visual.positional_embedding[0])[None]).detach()
        self.register_buffer("first", first[None])
        self.prompts: list[Tensor] = []
        for layer, one in enumerate([] if prompts is None else prompts.detach()):
            self.register_buffer(f"prompts_{layer}", (visual.ln_pre(one) if layer == 0 else one)[None])
            self.prompts.append(getattr(self, f"prompts_{layer}"))
        blocks = list(visual.transformer.resblocks)
        pools_by_token = visual.pool_type == "tok"
        attention = _attention_node if opset >= ATTENTION_OPSET else _attention_products
        self.blocks = nn.ModuleList(
            _Block(block, kept=self._kept(number, len(blocks), pools_by_token), attention=attention)
            for number, block in enumerate(blocks)
        )

    patches: Tensor
    middle: Tensor
    positions: Tensor
    first: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """As the class says."""
        x_NPW = self._tokens(image)
        for layer, block in enumerate(self.blocks):
            if 0 < layer < len(self.prompts):
                x_NPW = torch.cat([x_NPW, _expanded(self.prompts[layer], x_NPW)], dim=1)
            x_NPW = block(x_NPW)
        if self.prompts and self.blocks[-1].kept != 1:
            x_NPW = x_NPW[:, : 1 + self.grid**2]  # towers that average over tokens must not average over prompts
        raw_ND: Tensor = self.visual._pool(x_NPW)[0] @ self.visual.proj
        return self.method.adapted(functional.normalize(raw_ND, dim=-1))

    def _tokens(self, image: Tensor) -> Tensor:
        """[N, H, W, 3] -> [N, P, W]: class token, patches, prompts."""
        grid, side = self.grid, self.patch_px
        pixels_NHW3 = image.float() - self.middle  # first of all the cast: TensorRT takes uint8 only as its input
        patches_NGGSS3 = pixels_NHW3.reshape(-1, grid, side, grid, side, 3).transpose(2, 3)
        rows = patches_NGGSS3.reshape(-1, grid * grid, side * side * 3)
        x_NPW = self.visual.ln_pre(rows @ self.patches + self.positions)
        constants = [_expanded(one, x_NPW) for one in (self.first, *self.prompts[:1])]
        return torch.cat([constants[0], x_NPW, *constants[1:]], dim=1)

    def _kept(self, number: int, count: int, pools_by_token: bool) -> int | None:
        """How many tokens, from the first, are read after block ``number``; None: all."""
        if number == count - 1 and pools_by_token:
            return 1
        return 1 + self.grid**2 if number + 1 < len(self.prompts) else None


class _Block(nn.Module):
    """One of open_clip's residual blocks for the first ``kept`` tokens, which attend to all."""

    def __init__(self, block: Any, kept: int | None, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = block.attn.embed_dim
        self.attention = attention
        self.heads: int = block.attn.num_heads
        self.kept = kept
        self.ln_1: nn.Module = block.ln_1
        self.ln_2: nn.Module = block.ln_2
        self.activation: nn.Module = block.mlp.gelu
        scale = torch.ones(3 * width)
        scale[:width] = (width // self.heads) ** -0.5
        weight, bias = block.attn.in_proj_weight * scale[:, None], block.attn.in_proj_bias * scale
        cuts = (width, 3 * width) if kept == 1 else (3 * width,)  # one query is not worth a part of the common product
        starts = (0, *cuts)
        self.inputs = nn.ModuleList(_linear(weight[a:b], bias[a:b]) for a, b in pairwise(starts))
        self.out = _scaled(block.attn.out_proj, block.ls_1)
        self.up = _linear(block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        self.down = _scaled(block.mlp.c_proj, block.ls_2)

    def forward(self, x_NPW: Tensor) -> Tensor:
        """[N, P, W] -> [N, kept, W]."""
        if self.kept == 1:  # a normalisation for each product, so that int8 can share outliers with the weights of each
            query_NQW = self.inputs[0](self.ln_1(x_NPW[:, :1]))
            key_NPW, value_NPW = self.inputs[1](self.ln_1(x_NPW)).chunk(2, dim=-1)
        else:
            query_NQW, key_NPW, value_NPW = self.inputs[0](self.ln_1(x_NPW)).chunk(3, dim=-1)
            query_NQW = query_NQW if self.kept is None else query_NQW[:, : self.kept]
        x_NQW = x_NPW if self.kept is None else x_NPW[:, : self.kept]
        x_NQW = x_NQW + self.out(self._attended(query_NQW, key_NPW, value_NPW))
        result: Tensor = x_NQW + self.down(self.activation(self.up(self.ln_2(x_NQW))))
        return result

    def _attended(self, query_NQW: Tensor, key_NPW: Tensor, value_NPW: Tensor) -> Tensor:
        """[N, Q, W]."""
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (query_NQW, key_NPW, value_NPW))
        return self.attention(q, k, v).transpose(1, 2).flatten(2)


def _attention_node(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a scale, [N, P, heads, W / heads] each; it gives [N, heads, Q, W / heads]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, scale=1.0)


def _attention_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in operators of every opset: the exporter's own translation is twice as many, half of them of shapes."""
    weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(dim=-1)
    return weights @ v.transpose(1, 2)


def _middle(mean: tuple[float, ...]) -> Tensor:
    """[3], whole numbers near the mean colour: pixels minus these are exact in bfloat16 and in float16."""
    return torch.tensor([round(255 * value) for value in mean], dtype=torch.float32)


def _patch_projection(conv: nn.Conv2d, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """[S * S * 3, W] and [W]: the projection of pixels 0..255 minus the middle; folded in float64."""
    weight = conv.weight.detach().double()  # [W, 3, S, S]
    mean_3, std_3 = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    offset_3 = (_middle(mean).double() / 255 - mean_3) / std_3
    bias = (weight * offset_3[:, None, None]).sum(dim=(1, 2, 3))
    if conv.bias is not None:
        bias += conv.bias.detach().double()
    scaled = weight / (255 * std_3[:, None, None])
    return scaled.permute(2, 3, 1, 0).flatten(0, 2).float().contiguous(), bias.float()


def _scaled(layer: nn.Linear, scale: nn.Module) -> nn.Linear:
    """A linear layer followed by a layer scale."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return _linear(layer.weight, layer.bias)
    return _linear(layer.weight * gamma[:, None], layer.bias * gamma)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _expanded(tokens_1MW: Tensor, like: Tensor) -> Tensor:
    return tokens_1MW.expand(like.shape[0], -1, -1)
