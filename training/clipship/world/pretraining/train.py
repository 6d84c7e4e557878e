"""Pre-train `clipship-tiny` on rendered scenes: `python -m clipship.world.pretraining.train --out DIR [--resume]`.

The result is a folder that `open_clip.create_model("local-dir:DIR")` loads. The run is seeded and writes a checkpoint
every two minutes; killed and resumed, it takes the batches that an uninterrupted run would have taken.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipship.core.files import replace_file, write_json_atomic
from clipship.world.drawing.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    held_out_pairs,
)
from clipship.world.drawing.captions import ANY_SHAPE, MANY_TEMPLATES, SINGLE_TEMPLATES, SWATCH_TEMPLATES
from clipship.world.drawing.render import render_scene
from clipship.world.drawing.scenes import Scene, Thing, pick
from clipship.world.drawing.stencils import PICTURE_PX
from clipship.world.pretraining.captioned_batches import WORD_AXES, CaptionedBatch, batches
from clipship.world.training_run import (
    ResumableRun,
    RunSettings,
    decayed_optimizer,
    descend,
    parsed_settings,
    round_to_half,
)

# Shapes: N pictures, C classes, L tokens, W text width, D embedding width.

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": PICTURE_PX, "patch_size": 16, "width": 192, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
WORD_CAPTIONS: tuple[str, ...] = tuple(caption for axis in WORD_AXES.values() for caption in axis.captions)
MAX_LOGIT_SCALE = 100.0
CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "pretrain.log.jsonl"
_UNSEEN_SEED = 9_001


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """The settings that made the committed model."""

    steps: int = 3200
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    log_every: int = 80
    evaluate_every: int = 400


class CompactTokens:
    """CLIP's tokenizer, with the few ids that captions use renumbered from 0 in the same order.

    Otherwise every step would update the 49,408 x W token table for about 150 rows. The order is kept because the text
    tower reads its output at the highest id, the end of the text.
    """

    def __init__(self, context_length: int) -> None:
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
        words = [*SHAPES, *COLOURS, *TEXTURES, *COUNT_WORDS, *PLURALS.values(), *RELATIONS, *BACKGROUNDS.values()]
        words += [*ANY_SHAPE, *(f"{word}s" for word in ANY_SHAPE), *(w for values in SIZES.values() for w in values)]
        words += [*SINGLE_TEMPLATES, *MANY_TEMPLATES, *SWATCH_TEMPLATES, "an", "and"]
        texts = [word.replace("{a}", "a").replace("{}", " ") for word in words]
        self.used_ids: Tensor = torch.unique(self._tokenizer(texts))

    def __call__(self, texts: tuple[str, ...]) -> Tensor:
        """Return compact ids, int64 [N, L], cut after the longest text."""
        ids = self._tokenizer(list(texts))
        compact = torch.searchsorted(self.used_ids, ids)
        if not torch.equal(self.used_ids[compact.clamp(max=len(self.used_ids) - 1)], ids):
            raise ValueError(f"a caption has a word that is missing from the world's vocabulary: {texts}")
        return compact[:, : int(compact.argmax(1).max()) + 1]


def new_model(seed: int, tokens: CompactTokens) -> Any:
    """Return a fresh open_clip model whose token table has only the rows that captions use."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL_CONFIG)
    table = nn.Embedding(len(tokens.used_ids), model.token_embedding.embedding_dim)
    nn.init.normal_(table.weight, std=0.02)
    model.token_embedding = table
    return model


def encode_captions(model: Any, ids_NL: Tensor) -> Tensor:
    """Return unit text features [N, D]; unlike open_clip's own, accepts ids that are cut to a shorter length."""
    length = ids_NL.shape[1]
    x_NLW = model.token_embedding(ids_NL) + model.positional_embedding[:length]
    x_NLW = model.ln_final(model.transformer(x_NLW, attn_mask=model.attn_mask[:length, :length]))
    pooled_NW = x_NLW[torch.arange(len(ids_NL)), ids_NL.argmax(1)]
    return F.normalize(pooled_NW @ model.text_projection, dim=-1)


def encode_by_length(model: Any, ids_NL: Tensor) -> Tensor:
    """Return the same as `encode_captions`, but encode short texts without the padding that long ones need."""
    lengths_N = ids_NL.argmax(1) + 1
    order_N = lengths_N.argsort(stable=True)
    features = [encode_captions(model, ids_NL[part, : int(lengths_N[part].max())]) for part in order_N.chunk(3)]
    return torch.cat(features)[order_N.argsort()]


