import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from benchmarks import learned_context
from benchmarks.zero_shot import zero_shot
from PIL import Image

from clipship.core.errors import DataError
from clipship.training.config import TrainConfig
from clipship.training.losses import classification_loss
from clipship.training.methods import Task
from clipship.training.methods.coop import CoOp
from clipship.training.methods.zero_shot import ZeroShot
from clipship.training.model.builtin import MODELS, TINY
from clipship.training.model.clip import load_clip
from clipship.training.recipes import TINY_TEMPLATES, config_from_recipe
from clipship.world import datasets as world_datasets
from clipship.world.datasets import (
    SPLITS,
    WORLD_DATASETS,
    WORLD_VARIANTS,
    WorldDataset,
    compositions_of,
    dataset_named,
    draw_example,
    is_unseen,
    write_world,
)
from clipship.world.drawing.attributes import (
    AXES,
    BACKGROUNDS,
    SHAPES,
    TEXTURES,
    held_out_pairs,
)
from clipship.world.drawing.captions import MANY_TEMPLATES, SINGLE_TEMPLATES, caption_of
from clipship.world.drawing.render import render_scene
from clipship.world.drawing.scenes import Scene, Thing, facts_of, is_held_out, sample_scene
from clipship.world.drawing.stencils import background_tile, shape_mask, texture_tile
from clipship.world.pretraining import train as pretraining
from clipship.world.pretraining.captioned_batches import (
    LONE_PLAIN_STEPS,
    LONE_STEPS,
    WORD_AXES,
    batches,
    fits_matrix,
    make_batch,
)
from clipship.world.rendered_synthetic_set import request_from
from clipship.world.training_run import round_to_half

PINNED_MEANS = [
    [176, 167, 190], [59, 107, 40], [103, 128, 49], [146, 109, 68],
    [197, 198, 219], [168, 189, 174], [149, 139, 165], [59, 133, 183],
]  # fmt: skip
PINNED_DATASETS = [
    # name, sha256 of the class names, sha256 of six pictures (both cut)
    ("sketches", "75641ea3de5581c2", "565c7ad16bfd6929"),
    ("prints", "39c84b89445c36ca", "0e7f9063856150c0"),
    ("neon", "3fc684ac268cbb7e", "f47dabfe1b5d46f0"),
    ("places", "a7a1d7ddcf65a5c1", "e4f5f5edf383fafc"),
    ("groups", "0642ac6e67983e4f", "2d2a1e3f6fccb708"),
    ("fabrics", "adf30eec84f06692", "c0b4aaff3f7fd62d"),
]
PAIRS = [("colour", "shape"), ("texture", "shape"), ("background", "shape"), ("count", "shape"), ("colour", "texture")]


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def tiny_dataset() -> WorldDataset:
    return dataclasses.replace(WORLD_DATASETS[0], train_per_class=2, val_per_class=1, test_per_class=1)


