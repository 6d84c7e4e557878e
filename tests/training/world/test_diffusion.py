import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.generated_images import write_sheet
from safetensors import safe_open

from clipship.core.errors import DataError
from clipship.training.model.builtin import MODELS, TINY
from clipship.training.model.builtin import TINY_DIFFUSION as NAME
from clipship.training.model.clip import load_clip
from clipship.world.diffusion import denoiser as last_stage
from clipship.world.diffusion import train as training
from clipship.world.diffusion.autoencoder import (
    AutoencoderRun,
    AutoencoderSettings,
    new_autoencoder,
    reconstruction_loss,
    signed_from_pixels,
)
from clipship.world.diffusion.denoiser import DenoiserSettings, min_snr_weights, noisy_batch
from clipship.world.diffusion.judge import FLOOR, JudgeRow, Question, questions, rows_of, total_of
from clipship.world.diffusion.latents import encoded_pictures, normalise_latents
from clipship.world.diffusion.pipeline import generate, load_pipeline, text_parts
from clipship.world.diffusion.text import text_encoder_from_clip, tokenizer_from_vocabulary, world_vocabulary
from clipship.world.diffusion.training_images import caption_at, draw_pictures, picture_at, pictures_ahead, scene_at
from clipship.world.drawing.captions import caption_of
from clipship.world.drawing.scenes import Scene, Thing, facts_of, is_held_out
from clipship.world.rendered_synthetic_set import request_from

TINY_DIFFUSION = MODELS / NAME
PROMPTS = ["a photo of a red striped star on grass.", "three rings", "Two big DIAMONDS in the night sky.", ""]
QUESTION = Question(name="two", class_names=("red star", "striped heart"), unseen=(False, True))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(TINY_DIFFUSION)


def small_autoencoder(**changes: Any) -> AutoencoderSettings:
    small = AutoencoderSettings(steps=4, batch_size=2, warmup_steps=1, log_every=1, evaluate_every=2)
    return dataclasses.replace(small, **changes)


def small_denoiser(**changes: Any) -> DenoiserSettings:
    small = DenoiserSettings(steps=4, batch_size=2, warmup_steps=1, log_every=1, evaluate_every=9, pictures=8)
    return dataclasses.replace(small, **changes)


# The text side.


def test_text_encoder_gives_the_states_of_clipship_tiny() -> None:
    clip = load_clip(TINY)
    vocabulary = world_vocabulary(clip)
    encoder = text_encoder_from_clip(clip, vocabulary)
    tokenizer = tokenizer_from_vocabulary(vocabulary, clip.context_length)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    clip_ids = clip.tokenize(PROMPTS)
    assert torch.equal(vocabulary.clip_ids[ids], clip_ids)
    model = clip.model
    with torch.no_grad():
        states = model.token_embedding(clip_ids) + model.positional_embedding
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
        ours = encoder(ids)
    assert torch.allclose(ours.last_hidden_state, states, atol=1e-5)
    ends = states[torch.arange(len(PROMPTS)), clip_ids.argmax(1)]
    assert torch.allclose(ours.pooler_output, ends, atol=1e-5)


def test_tokenizer_knows_every_caption_and_any_other_text_as_bytes() -> None:
    clip = load_clip(TINY)
    vocabulary = world_vocabulary(clip)
    tokenizer = tokenizer_from_vocabulary(vocabulary, clip.context_length)
    captions = [caption_at(1, index, 0) for index in range(300)]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(vocabulary.clip_ids[ids], clip.tokenize(captions))
    assert len(vocabulary.tokens) < 1000
    other = tokenizer("a dog 犬").input_ids
    assert tokenizer.unk_token_id not in other[1:-1]
    assert len(other) > 6


# The pictures.


def test_held_out_compositions_are_never_shown() -> None:
    scenes = [scene_at(1, index) for index in range(2000)]
    assert not any(map(is_held_out, scenes))
    assert {scene.kind for scene in scenes} == {"single", "group", "pair", "swatch"}


def test_captions_are_of_their_pictures_and_state_more_than_random_ones() -> None:
    mine = [len(caption_at(1, index, 0).split()) for index in range(200)]
    rng = np.random.Generator(np.random.PCG64(1))
    random = [len(caption_of(scene_at(1, index), rng).text.split()) for index in range(200)]
    assert np.mean(mine) > np.mean(random) + 0.3
    assert caption_at(1, 5, 0) == caption_at(1, 5, 0)
    assert len({caption_at(1, 5, step) for step in range(20)}) > 3
    for index in range(50):
        scene, words = scene_at(1, index), caption_at(1, index, 3).rstrip(".").split()
        colours = {thing.colour for thing in scene.things}
        assert {fact.split(":")[1] for fact in facts_of(scene) if ".colour:" in fact} == colours
        assert not {"red", "green", "blue", "yellow", "purple"} & set(words) - colours


def test_pictures_drawn_ahead_are_those_drawn_one_by_one() -> None:
    ahead = list(pictures_ahead(3, 2, 7, 2))
    assert [len(pictures) for pictures in ahead] == [2, 2, 1]
    assert np.array_equal(np.concatenate(ahead), draw_pictures(3, 2, 5))
    assert np.array_equal(ahead[1][0], picture_at(3, 4))


