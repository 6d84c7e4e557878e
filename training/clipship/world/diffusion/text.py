"""The text side of the pipeline: `clipship-tiny`'s text tower and tokenizer in the classes that diffusers loads.

CLIP's vocabulary of 49,408 byte pairs is reduced to the bytes and to what the captions of the world need. Every other
word becomes bytes, which the model has never seen.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.training.model.clip import Clip
from clipship.world.pretraining.train import CompactTokens

# Shapes: N texts, L tokens, W text width.

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
"""open_clip pads with id 0, which is the token of an exclamation mark, as Stable Diffusion 2 does."""


class TrimmedVocabulary:
    """The byte pairs that some tokens of CLIP's tokenizer are made of.

    Keeps the bytes, the tokens of `kept_ids`, and all that is joined on the way to them: `tokens` in the order of their
    new ids, their `clip_ids` in CLIP's vocabulary, and the `merges`, most frequent first.
    """

    def __init__(self, tokenizer: Any, kept_ids: Iterable[int]) -> None:
        joined_from = {"".join(pair): pair for pair in tokenizer.bpe_ranks}
        specials = {tokenizer.decoder[tokenizer.sot_token_id], tokenizer.decoder[tokenizer.eot_token_id]}
        kept = {f"{byte}{end}" for byte in tokenizer.byte_encoder.values() for end in ("", "</w>")}
        waiting = [token for id_ in kept_ids if (token := tokenizer.decoder[int(id_)]) not in specials]
        while waiting:
            token = waiting.pop()
            waiting += [] if token in kept else joined_from[token]
            kept.add(token)
        ids = sorted(tokenizer.encoder[token] for token in kept)
        names = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
        self.clip_ids: Tensor = torch.tensor([*ids, *names])
        self.tokens = tuple(names.get(id_, tokenizer.decoder[id_]) for id_ in self.clip_ids.tolist())
        pairs = [pair for token in kept if (pair := joined_from.get(token)) is not None]
        self.merges = tuple(sorted(pairs, key=tokenizer.bpe_ranks.__getitem__))


def world_vocabulary(clip: Clip) -> TrimmedVocabulary:
    """Return what the captions of the world need of the tokenizer of `clip`."""
    return TrimmedVocabulary(clip.tokenizer, CompactTokens(clip.context_length).used_ids.tolist())


def tokenizer_from_vocabulary(vocabulary: TrimmedVocabulary, context_length: int) -> Any:
    """Return a transformers `CLIPTokenizer` that gives the ids of the trimmed vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab={token: id_ for id_, token in enumerate(vocabulary.tokens)},
        merges=list(vocabulary.merges),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context_length,
    )


def text_encoder_from_clip(clip: Clip, vocabulary: TrimmedVocabulary) -> Any:
    """Return a transformers `CLIPTextModel` with the weights of open_clip's text tower.

    Its `last_hidden_state`, float32 [N, L, W], equals open_clip's states after the final norm; the rows of the token
    table are those of the trimmed vocabulary.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = clip.text.transformer.resblocks
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens)}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary.tokens),
        hidden_size=clip.text_width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        projection_dim=clip.embed_dim,
        num_hidden_layers=clip.text_layers,
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=clip.context_length,
        hidden_act="gelu",
        bos_token_id=ids[START],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    encoder = CLIPTextModel(config)
    prefix, _, _ = next(iter(encoder.state_dict())).partition("embeddings.")  # "text_model." in transformers 4
    state = {f"{prefix}{name}": tensor for name, tensor in _text_state_from_clip(clip, vocabulary).items()}
    encoder.load_state_dict(state, strict=True)
    return encoder.eval().requires_grad_(False)


def _text_state_from_clip(clip: Clip, vocabulary: TrimmedVocabulary) -> dict[str, Tensor]:
    text = clip.text
    state = {
        "embeddings.token_embedding.weight": text.token_embedding.weight[vocabulary.clip_ids],
        "embeddings.position_embedding.weight": text.positional_embedding,
        "final_layer_norm.weight": text.ln_final.weight,
        "final_layer_norm.bias": text.ln_final.bias,
    }
    for index, block in enumerate(text.transformer.resblocks):
        state |= {f"encoder.layers.{index}.{name}": tensor for name, tensor in _block_state_from_clip(block).items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _block_state_from_clip(block: Any) -> dict[str, Tensor]:
    modules = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "self_attn.out_proj": block.attn.out_proj}
    modules |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
    state = {f"{name}.{kind}": getattr(module, kind) for name, module in modules.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)  # open_clip stacks query, key and value
        state |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return state


def write_tokenizer(folder: Path, vocabulary: TrimmedVocabulary, context_length: int) -> None:
    """Write the tokenizer into a folder that `CLIPTokenizer.from_pretrained` loads, of transformers 4 as well as 5."""
    tokenizer_from_vocabulary(vocabulary, context_length).save_pretrained(folder)
    # transformers 5 writes one file, transformers 4 reads these two.
    write_json_atomic(folder / "vocab.json", {token: id_ for id_, token in enumerate(vocabulary.tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
    write_text_atomic(folder / "merges.txt", "\n".join(lines) + "\n")