def pixels_from(images: Any) -> Tensor:
    """Return normalised float32 [N, 3, H, W] from uint8 [N, H, W, 3]."""
    mean, std = (torch.tensor(PREPROCESS_CONFIG[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return (scaled / 255 - mean) / std


def batch_loss(model: Any, batch: CaptionedBatch, tokens: CompactTokens) -> Tensor:
    """Return the contrastive loss plus the word loss, which alone teaches shapes about as fast as colours."""
    image_ND = F.normalize(model.encode_image(pixels_from(batch.pixels)), dim=-1)
    scaled_ND = model.logit_scale.exp() * image_ND
    logits_NN = scaled_ND @ encode_by_length(model, tokens(batch.captions)).T
    word_logits = scaled_ND @ encode_captions(model, tokens(WORD_CAPTIONS)).T
    return contrastive_loss(logits_NN, torch.from_numpy(batch.fits)) + word_loss(word_logits, batch.words)


def contrastive_loss(logits_NN: Tensor, fits_NN: Tensor) -> Tensor:
    """Return the symmetric contrastive loss; captions that also fit another picture are no negatives for it."""
    own = torch.eye(len(logits_NN), dtype=torch.bool)
    logits_NN = logits_NN.masked_fill(fits_NN & ~own, -1e4)
    target = torch.arange(len(logits_NN))
    return (F.cross_entropy(logits_NN, target) + F.cross_entropy(logits_NN.T, target)) / 2


def word_loss(logits: Tensor, words: dict[str, Any]) -> Tensor:
    """Return the mean cross entropy of the short captions of every axis (`stream.WORD_AXES`)."""
    losses, start = [], 0
    for name, axis in WORD_AXES.items():
        end = start + len(axis.captions)
        target = torch.from_numpy(words[name])
        if bool((target >= 0).any()):
            losses.append(F.cross_entropy(logits[:, start:end], target, ignore_index=-1))
        start = end
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@dataclass(frozen=True, kw_only=True)
class UnseenCompositions:
    """Pictures of held-out single things, to measure accuracy on compositions the model has never seen."""

    pixels: Any
    labels: Tensor
    prompts: tuple[str, ...]


def unseen_compositions(classes: int = 100, per_class: int = 4) -> UnseenCompositions:
    """Draw `per_class` pictures of each of `classes` colour x texture x shape compositions that are held out."""
    rng = np.random.Generator(np.random.PCG64(_UNSEEN_SEED))
    things: list[Thing] = []
    while len(things) < classes:
        colour, shape = sorted(held_out_pairs("colour", "shape"))[int(rng.integers(len(SHAPES) * len(COLOURS) // 4))]
        thing = Thing(shape=shape, colour=colour, texture=pick(rng, TEXTURES[1:]))
        if thing not in things:
            things.append(thing)
    scenes = [Scene(kind="single", things=(t,), background=pick(rng, tuple(BACKGROUNDS))) for t in things]
    pixels = np.stack([render_scene(scene, rng) for scene in scenes for _ in range(per_class)])
    prompts = tuple(f"a photo of a {t.colour} {t.texture} {t.shape}." for t in things)
    return UnseenCompositions(pixels=pixels, labels=torch.arange(classes).repeat_interleave(per_class), prompts=prompts)


@torch.no_grad()
def accuracy_on(model: Any, unseen: UnseenCompositions, tokens: CompactTokens) -> float:
    """Return top-1 accuracy in per cent over the unseen compositions."""
    model.eval()
    image_ND = F.normalize(model.encode_image(pixels_from(unseen.pixels)), dim=-1)
    scores_NC = image_ND @ encode_captions(model, tokens(unseen.prompts)).T
    model.train()
    return float((scores_NC.argmax(1) == unseen.labels).float().mean()) * 100


class PretrainRun(ResumableRun[PretrainSettings, CaptionedBatch]):
    """The pre-training of the model."""

    log_file, checkpoint_file = LOG_FILE, CHECKPOINT_FILE

    def __init__(self, out: Path, settings: PretrainSettings) -> None:
        self.tokens = CompactTokens(MODEL_CONFIG["text_cfg"]["context_length"])
        self.model = new_model(settings.seed, self.tokens)
        self.optimizer = decayed_optimizer(self.model, settings, betas=(0.9, 0.98))
        self.unseen = unseen_compositions()
        super().__init__(out, settings, model=self.model, optimizer=self.optimizer)

    def take_step(self, batch: CaptionedBatch) -> float:
        """Learn from a batch and return its loss."""
        loss = batch_loss(self.model, batch, self.tokens)
        value = descend(self.optimizer, loss, self.settings.learning_rate_at(self.step))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=float(np.log(MAX_LOGIT_SCALE)))
        return value

    def measure(self) -> dict[str, float]:
        """Return top-1 accuracy over unseen compositions."""
        return {"unseen_top1": round(accuracy_on(self.model, self.unseen, self.tokens), 2)}


def write_model(out: Path, model: Any, tokens: CompactTokens) -> None:
    """Write the folder that open_clip loads: JSON config and float16 weights, unused token rows zero."""
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    compact = state["token_embedding.weight"]
    table = torch.zeros((MODEL_CONFIG["text_cfg"]["vocab_size"], compact.shape[1]), dtype=compact.dtype)
    table[tokens.used_ids] = compact
    state["token_embedding.weight"] = table
    with replace_file(out / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    write_json_atomic(out / "open_clip_config.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG})


def pretrain(out: Path, settings: PretrainSettings, *, resume: bool = False, workers: int = 1) -> float:
    """Train, write the model folder and return top-1 accuracy in per cent over unseen compositions.

    Args:
        out: folder for the model, the log and the checkpoint, which a longer run can continue.
        resume: continue from the checkpoint in `out`.
        workers: processes that draw pictures.

    Raises:
        DataError: `out` has a checkpoint and `resume` is not set, or the other way round.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = PretrainRun(out, settings)
    run.begin(resume=resume)
    run.train(batches(settings.seed, run.step, settings.steps, settings.batch_size, workers=workers))
    round_to_half(run.model)
    top1 = accuracy_on(run.model, run.unseen, run.tokens)
    write_model(out, run.model, run.tokens)
    images = run.step * settings.batch_size
    run.log(event="finished", step=run.step, images=images, train_s=round(run.train_s), unseen_top1=round(top1, 2))
    return top1


def main() -> None:
    """Run the script."""
    options, (settings,) = parsed_settings("clipship.world.pretraining.train", __doc__, {"": PretrainSettings()})
    out = options["out"]
    top1 = pretrain(out, settings, resume=options["resume"], workers=options["workers"])
    sys.stdout.write(f"{out}: {top1:.1f} % top-1 over unseen compositions\n")


if __name__ == "__main__":
    main()