# The stages.


def test_reconstruction_loss_minds_colours_more_than_grain() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    grain = torch.ones(1, 3, 8, 8) * 0.1
    grain[..., ::2] *= -1
    assert float(reconstruction_loss(pixels + grain, pixels)) == pytest.approx(0.1)
    assert float(reconstruction_loss(pixels + 0.1, pixels)) == pytest.approx(0.2)


def test_latents_are_normalised_and_decode_to_the_same_pictures() -> None:
    model = new_autoencoder(1).eval().requires_grad_(False)
    pixels = signed_from_pixels(draw_pictures(1, 0, 16))
    before = model.decode(model.encode(pixels).latent_dist.mean).sample
    spread = model.encode(pixels).latent_dist.std / model.encode(pixels).latent_dist.mean.std((0, 2, 3), keepdim=True)
    normalise_latents(model, 1, 16)
    posterior = model.encode(pixels).latent_dist
    assert torch.allclose(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=0.02)
    assert torch.allclose(posterior.mean.std((0, 2, 3)), torch.ones(4), atol=0.02)
    assert torch.allclose(posterior.std, spread, rtol=0.05)
    assert torch.allclose(model.decode(posterior.mean).sample, before, atol=0.02)
    assert model.config.scaling_factor == 1


def test_latents_are_encoded_once_and_never_taken_from_another_autoencoder(tmp_path: Path) -> None:
    first, second = (new_autoencoder(seed).eval().requires_grad_(False) for seed in (1, 2))
    made = encoded_pictures(tmp_path, first, 1, 6)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(encoded_pictures(tmp_path, first, 1, 6), made)
    assert file.stat().st_mtime_ns == written
    pixels = signed_from_pixels(draw_pictures(1, 0, 6))
    assert torch.allclose(made.float(), first.encode(pixels).latent_dist.mean, atol=2e-3)
    assert not torch.allclose(encoded_pictures(tmp_path, second, 1, 6).float(), made.float(), atol=0.1)


def test_batches_are_a_function_of_the_step_and_leave_captions_out() -> None:
    latents = torch.randn(8, 4, 16, 16).half()
    settings = small_denoiser(batch_size=200, no_caption_chance=0.25)
    one, again, other = (noisy_batch(settings, latents, step, 1000) for step in (1, 1, 2))
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.latents, again.latents)
    assert one.captions == again.captions
    assert not torch.equal(one.noise, other.noise)
    assert 0.1 < one.captions.count("") / 200 < 0.4


def test_min_snr_weights_are_those_of_the_paper() -> None:
    signal = torch.tensor([0.5, 0.9, 0.1])  # SNR 1, 9, 1/9
    assert min_snr_weights(signal, 5.0).tolist() == pytest.approx([0.5, 0.5, 0.1])


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (small_autoencoder, {"steps": 0}),
        (small_autoencoder, {"kl_weight": -1.0}),
        (small_denoiser, {"decay_fraction": 0.0}),
        (small_denoiser, {"pictures": 0}),
        (small_denoiser, {"no_caption_chance": 1.0}),
        (small_denoiser, {"average_decay": -0.1}),
    ],
)
def test_settings_no_run_can_have_are_refused(make: Any, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}"):
        make(**changes)


def test_a_resumed_autoencoder_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def run_to(run: AutoencoderRun, stop: int) -> None:
        run.train(draw_pictures(1, 2 * step, 2) for step in range(run.step, stop))

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole, stopped, resumed = (
        AutoencoderRun(tmp_path / name, small_autoencoder()) for name in ("whole", *2 * ("resumed",))
    )
    run_to(whole, 4)
    run_to(stopped, 3)
    stopped.log(step=9)  # what a killed run logged after its last checkpoint
    resumed.restore()
    run_to(resumed, 4)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    logs = [[json.loads(line) for line in run.log_path.read_text().splitlines()] for run in (whole, resumed)]
    assert [(line["step"], line["loss"]) for line in logs[0]] == [(line["step"], line["loss"]) for line in logs[1]]


def small_training(out: Path, *, resume: bool = False) -> dict[str, float]:
    first, last = small_autoencoder(checkpoint_every_s=0.0), small_denoiser(steps=6, checkpoint_every_s=0.0)
    return training.train(out, first, last, resume=resume, judged=[QUESTION])


