"""Pipeline folders in diffusers' format: found, downloaded and validated before anything is loaded.

The ``model_index.json`` of a folder names the class of the pipeline and its parts; each part has a subfolder.
Only safetensors are read: other weight files can run code.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clipship.core.errors import MissingExtraError, RecipeError
from clipship.core.files import sha256_of
from clipship.training.model.builtin import TINY_DIFFUSION, builtin_folder
from clipship.training.synthesis.config import SynthesisConfig

INDEX_FILE = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("diffusion_pytorch_model", "model")
_TOKENS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """A complete pipeline on this disk."""

    name: str
    """As given by the recipe or the user."""
    path: Path
    class_name: str
    """The pipeline's class in diffusers."""
    variant: str | None
    """Of the weight files, if they have one."""
    revision: str
    """The hub's commit, or the SHA-256 of the files."""


def pipeline_folder(config: SynthesisConfig) -> PipelineFolder:
    """The validated folder of ``config.pipeline``, downloaded if it is a hub id.

    Raises:
        MissingExtraError: diffusers or transformers is not installed.
        RecipeError: the pipeline does not exist, lacks files, has truncated ones, or takes no text.
    """
    _require_diffusers()
    path, commit = _located(config)
    index = _index_of(path, config.pipeline)
    validate_text_pipeline(str(index["_class_name"]), config.pipeline)
    files = files_of(path, index, config.variant)
    has_variant = bool(config.variant) and any(f".{config.variant}." in file.name for file in files)
    return PipelineFolder(
        name=config.pipeline,
        path=path,
        class_name=str(index["_class_name"]),
        variant=config.variant if has_variant else None,
        revision=commit or _digest_of(path, files),
    )


def files_of(folder: Path, index: dict[str, Any], variant: str = "") -> list[Path]:
    """The files that loading the pipeline reads: the index, and settings, weights or tokens of each part.

    Raises:
        RecipeError: a file is missing or truncated.
    """
    files = [folder / INDEX_FILE]
    for name, entry in sorted(index.items()):
        if isinstance(entry, list) and len(entry) == 2 and None not in entry:
            files += _files_of_part(folder / name, str(entry[1]), variant)
    return files


def validate_text_pipeline(class_name: str, name: str) -> None:
    """Validate that the pipeline takes a prompt.

    Raises:
        RecipeError: this diffusers has no ``class_name``, or it takes no prompt.
    """
    import diffusers

    pipeline = getattr(diffusers, class_name, None)
    if pipeline is None:
        raise RecipeError(
            f"pipeline {name}: diffusers {diffusers.__version__} has no {class_name}: update diffusers, or give another"
        )
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise RecipeError(
            f"pipeline {name}: {class_name} takes no text: give a text-to-image pipeline, such as Stable Diffusion"
        )


def _require_diffusers() -> None:
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "synthesis") from error
    for library in (diffusers, transformers):  # they log much and draw their own progress bars
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _located(config: SynthesisConfig) -> tuple[Path, str | None]:
    """The folder, and the hub's commit if it came from there."""
    name = config.pipeline
    if name == TINY_DIFFUSION and not Path(name).is_dir():
        return builtin_folder(TINY_DIFFUSION), None
    if Path(name).is_dir():
        return Path(name), None
    if _HUB_ID.fullmatch(name) is None:
        raise RecipeError(
            f"pipeline {name}: no such folder, and no hub id: give a folder with {INDEX_FILE}, OWNER/NAME of the hub, "
            f"or {TINY_DIFFUSION}"
        )
    path = _downloaded(config)
    return path, path.name


def _downloaded(config: SynthesisConfig) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def refusal(problem: str) -> RecipeError:
        return RecipeError(f"pipeline {config.pipeline}: {problem}")

    revision, variant = config.revision or None, config.variant or None
    try:
        path = DiffusionPipeline.download(config.pipeline, revision=revision, variant=variant, use_safetensors=True)
    except GatedRepoError as error:
        raise refusal("asks for its licence to be accepted: do so on its page, then run hf auth login") from error
    except RevisionNotFoundError as error:
        raise refusal(f"has no revision {config.revision!r}: give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise refusal("no such folder, and no such model on the hub: give a folder, or another id") from error
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
        raise refusal(f"cannot be downloaded ({problem}): check the network, or give a folder") from error
    return Path(path)


def _index_of(folder: Path, name: str) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise RecipeError(f"pipeline {name}: {path} is missing: give the folder that a diffusers pipeline was saved to")
    index = _json_of(path)
    if not isinstance(index.get("_class_name"), str):
        raise RecipeError(f"pipeline {name}: {path} names no pipeline class: give a pipeline in diffusers' format")
    return index


def _files_of_part(folder: Path, class_name: str, variant: str) -> list[Path]:
    if "Tokenizer" in class_name:
        words = next((names for names in _TOKENS if all((folder / one).is_file() for one in names)), _TOKENS[0])
        return [_there(folder / name) for name in ("tokenizer_config.json", *words)]
    if "Scheduler" in class_name:
        return [_there(folder / "scheduler_config.json")]
    if "Processor" in class_name or "FeatureExtractor" in class_name:
        return [_there(folder / "preprocessor_config.json")]
    return [_there(folder / "config.json"), *_weights_of(folder, variant)]


def _weights_of(folder: Path, variant: str) -> list[Path]:
    """The weight file of a part, or its shards and their index; those of the variant come first."""
    for form in ([f".{variant}"] if variant else []) + [""]:
        for stem in _WEIGHTS:
            whole = folder / f"{stem}{form}.safetensors"
            if whole.is_file():
                return [_whole(whole)]
            listing = folder / f"{stem}.safetensors.index{form}.json"
            if listing.is_file():
                shards = sorted(set(_json_of(listing).get("weight_map", {}).values()))
                return [listing, *(_whole(_there(folder / str(shard))) for shard in shards)]
    if any(folder.glob("*.bin")):
        raise RecipeError(
            f"{folder}: has weights as .bin only, which can run code: save the pipeline again, as safetensors"
        )
    stem = _WEIGHTS["encoder" in folder.name or "checker" in folder.name]
    return [_there(folder / f"{stem}.safetensors")]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise RecipeError(f"{path} is missing, the pipeline needs it: download or copy the pipeline again")
    return path


def _whole(path: Path) -> Path:
    """``path``, a safetensors file, if it has the size that its header states."""
    try:
        with safe_open(path, framework="pt"):
            return path
    except SafetensorError as error:
        size = path.stat().st_size
        raise RecipeError(f"{path} is truncated or damaged ({size} bytes: {error}): download it again") from error


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise RecipeError(f"{path}: not JSON ({error}): download or copy the pipeline again") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: not a JSON object: download or copy the pipeline again")
    return content


def _digest_of(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
