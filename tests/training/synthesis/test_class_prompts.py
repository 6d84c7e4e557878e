"""Class names, prompts and real images, from the files that users have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipship.core.errors import DataError
from clipship.core.vocabulary import Vocabulary
from clipship.training.synthesis.class_prompts import (
    ClassPrompts,
    captions_of,
    class_prompts_of,
    contexts_of,
    vocabulary_of,
    with_context,
    with_images,
)
from clipship.training.synthesis.config import SynthesisConfig

Variant = Callable[..., SynthesisConfig]


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_class_names_come_from_any_file_that_names_classes(tmp_path: Path, data_folder: Path) -> None:
    assert vocabulary_of(written(tmp_path / "a.txt", "# pets\ncat\n\ndog\n")).names == ("cat", "dog")
    assert vocabulary_of(written(tmp_path / "a.json", ["cat", "dog"])).names == ("cat", "dog")
    given = {"classes": {"cat": ["cat", "kitten"], "dog": ["dog"]}, "templates": ["a sketch of a {}."]}
    vocabulary = vocabulary_of(written(tmp_path / "b.json", given))
    assert (vocabulary.names, vocabulary.templates) == (("cat", "dog"), ("a sketch of a {}.",))
    assert vocabulary_of(data_folder).names == ("red", "green", "blue_sky", "white", "black")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (["cat", ""], "class name 2 is ''"),
        (["cat", 3], "something that is no text"),
        (["cat", "cat"], "occurs twice"),
        ([], "no class names"),
        ("{", "not JSON"),
    ],
)
def test_files_that_name_no_classes_are_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        vocabulary_of(written(tmp_path / "a.json", content))
    with pytest.raises(DataError, match="no such file"):
        vocabulary_of(tmp_path / "absent.json")


def test_names_that_say_nothing_or_share_a_folder_are_refused(config: SynthesisConfig) -> None:
    with pytest.raises(DataError, match="a class name is '_'"):
        class_prompts_of(config, Vocabulary(names=("cat", "_")))
    with pytest.raises(DataError, match="would share"):
        class_prompts_of(config, Vocabulary(names=("a/b", "a b")))


def test_prompts_are_words_times_templates_times_contexts(smaller: Variant) -> None:
    config = smaller(templates=("a {}.", "the {}"), contexts=("in snow", ", at night"))
    vocabulary = Vocabulary(names=("big_cat",), synonyms=(("big_cat", "lion"),))
    found = class_prompts_of(config, vocabulary)
    assert found.plain_prompts["big_cat"] == ("a big cat.", "a lion.", "the big cat", "the lion")
    assert found.prompts["big_cat"][:2] == ("a big cat in snow.", "a lion in snow.")
    assert found.prompts["big_cat"][4::3] == ("a big cat, at night.", "the lion, at night")
    assert found.template == "a {}."
    assert with_context("a dog", "here") == "a dog here"


def test_captions_take_the_place_of_templates_for_their_classes(tmp_path: Path, config: SynthesisConfig) -> None:
    vocabulary = Vocabulary(names=("cat", "dog"))
    captions = captions_of(written(tmp_path / "c.json", {"cat": ["A tabby asleep.", "Two cats."]}), vocabulary.names)
    found = class_prompts_of(config, vocabulary, captions)
    assert found.prompts == {"cat": ("A tabby asleep.", "Two cats."), "dog": ("a photo of a dog.",)}
    assert found.plain_prompts["cat"] == ("a photo of a cat.",), "scores do not depend on captions"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"cta": ["x"]}, "'cta' is none of the classes: did you mean cat"),
        ({"cat": []}, "give a list of non-empty texts"),
        ({"cat": ["x", " "]}, "give a list of non-empty texts"),
        (["cat"], "not a JSON object"),
    ],
)
def test_captions_that_fit_no_class_are_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        captions_of(written(tmp_path / "c.json", content), ("cat", "dog"))


def test_contexts_are_lines(tmp_path: Path) -> None:
    assert contexts_of(written(tmp_path / "c.txt", "in snow\n# night\nat night\n")) == ("in snow", "at night")
    with pytest.raises(DataError, match="holds no contexts"):
        contexts_of(written(tmp_path / "c.txt", "# none\n"))


def test_real_images_are_the_few_shot_sample_of_the_base_classes(
    data_folder: Path, smaller: Variant, tmp_path: Path
) -> None:
    from clipship.training.datasets.load import few_shot, load_dataset

    config = smaller(shots=2, seed=3, strength=0.5)
    class_prompts = class_prompts_of(config, vocabulary_of(data_folder))
    found = with_images(class_prompts, data_folder, config)
    sample, _ = few_shot(load_dataset(data_folder), 2, 3)
    assert list(found.sources) == ["red", "green", "blue_sky"], "the new classes have names only"
    assert found.sources["red"] == tuple(item.path for item in sample if item.class_name == "red")
    assert set(with_images(class_prompts, data_folder, config, classes="all").sources) == set(class_prompts.class_names)
    assert found.digest != class_prompts.digest
    other = ClassPrompts(
        class_names=("cat",), template="{}", prompts={"cat": ("cat",)}, plain_prompts={"cat": ("cat",)}
    )
    with pytest.raises(DataError, match="has images of none of the classes"):
        with_images(other, data_folder, config)
    with pytest.raises(DataError, match="20 are needed"):
        with_images(class_prompts, data_folder, smaller(shots=20, strength=0.5))
