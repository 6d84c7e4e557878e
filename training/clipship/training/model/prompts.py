"""Learned tokens inside open_clip's own towers: no copy of CLIP, any width and depth.

Deep prompts are tensors [J, M, W]: J layers, M tokens a layer, W the width of the tower. Layer 0 enters the input,
layers 1..J-1 take the place of the tokens before them, and from block J on the last ones flow through (visual prompt
tuning, arXiv 2203.12119; MaPLe, arXiv 2210.03117).

Shapes: N images, C prompts, L text tokens, P image tokens, D joint dimensions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipship.core.errors import RecipeError
from clipship.training.model.clip import Clip

INIT_STD = 0.02
"""The spread of randomly drawn prompts, as in the published methods."""

_PLACEHOLDER = "X"


def random_prompts(depth: int, tokens: int, width: int, generator: torch.Generator) -> nn.Parameter:
    """Deep prompts [depth, tokens, width] drawn from N(0, 0.02)."""
    return nn.Parameter(torch.randn(depth, tokens, width, generator=generator) * INIT_STD)


def context_prompts(clip: Clip, depth: int, tokens: int, words: str, generator: torch.Generator) -> nn.Parameter:
    """Deep text prompts [depth, tokens, text width]: layer 0 holds the embeddings of ``words``, the others N(0, 0.02).

    Raises:
        RecipeError: ``words`` are not ``tokens`` tokens; empty ``words`` mean a random layer 0.
    """
    prompts = random_prompts(depth, tokens, clip.text_width, generator)
    if not words:
        return prompts
    ids = clip.token_ids(words)
    if len(ids) != tokens:
        raise RecipeError(f"context {words!r} has {len(ids)} tokens, the recipe {tokens}: change one of them")
    with torch.no_grad():
        prompts[0] = clip.text.token_embedding.weight[torch.tensor(ids, device=clip.device)].cpu()
    return prompts


def placeholder_template(clip: Clip, tokens: int) -> str:
    """ "X X X X {}." for 4 tokens: after the start token come ``tokens`` positions for the learned context.

    Raises:
        RecipeError: the tokenizer does not give each placeholder one position.
    """
    placeholders = " ".join([_PLACEHOLDER] * tokens)
    ids = clip.token_ids(placeholders)
    if len(ids) != tokens or len(set(ids)) > 1:
        raise RecipeError(
            f"{placeholders!r} has {len(ids)} tokens in {clip.name}, not {tokens}: take a model with CLIP's tokenizer"
        )
    return f"{placeholders} {{}}."


def validate_depth(clip: Clip, tower: Literal["image", "text"], depth: int) -> None:
    """Validate that the tower has the layers.

    Raises:
        RecipeError: the depth is greater than the number of blocks.
    """
    layers = clip.image_layers if tower == "image" else clip.text_layers
    if depth > layers:
        raise RecipeError(
            f"prompts in {depth} layers, but the {tower} tower of {clip.name} has {layers}: "
            f"set the depth to at most {layers}, or take a recipe made for this model"
        )


def image_features(clip: Clip, pixels: Tensor, prompts: Tensor | None = None) -> Tensor:
    """[N, 3, H, W] -> [N, D], not normalised; ``prompts`` [J, M, image width] stand after the patches.

    Without prompts the result is, bit for bit, that of open_clip's ``encode_image``.
    """
    visual = clip.visual
    x_NPW: Tensor = visual._embeds(pixels)
    if prompts is None:
        x_NPW = visual.transformer(x_NPW)
    else:
        # ln_pre normalises token by token, so appending normalised prompts equals appending before it
        x_NPW = torch.cat([x_NPW, _expanded(visual.ln_pre(prompts[0]), x_NPW)], dim=1)
        x_NPW = _through_image_blocks(visual.transformer.resblocks, x_NPW, prompts)
        x_NPW = x_NPW[:, : -prompts.shape[1]]  # towers that average over tokens must not average over prompts
    features: Tensor = visual._pool(x_NPW)[0] @ visual.proj
    return features


def _through_image_blocks(blocks: Any, x_NPW: Tensor, prompts: Tensor) -> Tensor:
    for layer, block in enumerate(blocks):
        if 0 < layer < prompts.shape[0]:
            x_NPW = torch.cat([x_NPW[:, : -prompts.shape[1]], _expanded(prompts[layer], x_NPW)], dim=1)
        x_NPW = block(x_NPW)
    return x_NPW


def text_features(clip: Clip, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
    """int64 [C, L] -> [C, D], not normalised; ``prompts`` [J, M, text width] take positions 1..M.

    Prompts [J, C, M, text width] give every row its own.

    Without prompts the result is, bit for bit, that of open_clip's ``encode_text``. L may be shorter than the model's
    context length as long as every end token is inside.
    """
    from open_clip.transformer import text_global_pool

    text = clip.text
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x_CLW: Tensor = text.token_embedding(tokens).to(dtype)
    if prompts is not None:
        x_CLW = _with_context(x_CLW, prompts[0])
    x_CLW = x_CLW + text.positional_embedding[:length].to(dtype)
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    for layer, block in enumerate(text.transformer.resblocks):
        if prompts is not None and 0 < layer < prompts.shape[0]:
            x_CLW = _with_context(x_CLW, prompts[layer])
        x_CLW = block(x_CLW, attn_mask=mask)
    x_CLW = text.ln_final(x_CLW)
    pool_type, eos = text_pool_of(text)
    # int32: exported, this is an ArgMax, which ONNX Runtime has for int64 since 1.20 only
    pooled: Tensor = text_global_pool(x_CLW, tokens.int(), pool_type, eos_token_id=eos)
    return _projected(pooled, text.text_projection)


def contextual_text_features(clip: Clip, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Every one of B contexts with every one of C class names: [B, C, D], not normalised.

    ``tokens`` int64 [C, L] hold placeholders at positions 1..M, ``contexts`` [B, J, M, text width] take them. Under the
    causal mask the start token and the context do not see the class name, so they are computed once a context instead
    of once a class; the result is that of :func:`text_features` but for the order of summation.
    """
    from open_clip.transformer import text_global_pool

    text = clip.text
    num_contexts, _, num_tokens, _ = contexts.shape
    first = 1 + num_tokens
    num_classes, length = tokens.shape
    dtype = text.transformer.get_cast_dtype()
    x_CLW: Tensor = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    positions = text.positional_embedding[1:first].to(dtype)
    start_B1W = x_CLW[:1, :1].expand(num_contexts, -1, -1)
    prefix_BPW = torch.cat([start_B1W, contexts[:, 0].to(dtype) + positions], dim=1)
    names_RSW = x_CLW[:, first:].repeat(num_contexts, 1, 1)  # R = B x C rows, S = L - 1 - M positions
    mask = text.attn_mask[:length, :length]
    for layer, block in enumerate(text.transformer.resblocks):
        if 0 < layer < contexts.shape[1]:
            prefix_BPW = torch.cat([prefix_BPW[:, :1], contexts[:, layer].to(dtype)], dim=1)
        names_RSW = _through_text_block(block, names_RSW, prefix_BPW, mask[first:])
        prefix_BPW = block(prefix_BPW, attn_mask=mask[:first, :first])
    pool_type, eos = text_pool_of(text)
    rows = tokens[:, first:].repeat(num_contexts, 1)
    pooled: Tensor = text_global_pool(text.ln_final(names_RSW), rows, pool_type, eos_token_id=eos)
    return _projected(pooled, text.text_projection).view(num_contexts, num_classes, -1)


