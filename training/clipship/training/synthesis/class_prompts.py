"""The classes of a set: names from any file that lists classes, their prompts and their real images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipship.core.errors import DataError, near
from clipship.core.files import sha256_of_text
from clipship.core.vocabulary import Vocabulary, lines_from_file, prompt_of, vocabulary_from_file
from clipship.training.datasets.listing import LIST_SUFFIXES
from clipship.training.datasets.load import few_shot, load_dataset
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthetic_set import validate_class_folders


@dataclass(frozen=True, kw_only=True)
class ClassPrompts:
    """Prompts and real images of the classes of a set; the images of a class cycle through both.

    Raises:
        DataError: a class name is blank, or two would share a folder.
    """

    class_names: tuple[str, ...]
    template: str
    """The first template, which the set's manifest names."""
    prompts: Mapping[str, tuple[str, ...]]
    """By class, what its images are made from."""
    plain_prompts: Mapping[str, tuple[str, ...]]
    """By class, what its images are scored against: templates without contexts and captions."""
    sources: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """By class, the real images for image-to-image; a class without any is made from text."""

    def __post_init__(self) -> None:
        for name in self.class_names:
            if not name.replace("_", " ").strip():
                raise DataError(f"a class name is {name!r}: give each class a name that a prompt can hold")
        validate_class_folders(self.class_names)

    @property
    def digest(self) -> str:
        """SHA-256 over prompts and file names of real images."""
        sources = {name: [path.name for path in paths] for name, paths in self.sources.items()}
        return sha256_of_text(json.dumps([dict(self.prompts), sources], sort_keys=True))


def vocabulary_of(path: Path) -> Vocabulary:
    """Class names and templates of a text file, a JSON list or vocabulary, or a data set as ``train --data`` takes it.

    Raises:
        DataError: the file is none of these, or a name is missing, empty or repeated.
    """
    if path.is_dir() or path.suffix.lower() in LIST_SUFFIXES:
        dataset = load_dataset(path)
        return Vocabulary(names=dataset.class_names, templates=(dataset.record.template,))
    if path.suffix == ".json" and isinstance(content := _json_of(path, "class names"), list):
        if not all(isinstance(name, str) for name in content):
            raise DataError(f"{path}: holds something that is no text: give a list of class names")
        return Vocabulary(names=tuple(content))
    return vocabulary_from_file(path)


def contexts_of(path: Path) -> tuple[str, ...]:
    """The contexts of a text file, one a line; blank lines and # comments are skipped.

    Raises:
        DataError: the file is missing, not a text, or empty.
    """
    lines = lines_from_file(path)
    if not lines:
        raise DataError(f"{path}: holds no contexts: give one a line, such as: in the snow")
    return lines


def captions_of(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Prompts by class from a JSON file ``{"class name": ["prompt", ...]}``, such as a language model writes.

    Raises:
        DataError: the file holds something else, an unknown class, or a class without prompts.
    """
    content = _json_of(path, "prompts")
    if not isinstance(content, dict):
        raise DataError(f'{path}: not a JSON object: give {{"class name": ["prompt", ...], ...}}')
    for name, prompts in content.items():
        if name not in class_names:
            raise DataError(f"{path}: {name!r} is none of the classes: {near(name, class_names)}")
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise DataError(f"{path}: the prompts of {name!r} are {prompts!r:.80}: give a list of non-empty texts")
    return {name: tuple(prompts) for name, prompts in content.items()}


def class_prompts_of(
    config: SynthesisConfig, vocabulary: Vocabulary, captions: Mapping[str, tuple[str, ...]] | None = None
) -> ClassPrompts:
    """The classes of ``vocabulary`` with the prompts of ``config``, or with their ``captions``.

    Raises:
        DataError: as :class:`ClassPrompts`.
    """
    templates = config.templates or vocabulary.templates
    plain, prompts = {}, {}
    for name, rows in zip(vocabulary.names, vocabulary.word_rows, strict=True):
        plain[name] = tuple(prompt_of(vocabulary.words[row], template) for template in templates for row in rows)
        varied = tuple(with_context(prompt, one) for one in config.contexts for prompt in plain[name])
        prompts[name] = (captions or {}).get(name) or varied or plain[name]
    return ClassPrompts(class_names=vocabulary.names, template=templates[0], prompts=prompts, plain_prompts=plain)


def with_context(prompt: str, context: str) -> str:
    """``context`` behind ``prompt``, before its full stop: "a photo of a dog in the snow."."""
    words, stop = (prompt[:-1], ".") if prompt.endswith(".") else (prompt, "")
    return f"{words}{'' if context.startswith(',') else ' '}{context}{stop}"


def with_images(
    class_prompts: ClassPrompts, path: Path, config: SynthesisConfig, *, classes: str = "base"
) -> ClassPrompts:
    """``class_prompts`` with the few-shot sample that training takes from the data set at ``path`` with the same seed.

    Args:
        path: a data set as ``train --data`` takes it, class folders among them.
        classes: "base": only base classes have real images, as in base-to-new; "all": every class.

    Raises:
        DataError: there is no data set, it has too few images, or none of the classes.
    """
    dataset = load_dataset(path)
    learned = dataset.num_base if classes == "base" else len(dataset.class_names)
    items, _ = few_shot(replace(dataset, base_classes=learned), config.shots, config.seed)
    names = {_words(name): name for name in class_prompts.class_names}
    sources: dict[str, list[Path]] = {}
    for item in items:
        if item.label < learned and _words(item.class_name) in names:
            sources.setdefault(names[_words(item.class_name)], []).append(item.path)
    if not sources:
        raise DataError(f"{path}: has images of none of the classes: give the data set whose classes --classes names")
    return replace(class_prompts, sources={name: tuple(paths) for name, paths in sources.items()})


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _json_of(path: Path, what: str) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file: give a JSON file with {what}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{path}: not JSON ({error}): give a JSON file with {what}") from error
    return content