def test_a_killed_run_goes_on_and_makes_the_same_pipeline(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code = (
        "from pathlib import Path; from tests.training.world import test_diffusion as here; "
        f"here.small_training(Path({str(killed)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (killed / last_stage.CHECKPOINT_FILE).is_file():
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    worth = small_training(whole)
    with pytest.raises(DataError, match="add --resume"):
        small_training(killed)
    assert small_training(killed, resume=True) == worth
    for path in (whole / "pipeline").rglob("*.safetensors"):
        assert path.read_bytes() == (killed / path.relative_to(whole)).read_bytes(), path
    logs = [(out / last_stage.LOG_FILE).read_text().splitlines() for out in (whole, killed)]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert list(dict.fromkeys(steps[1])) == [0, 1, 2, 3, 4, 5, 6]
    assert (killed / "pipeline" / last_stage.LOG_FILE).read_bytes() == (killed / last_stage.LOG_FILE).read_bytes()
    assert small_training(whole, resume=True) == worth  # nothing is left to do


def test_a_run_that_never_started_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run without --resume"):
        small_training(tmp_path, resume=True)
    AutoencoderRun(tmp_path, small_autoencoder()).save_checkpoint()
    with pytest.raises(DataError, match="was made with"):
        AutoencoderRun(tmp_path, small_autoencoder(seed=2)).restore()


# The judge.


def test_questions_are_told_apart_into_seen_and_unseen() -> None:
    asked = questions()
    assert len(asked) == 11
    for question in asked:
        assert len(set(question.class_names)) == len(question.class_names) == len(question.unseen)
    for question in asked[-2:]:
        for name, unseen in zip(question.class_names, question.unseen, strict=True):
            request = request_from(name)
            thing = Thing(shape=str(request.shape), colour=str(request.colour), texture=str(request.texture))
            grounds = [Scene(kind="single", things=(thing,), background=ground) for ground in ("grass", "sand", "snow")]
            assert all(map(is_held_out, grounds)) == unseen


def test_rows_are_true_when_the_share_is_enough_and_add_up() -> None:
    enough = JudgeRow(name="a", shown="seen", images=10, drawn=50.0, generated=50.0 * FLOOR)
    short = JudgeRow(name="b", shown="seen", images=30, drawn=50.0, generated=50.0 * FLOOR - 1)
    assert enough
    assert not short
    total = total_of([enough, short, dataclasses.replace(short, shown="unseen")], "seen")
    assert (total.images, total.drawn) == (40, 50.0)
    assert total.generated == pytest.approx(0.25 * enough.generated + 0.75 * short.generated)
    assert str(enough).split() == ["a", "seen", "10", "50.0", "30.0", "60.0"]


# The committed pipeline.


def test_all_committed_weights_together_are_small() -> None:
    sizes = {path: path.stat().st_size for path in MODELS.rglob("*.safetensors")}
    assert {path.parent.name for path in sizes} == {TINY, "unet", "vae", "text_encoder"}
    assert sum(sizes.values()) <= 40e6


def test_plain_diffusers_loads_the_folder_and_equal_seeds_give_equal_images(pipeline: Any) -> None:
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(TINY_DIFFUSION)
    assert type(plain).__name__ == "StableDiffusionPipeline"
    assert {getattr(plain, name).dtype for name in ("unet", "vae", "text_encoder")} == {torch.float32}
    one, again, other = (
        generate(made, [PROMPTS[0]], [seed], steps=2) for made, seed in ((plain, 1), (pipeline, 1), (pipeline, 2))
    )
    assert one[0].size == (64, 64)
    assert one[0].tobytes() == again[0].tobytes()
    assert one[0].tobytes() != other[0].tobytes()


def test_the_file_holds_no_more_digits_than_float16_and_the_text_tower_of_clipship_tiny(pipeline: Any) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert all(torch.equal(tensor, tensor.half().float()) for tensor in part.state_dict().values())
    with safe_open(TINY_DIFFUSION / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - not a dict
    encoder, tokenizer = text_parts()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], tensor), name
    assert tokenizer(PROMPTS[0]).input_ids == pipeline.tokenizer(PROMPTS[0]).input_ids


def test_the_folder_names_no_machine() -> None:
    for path in TINY_DIFFUSION.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_an_image_changes_into_what_the_prompt_says(pipeline: Any) -> None:
    from diffusers import AutoPipelineForImage2Image

    start = generate(pipeline, ["a photo of a large red square on snow."], [1], steps=10)[0]
    changer = AutoPipelineForImage2Image.from_pipe(pipeline)
    changer.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    changed = changer("a photo of a large blue square on snow.", image=start, strength=0.9, generator=noise).images[0]
    red, blue = (np.asarray(image, np.float32)[24:40, 24:40].mean((0, 1)) for image in (start, changed))
    assert red[0] - red[2] > blue[0] - blue[2] + 40


def test_clipship_tiny_names_generated_images(pipeline: Any) -> None:
    (prints,) = (question for question in questions() if question.name == "prints")
    rows = rows_of(load_clip(TINY), pipeline, prints, per_class=1, steps=10)
    assert [row.shown for row in rows] == ["seen", "unseen"]
    assert sum(row.generated * row.images for row in rows) / 24 >= 25  # chance is 4.2


def test_contact_sheet_has_a_line_for_every_kind_of_name(tmp_path: Path, pipeline: Any) -> None:
    from PIL import Image

    write_sheet(tmp_path / "sheet.png", pipeline, steps=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 20 * 66


def test_log_is_of_the_run_that_made_the_weights() -> None:
    for stage in ("autoencoder", "denoiser"):
        lines = [json.loads(line) for line in (TINY_DIFFUSION / f"{stage}.log.jsonl").read_text().splitlines()]
        assert lines[0]["event"] == "started"
        assert lines[-1]["event"] == "finished"