def pairwise_text_features(clip: Clip, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Every row its own context: tokens int64 [R, L], contexts [R, M, text width] -> [R, D], not normalised.

    The result is that of :func:`text_features` with ``contexts[None]`` but for the order of summation; what is
    not used is not computed: the start token is the same in all rows, so it passes the tower once, and the last block
    computes the end tokens only. Where :func:`can_share_context` is false it is :func:`text_features`.
    """
    if not can_share_context(clip):
        return text_features(clip, tokens, contexts[None])
    text = clip.text
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x_RLW: Tensor = _with_context(text.token_embedding(tokens).to(dtype), contexts)
    x_RLW = x_RLW + text.positional_embedding[:length].to(dtype)
    start_11W, rows_RSW = x_RLW[:1, :1], x_RLW[:, 1:]  # S = L - 1
    mask_LL = text.attn_mask[:length, :length]
    *blocks, last = text.transformer.resblocks
    for block in blocks:
        rows_RSW = _through_text_block(block, rows_RSW, start_11W, mask_LL[1:])
        start_11W = block(start_11W)
    ends_R = tokens.argmax(dim=1) if text_pool_of(text)[0] == "argmax" else _ends(tokens, text)
    end_R1W = rows_RSW.take_along_dim((ends_R - 1)[:, None, None], dim=1)
    mask_R11L = mask_LL[ends_R][:, None, None]
    end_R1W = _through_text_block(last, end_R1W, start_11W, mask_R11L, seen_RSW=rows_RSW)
    return _projected(text.ln_final(end_R1W)[:, 0], text.text_projection)


def _ends(tokens_RL: Tensor, text: Any) -> Tensor:
    """[R], the position of the first end token of each row."""
    end = text_pool_of(text)[1]
    assert end is not None
    return tokens_RL.eq(end).int().argmax(dim=1)


def _through_text_block(
    block: Any, queries_RQW: Tensor, prefix_BPW: Tensor, mask: Tensor, seen_RSW: Tensor | None = None
) -> Tensor:
    """One residual block for the positions after a prefix that several rows share.

    They attend to the prefix and to ``seen_RSW``, by default themselves; the mask is [Q, L], or [R, 1, Q, L].
    """
    normal_RQW = block.ln_1(queries_RQW)
    seen_RSW = normal_RQW if seen_RSW is None else block.ln_1(seen_RSW)
    x_RQW = queries_RQW + block.ls_1(_attention(block.attn, normal_RQW, block.ln_1(prefix_BPW), seen_RSW, mask))
    result: Tensor = x_RQW + block.ls_2(block.mlp(block.ln_2(x_RQW)))
    return result


def _attention(
    attention: nn.MultiheadAttention, query_RQW: Tensor, prefix_BPW: Tensor, seen_RSW: Tensor, mask: Tensor
) -> Tensor:
    """``attention`` of [R, Q, W] to the row's prefix and then to ``seen_RSW``: [R, Q, W].

    Keys and values of a prefix are computed once. (PyTorch's own forward would also turn rows and positions round
    before its products, which then are many small ones.)
    """
    width, heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = functional.linear(query_RQW, weight[:width], bias[:width])
    pair_BP, pair_RS = (functional.linear(x, weight[width:], bias[width:]) for x in (prefix_BPW, seen_RSW))
    shared_RP = pair_BP.repeat_interleave(len(seen_RSW) // len(prefix_BPW), dim=0)
    key, value = torch.cat([shared_RP, pair_RS], dim=1).chunk(2, dim=-1)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    result: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return result


def can_share_context(clip: Clip) -> bool:
    """Whether the context is independent of what follows it, and the blocks are the plain ones."""
    from open_clip.transformer import ResidualAttentionBlock

    return is_causal(clip) and all(type(block) is ResidualAttentionBlock for block in clip.text.transformer.resblocks)


def is_causal(clip: Clip) -> bool:
    """Whether nothing after a prompt's end token reaches its feature, so that padding may be cut."""
    return clip.text.attn_mask is not None and text_pool_of(clip.text)[0] in ("argmax", "eos")


def without_padding(clip: Clip, tokens: Tensor) -> Tensor:
    """Tokens [C, L] -> [C, L'], cut after the last end token: under a causal mask nothing after it reaches it."""
    if not is_causal(clip):
        return tokens
    is_end = tokens == clip.tokenizer.eot_token_id
    return tokens[:, : int(is_end.int().argmax(dim=1).max()) + 1].contiguous()


def text_pool_of(text: Any) -> tuple[str, int | None]:
    """How the text tower pools, and its end token. open_clip names them differently in its two models."""
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, text.text_eos_id
    return text.pool_type, text.eos_id


def _projected(pooled: Tensor, projection: nn.Parameter | nn.Linear | None) -> Tensor:
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _with_context(x_CLW: Tensor, context_MW: Tensor) -> Tensor:
    """Positions 1..M replaced by the context."""
    return torch.cat([x_CLW[:, :1], _expanded(context_MW, x_CLW), x_CLW[:, 1 + context_MW.shape[-2] :]], dim=1)


def _expanded(tokens_MW: Tensor, like: Tensor) -> Tensor:
    """[M, W] or [N, M, W] -> [N, M, W], N and type of ``like``."""
    return tokens_MW.to(like.dtype).expand(like.shape[0], -1, -1)