# The vocabulary and what is held out.


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_quarter_of_the_pairs_is_held_out_and_no_word_loses_all_its_partners(first: str, second: str) -> None:
    held_out = held_out_pairs(first, second)
    assert len(held_out) / (len(AXES[first]) * len(AXES[second])) == pytest.approx(0.25, abs=0.05)
    for axis, position in ((first, 0), (second, 1)):
        lost = [sum(pair[position] == word for pair in held_out) for word in AXES[axis]]
        partners = len(AXES[second if axis == first else first])
        assert max(lost) <= -(-partners // 4)


def test_pretraining_never_shows_a_held_out_composition() -> None:
    rng = generator(1)
    kinds = set()
    for _ in range(1500):
        scene = sample_scene(rng)
        kinds.add(scene.kind)
        things = scene.things if scene.kind != "swatch" else ()
        for thing in things:
            assert (thing.colour, thing.shape) not in held_out_pairs("colour", "shape")
            assert (thing.texture, thing.shape) not in held_out_pairs("texture", "shape")
            assert (scene.background, thing.shape) not in held_out_pairs("background", "shape")
    assert kinds == {"single", "group", "pair", "swatch"}


def test_shapes_textures_and_backgrounds_are_all_different() -> None:
    masks = [np.asarray(shape_mask(shape), np.float32) / 255 for shape in SHAPES]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert float(np.abs(first - second).mean()) > 0.05
    tiles = [texture_tile(texture, 0).tobytes() for texture in TEXTURES]
    grounds = [background_tile(background, 0).tobytes() for background in BACKGROUNDS]
    assert len(set(tiles)) == len(TEXTURES)
    assert len(set(grounds)) == len(BACKGROUNDS)


# Pictures and captions.


def test_pictures_are_a_function_of_the_seed_pinned_across_machines() -> None:
    batch = make_batch(1, 2, 64)
    means = batch.pixels[:8].astype(np.float64).mean((1, 2))
    assert hashlib.sha256("|".join(batch.captions).encode()).hexdigest()[:12] == "6915d5f3ec82"
    assert np.abs(means - PINNED_MEANS).max() < 2  # resampling may round differently elsewhere
    again = make_batch(1, 2, 64)
    assert np.array_equal(batch.pixels, again.pixels)
    assert not np.array_equal(batch.pixels, make_batch(2, 2, 64).pixels)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_a_thing_has_its_colour(colour: str) -> None:
    scene = Scene(kind="single", things=(Thing(shape="square", colour=colour, size="large"),), background="snow")
    centre = render_scene(scene, generator(3))[26:38, 26:38].astype(np.float32).mean((0, 1))
    assert int(centre.argmax()) == ["red", "green", "blue"].index(colour)


@pytest.mark.parametrize(("relation", "axis", "order"), [("above", 1, 1), ("below", 1, -1), ("left of", 0, 1)])
def test_relations_are_drawn_as_they_are_said(relation: str, axis: int, order: int) -> None:
    things = (Thing(shape="circle", colour="red"), Thing(shape="circle", colour="blue"))
    scene = Scene(kind="pair", things=things, background="paper", relation=relation)
    pixels = render_scene(scene, generator(4)).astype(np.float32)
    redness = np.clip(pixels[..., 0] - pixels[..., 2] - 60, 0, None)
    blueness = np.clip(pixels[..., 2] - pixels[..., 0] - 60, 0, None)
    grid = np.mgrid[0:64, 0:64][1 - axis]
    red_at, blue_at = ((grid * mask).sum() / mask.sum() for mask in (redness, blueness))
    assert (blue_at - red_at) * order > 10


def test_captions_state_only_facts_and_leave_words_out() -> None:
    rng = generator(5)
    scene = sample_scene(rng)
    captions = [caption_of(scene, rng) for _ in range(60)]
    assert all(caption.facts <= facts_of(scene) for caption in captions)
    assert len({len(caption.facts) for caption in captions}) > 2
    for caption in captions:
        for fact in caption.facts:
            name, value = fact.split(":")
            if name.split(".")[-1] in ("colour", "texture"):
                assert value in caption.text


def test_templates_are_of_forms_that_captions_have() -> None:
    forms = {form.replace("{a}", "a") for form in (*SINGLE_TEMPLATES, *MANY_TEMPLATES)}
    assert set(TINY_TEMPLATES) <= forms
    assert 8 <= len(set(TINY_TEMPLATES)) == len(TINY_TEMPLATES)


def test_fits_matrix_knows_which_caption_is_true_of_which_picture() -> None:
    red_star = frozenset({"kind:single", "first.colour:red", "first.shape:star"})
    blue_star = frozenset({"kind:single", "first.colour:blue", "first.shape:star"})
    star = frozenset({"kind:single", "first.shape:star"})
    assert fits_matrix([red_star, blue_star], [red_star, star]).tolist() == [[True, True], [False, True]]
    batch = make_batch(1, 3, 32)
    assert batch.fits.diagonal().all()


def test_lessons_get_harder() -> None:
    plain, lone, late = (
        make_batch(1, steps[-1] | 1, 64) for steps in (LONE_PLAIN_STEPS[:-1], LONE_STEPS[:-1], range(9000))
    )
    for easy in (plain, lone):
        assert (easy.words["shape"] >= 0).all(), "something else than single things"
        assert len(set(easy.words["colour"].tolist())) <= 3
    assert set(plain.words["texture"].tolist()) == {TEXTURES.index("plain")}
    assert len(set(lone.words["texture"].tolist())) == len(TEXTURES)
    assert (late.words["count"] >= 0).any()


def test_words_ask_only_what_the_scene_answers() -> None:
    batch = make_batch(1, 4, 64)
    for name, axis in WORD_AXES.items():
        asked = batch.words[name] >= 0
        assert 0 < asked.sum() < 64
        assert batch.words[name].max() < len(axis.captions)
    assert not ((batch.words["shape"] >= 0) & (batch.words["shapes"] >= 0)).any()
    assert np.array_equal(batch.words["count"] >= 0, batch.words["shapes"] >= 0)
    assert set(batch.words["count"].tolist()) == {-1, 1, 2, 3}


def test_stream_goes_on_where_it_stopped() -> None:
    whole = list(batches(1, 0, 3, 4, workers=1))
    rest = list(batches(1, 2, 3, 4, workers=2))
    assert len(whole) == 3
    assert len(rest) == 1
    assert np.array_equal(whole[2].pixels, rest[0].pixels)
    assert whole[2].captions == rest[0].captions


def test_drawing_is_quick() -> None:
    rng = generator(6)
    scenes = [sample_scene(rng) for _ in range(200)]
    for scene in scenes:
        render_scene(scene, rng)
    started = time.process_time()
    for scene in scenes:
        render_scene(scene, rng)
    assert (time.process_time() - started) / len(scenes) < 0.006


# The data sets.


@pytest.mark.parametrize("dataset", WORLD_DATASETS, ids=lambda dataset: dataset.name)
def test_halves_share_all_their_words_or_none_and_never_a_composition(dataset: WorldDataset) -> None:
    compositions = compositions_of(dataset)
    assert 20 <= len(compositions) <= 30
    assert len(set(compositions)) == len(compositions) == len(set(dataset.class_names))
    base, new = compositions[: dataset.num_base], compositions[dataset.num_base :]
    for side in (0, 1):
        base_words, new_words = ({pair[side] for pair in half} for half in (base, new))
        if dataset.halves == "apart":
            assert base_words.isdisjoint(new_words)
        else:
            assert new_words <= base_words
    assert 2 <= sum(is_unseen(dataset.axes, pair) for pair in new) < len(new)


def test_some_data_sets_have_their_words_apart() -> None:
    assert sum(dataset.halves == "apart" for dataset in WORLD_DATASETS) >= 3


@pytest.mark.parametrize(("name", "of_classes", "of_pixels"), PINNED_DATASETS, ids=[one[0] for one in PINNED_DATASETS])
def test_published_data_sets_stay_as_they_are(name: str, of_classes: str, of_pixels: str) -> None:
    dataset = dataset_named(name)
    assert hashlib.sha256("\n".join(dataset.class_names).encode()).hexdigest()[:16] == of_classes
    pixels = b"".join(draw_example(dataset, split, label, 3).tobytes() for split in SPLITS for label in (0, 13))
    assert hashlib.sha256(pixels).hexdigest()[:16] == of_pixels


@pytest.mark.parametrize("variant", WORLD_VARIANTS, ids=lambda variant: variant.name)
def test_variants_show_the_classes_of_a_data_set_in_another_look(variant: WorldDataset) -> None:
    source = dataset_named(variant.name.split("_")[0])
    assert variant.class_names == source.class_names
    assert variant.template == source.template
    assert [variant.per_class(split) for split in SPLITS] == [0, 0, source.test_per_class]
    picture = draw_example(variant, "test", 0, 0)
    assert np.array_equal(picture, draw_example(variant, "test", 0, 0))
    assert not np.array_equal(picture[:72, :72], draw_example(source, "test", 0, 0)[:72, :72])


def test_names_of_data_sets_and_variants_are_their_own() -> None:
    known = (*WORLD_DATASETS, *WORLD_VARIANTS)
    for field in ("name", "split_file", "seed"):
        assert len({getattr(dataset, field) for dataset in known}) == len(known), field


@pytest.mark.parametrize("dataset", WORLD_DATASETS, ids=lambda dataset: dataset.name)
def test_the_world_can_draw_the_classes_of_its_data_sets(dataset: WorldDataset) -> None:
    for name, composition in zip(dataset.class_names, compositions_of(dataset), strict=True):
        request = vars(request_from(name))
        for axis, word in zip(dataset.axes, composition, strict=True):
            assert request[axis] == (AXES["count"].index(word) + 1 if axis == "count" else word)


@pytest.mark.parametrize("dataset", WORLD_DATASETS, ids=lambda dataset: dataset.name)
def test_examples_vary_in_size_and_content_but_not_from_call_to_call(dataset: WorldDataset) -> None:
    pictures = [draw_example(dataset, "train", 0, index) for index in range(3)]
    assert all(72 <= side <= 128 for picture in pictures for side in picture.shape[:2])
    assert len({picture.shape for picture in pictures}) > 1
    assert np.array_equal(pictures[0], draw_example(dataset, "train", 0, 0))
    assert not np.array_equal(
        draw_example(dataset, "test", 0, 0)[:72, :72], draw_example(dataset, "train", 0, 0)[:72, :72]
    )


def test_write_world_writes_the_coop_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset()
    monkeypatch.setattr(world_datasets, "WORLD_DATASETS", (dataset,))
    seen: list[tuple[int, str]] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        assert (title, total) == ("drawing", 96)
        yield lambda done, note: seen.append((done, note))

    with monkeypatch.context() as patch:
        patch.setattr(world_datasets, "progress", progress)
        (folder,) = write_world(tmp_path, names=[dataset.name])
    assert folder == tmp_path / dataset.name
    split = json.loads((folder / dataset.split_file).read_text())
    assert {name: len(rows) for name, rows in split.items()} == {"train": 48, "val": 24, "test": 24}
    for relative, label, name in split["train"] + split["val"] + split["test"]:
        assert dataset.class_names[label] == name
        with Image.open(folder / dataset.image_dir / relative) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"
    assert seen[-1] == (96, dataset.name)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert [path.name for path in tmp_path.iterdir()] == [dataset.name]

    first = folder / dataset.image_dir / split["train"][0][0]
    written_at = first.stat().st_mtime_ns
    assert write_world(tmp_path, names=[dataset.name]) == [folder]
    assert first.stat().st_mtime_ns == written_at, "a complete data set was written again"
    (folder / "world.json").write_text(json.dumps({"format": "clipship-world", "generator_version": 0}))
    with pytest.raises(DataError, match="another version"):
        write_world(tmp_path, names=[dataset.name])


def test_a_variant_is_written_when_asked_for_and_has_test_pictures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = dataclasses.replace(WORLD_VARIANTS[0], test_per_class=1)
    monkeypatch.setattr(world_datasets, "WORLD_DATASETS", (tiny_dataset(),))
    monkeypatch.setattr(world_datasets, "WORLD_VARIANTS", (variant,))
    (folder,) = write_world(tmp_path, names=[variant.name])
    split = json.loads((folder / variant.split_file).read_text())
    assert {name: len(rows) for name, rows in split.items()} == {"train": 0, "val": 0, "test": 24}
    assert len(list(folder.rglob("*.jpg"))) == 24
    assert [path.name for path in write_world(tmp_path / "all")] == ["sketches"]


def test_records_of_earlier_releases_still_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset()
    monkeypatch.setattr(world_datasets, "WORLD_DATASETS", (dataset,))
    (folder,) = write_world(tmp_path)
    fields = json.loads((folder / "world.json").read_text())["dataset"]
    assert not {"halves", "class_seed"} & set(fields), "data sets written before these fields came would be refused"


def test_write_world_refuses_foreign_folders_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "neon").mkdir()
    (tmp_path / "neon" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="was not written by the built-in world"):
        write_world(tmp_path, names=["neon"])
    with pytest.raises(ValueError, match="did you mean sketches"):
        write_world(tmp_path, names=["sketchs"])
    assert (tmp_path / "neon" / "mine.txt").read_text() == "mine"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset()
    monkeypatch.setattr(world_datasets, "WORLD_DATASETS", (dataset,))

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(world_datasets, "progress", lambda *arguments: nullcontext(stop))
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_are_checked() -> None:
    with pytest.raises(ValueError, match="shift is 2"):
        dataclasses.replace(WORLD_DATASETS[0], shift=2)
    with pytest.raises(ValueError, match="plaid"):
        dataclasses.replace(WORLD_DATASETS[0], values=(("plaid",), ("star",)))
    with pytest.raises(ValueError, match="halves is 'far'"):
        dataclasses.replace(WORLD_DATASETS[0], halves="far")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 compositions in the smaller half, 12 are needed"):
        dataclasses.replace(WORLD_DATASETS[0], values=(("red", "blue"), ("star", "ring")), halves="apart")


