"""Seeds and batches: what an image depends on, and what it does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clipship.training.synthesis.candidates import batches_of, candidates_of, seed_of
from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import MAX_TRIES, SynthesisConfig


def test_seeds_depend_on_run_class_and_number_alone(config: SynthesisConfig, class_prompts: ClassPrompts) -> None:
    few = {(one.class_name, one.seed) for one in candidates_of(config, class_prompts)}
    many = {(one.class_name, one.seed) for one in candidates_of(replace(config, candidates=9), class_prompts)}
    assert len(few) == 15
    assert few < many
    assert not few & {(one.class_name, one.seed) for one in candidates_of(replace(config, seed=2), class_prompts)}


def test_seeds_are_distinct_and_leave_room_for_attempts() -> None:
    seeds = [seed_of(1, name, number) for name in ("cat", "dog") for number in range(2000)]
    assert len({seed // MAX_TRIES for seed in seeds}) == 4000
    assert all(0 <= seed < 2**52 for seed in seeds)
    assert seed_of(1, "cat", 7, 3) == seed_of(1, "cat", 7) + 3


def test_a_seed_never_changes() -> None:
    assert seed_of(1, "cat", 0) == 1419597308185488


def test_prompts_and_real_images_are_taken_in_turn(config: SynthesisConfig, class_prompts: ClassPrompts) -> None:
    prompts = {name: (f"one {name}", f"two {name}") for name in class_prompts.class_names}
    varied = replace(class_prompts, prompts=prompts, sources={"red": tuple(map(Path, "abc"))})
    made = candidates_of(config, varied)
    assert [one.prompt for one in made[:3]] == ["one red", "two red", "one red"]
    assert [one.source for one in made[:6]] == ["a", "b", "c", "a", "b", None]


def test_the_cut_into_batches_does_not_depend_on_what_is_done(
    config: SynthesisConfig, class_prompts: ClassPrompts, smaller: Callable[..., SynthesisConfig]
) -> None:
    wanted = candidates_of(config, replace(class_prompts, sources={"green": (Path("a"),)}))
    whole = list(batches_of(wanted, 4, set()))
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 1]
    assert [batch[0].source for batch in whole] == [None, None, None, "a", "a"]
    done = {one.key for batch in whole[1:4:2] for one in batch}
    assert list(batches_of(wanted, 4, done)) == [whole[0], whole[2], whole[4]]
