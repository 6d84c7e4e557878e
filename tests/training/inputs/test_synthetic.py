"""Which images of a synthetic set a run learns from."""

from dataclasses import replace

import pytest

from clipship.core.errors import DataError
from clipship.training.inputs.synthetic import synthetic_paths
from clipship.training.synthetic_set import SyntheticSet
from tests.training.inputs.test_batches import CONFIG

NAMES = ("red", "green", "blue_sky", "white", "black")


def _seeds(synthetic: SyntheticSet, **changes: object) -> list[list[int]]:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return [[int(path.stem) for path in paths] for paths in synthetic_paths(synthetic, NAMES, config)]


def test_synthetic_images_are_the_best_or_the_first(uneven: SyntheticSet) -> None:
    """Seeds of every class; red 0 was refused before it had a score."""
    assert _seeds(uneven) == [[3, 2], [1], [], [5, 4, 0], []]
    assert _seeds(uneven, synthetic_shots=2) == [[3, 2], [1], [], [5, 4], []]
    assert _seeds(uneven, synthetic_filter=False) == [[1, 2, 3], [1], [], [0, 1, 4, 5], []]
    assert _seeds(uneven, synthetic_filter=False, synthetic_shots=1) == [[1], [1], [], [0], []]


def test_images_that_were_deleted_are_not_learned_from(uneven: SyntheticSet) -> None:
    gone = next(image.path for image in uneven.images if (image.class_name, image.seed) == ("white", 1))
    content = gone.read_bytes()
    gone.unlink()
    try:
        assert _seeds(uneven, synthetic_filter=False)[3] == [0, 4, 5]
    finally:
        gone.write_bytes(content)


def test_a_set_that_has_nothing_to_give_is_refused(synthetic: SyntheticSet) -> None:
    assert synthetic_paths(synthetic, ["violet", "red"], CONFIG)[0] == ()
    with pytest.raises(
        DataError, match=r"no image of any of the 2 classes, the first is 'violet'.*--synthetic-shots 0"
    ):
        synthetic_paths(synthetic, ["violet", "mauve"], CONFIG)
    with pytest.raises(DataError, match=r"4 synthetic images a class requested, no class of .* more than 3"):
        synthetic_paths(synthetic, NAMES, replace(CONFIG, synthetic_shots=4))