# Pre-training.


def small_settings(**changes: int) -> pretraining.PretrainSettings:
    values = {"steps": 4, "batch_size": 8, "log_every": 1, "evaluate_every": 100} | changes
    return pretraining.PretrainSettings(**values)


def test_compact_tokens_cover_every_caption_and_keep_the_end_of_text_last() -> None:
    tokens = pretraining.CompactTokens(32)
    captions = tuple(caption for step in range(6) for caption in make_batch(8, step, 16).captions)
    ids = tokens(captions)
    assert ids.max() == len(tokens.used_ids) - 1
    assert len(tokens.used_ids) < 200
    with pytest.raises(ValueError, match="missing from the world's vocabulary"):
        tokens(("a photo of a dog.",))


def test_held_out_evaluation_is_held_out() -> None:
    unseen = pretraining.unseen_compositions(classes=30, per_class=1)
    assert len(set(unseen.prompts)) == 30
    for prompt in unseen.prompts:
        request = request_from(prompt.removeprefix("a photo of a ").removesuffix("."))
        thing = Thing(shape=str(request.shape), colour=str(request.colour), texture=str(request.texture))
        assert is_held_out(Scene(kind="single", things=(thing,), background="grass"))


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = pretraining.PretrainSettings(steps=100, warmup_steps=10, decay_fraction=0.5, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def stopped_after(run: pretraining.PretrainRun, steps: int) -> None:
        settings = run.settings
        run.train(make_batch(settings.seed, step, settings.batch_size) for step in range(run.step, steps))

    torch.use_deterministic_algorithms(True)
    try:
        for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
            (tmp_path / name).mkdir()
            for stop in stops:
                run = pretraining.PretrainRun(tmp_path / name, small_settings())
                if stop == 4 and name == "resumed":
                    run.restore()
                stopped_after(run, stop)
            round_to_half(run.model)
            pretraining.write_model(tmp_path / name, run.model, run.tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    log = (tmp_path / "resumed" / "pretrain.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]

    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'whole'}")
    table = loaded.token_embedding.weight
    assert int((table.abs().sum(1) > 0).sum()) == len(run.tokens.used_ids)
    prompts = run.unseen.prompts[:5]
    full_ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'whole'}")(list(prompts))
    with torch.no_grad():
        ours = pretraining.encode_captions(run.model, run.tokens(prompts))
        theirs = loaded.encode_text(full_ids, normalize=True)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_short_texts_need_no_padding() -> None:
    tokens = pretraining.CompactTokens(32)
    model = pretraining.new_model(1, tokens)
    ids = tokens(make_batch(1, 0, 20).captions)
    with torch.no_grad():
        assert torch.allclose(
            pretraining.encode_by_length(model, ids), pretraining.encode_captions(model, ids), atol=1e-6
        )


def test_losses_count_what_is_true_only_once() -> None:
    logits = torch.tensor([[9.0, 9.0], [0.0, 9.0]])
    second_fits_both = torch.tensor([[True, True], [False, True]])
    assert float(pretraining.contrastive_loss(logits, second_fits_both)) < 0.01
    assert float(pretraining.contrastive_loss(logits, torch.eye(2, dtype=torch.bool))) > 0.3
    words = {name: np.full(2, -1) for name in WORD_AXES}
    scores = torch.zeros(2, len(pretraining.WORD_CAPTIONS))
    assert float(pretraining.word_loss(scores, words)) == 0
    words["shape"] = np.asarray([3, -1])
    assert float(pretraining.word_loss(scores, words)) == pytest.approx(np.log(len(SHAPES)))


def test_runs_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run without --resume"):
        pretraining.pretrain(tmp_path, small_settings(), resume=True)
    pretraining.PretrainRun(tmp_path, small_settings()).save_checkpoint()
    with pytest.raises(DataError, match="add --resume"):
        pretraining.pretrain(tmp_path, small_settings())
    with pytest.raises(DataError, match="was made with"):
        pretraining.pretrain(tmp_path, small_settings(seed=2), resume=True)


# The model.


def test_committed_model_is_an_ordinary_open_clip_folder() -> None:
    assert sum(path.stat().st_size for path in (MODELS / TINY).iterdir()) < 20e6
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{(MODELS / TINY)}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{(MODELS / TINY)}")
    model.eval()
    used = (model.token_embedding.weight.abs().sum(1) > 0).nonzero()[:, 0]
    assert used.tolist() == pretraining.CompactTokens(32).used_ids.tolist()
    for tensor in model.state_dict().values():
        assert torch.equal(tensor, tensor.half().float()), "the file has more digits than float16"
    scene = Scene(kind="single", things=(Thing(shape="heart", colour="red", size="large"),), background="snow")
    picture = preprocess(Image.fromarray(render_scene(scene, generator(1)))).unsqueeze(0)
    names = ["a red heart.", "a blue heart.", "a red house.", "a blue house."]
    with torch.no_grad():
        scores = model.encode_image(picture, normalize=True) @ model.encode_text(tokenizer(names), normalize=True).T
    assert int(scores.argmax()) == 0


@pytest.mark.parametrize("dataset", [*WORLD_DATASETS, *WORLD_VARIANTS], ids=lambda dataset: dataset.name)
def test_zero_shot_is_neither_hopeless_nor_saturated(dataset: WorldDataset) -> None:
    found = zero_shot(dataset, (MODELS / TINY), per_class=6)
    assert 40 < found.all < 80
    assert max(found.base, found.new) < 95
    if dataset.halves == "shared":  # every class has classes of its own words in the other half
        assert found.all < min(found.base, found.new)


def few_pictures() -> WorldDataset:
    return dataclasses.replace(dataset_named("games"), train_per_class=2)


def short_run() -> TrainConfig:
    return dataclasses.replace(config_from_recipe("coop-tiny"), shots=2, batch_size=8, epochs=4)


def test_scores_on_frozen_features_are_those_of_the_plain_model() -> None:
    dataset, clip = few_pictures(), load_clip(TINY)
    task = Task(class_names=dataset.class_names, num_base=dataset.num_base, templates=(dataset.template,))
    frozen = learned_context.frozen_features(clip, dataset, split="test", per_class=3)
    assert frozen.crops.shape[:2] == (2 * dataset.num_base, learned_context.CROPS)
    assert torch.allclose(frozen.crops.norm(dim=-1), torch.ones(1))
    found = learned_context.scores_of(ZeroShot(clip, config_from_recipe("zero-shot-tiny"), task), frozen)
    assert found == zero_shot(dataset, (MODELS / TINY), per_class=3)


def test_a_context_is_learned_from_base_classes_and_equal_seeds_give_equal_ones() -> None:
    dataset, clip = few_pictures(), load_clip(TINY)
    task = Task(class_names=dataset.class_names, num_base=dataset.num_base, templates=(dataset.template,))
    frozen = learned_context.frozen_features(clip, dataset, per_class=1)
    runs = [learned_context.learned_context(clip, task, frozen, short_run()).learned()["context"] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    methods = CoOp(clip, short_run(), task), learned_context.learned_context(clip, task, frozen, short_run())
    with torch.no_grad():
        classes = [method.class_features(task.class_names[: task.num_base]) for method in methods]
        before, after = (
            classification_loss(frozen.crops[:, 0], one, frozen.crop_labels, clip.logit_scale) for one in classes
        )
    assert after < before


def test_it_prints_a_line_for_every_way_to_compose_the_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world_datasets, "WORLD_DATASETS", (few_pictures(),))
    monkeypatch.setattr(learned_context, "_CONFIG", dataclasses.replace(short_run(), epochs=1))
    options = ["--names", "games", "--halves", "shared", "apart", "--per-class", "1", "--seeds", "2", "--shifts", "0.5"]
    monkeypatch.setattr(sys, "argv", ["learned_context", *options])
    learned_context.main()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("data set")
    assert [line.split()[:3] for line in lines] == [["games", "shared", "0.50"], ["games", "apart", "0.50"]]


def test_log_is_of_the_run_that_made_the_weights() -> None:
    lines = [json.loads(line) for line in ((MODELS / TINY) / "pretrain.log.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "finished"
    tokens = pretraining.CompactTokens(32)
    model = pretraining.new_model(1, tokens)
    state = open_clip.create_model(f"local-dir:{(MODELS / TINY)}").state_dict()
    state["token_embedding.weight"] = state["token_embedding.weight"][tokens.used_ids]
    model.load_state_dict(state)
    top1 = pretraining.accuracy_on(model, pretraining.unseen_compositions(), tokens)
    assert top1 == pytest.approx(lines[-1]["unseen_top1"], abs=1.5)
