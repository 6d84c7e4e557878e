"""A Triton model repository from one bundle, or from several that share an image encoder.

::

    REPOSITORY/
      image_encoder/      uint8 [N, H, W, 3] -> unit float32 [N, D]              the bundle's ONNX file, or plans
      classifier/         float32 [N, D] -> scores, indices, labels [N, k]       see classifier_graph.py
      preprocess/         encoded bytes [N, 1] -> uint8 [N, H, W, 3] + error     runs a copy of core/images/decoding.py
      admission/          encoded bytes, passed on when preprocess has capacity
      admission_pixels/   uint8 [N, H, W, 3], passed on when the encoder has capacity (--backend python)
      classify/           ensemble: pixels -> scores, indices, labels, embedding
      classify_encoded/   ensemble: encoded bytes -> scores, indices, labels, embedding, error
      embed/              ensemble: pixels -> embedding

Golden samples are stored with the models, see golden_samples.py.
A further vocabulary is ``classifier-NAME/``, ``classify-NAME/`` and ``classify_encoded-NAME/``.

Legend: N images, H = W = side of the input in pixels, D embedding size, k classes reported an image.
"""

from __future__ import annotations

import inspect
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from clipship.core import precisions, tolerances
from clipship.core.bundle import DEFAULT_ENCODER, Bundle, EncoderVariant
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.files import replace_folder
from clipship.core.images import decoding
from clipship.core.machine import processor, runtimes
from clipship.core.machine.processor import emulates, never_runs, this_processor
from clipship.core.precisions import Precision
from clipship.core.progress import log
from clipship.core.tensorrt_plan import Target, TensorRtPlan, validate_plan, variant_of
from clipship.core.tensors import ENCODED, image_tensor
from clipship.serving.model_names import (
    ADMISSION,
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    ENCODER,
    PREPROCESS,
    TOP_K,
    of_vocabulary,
)
from clipship.serving.repository.backends import BACKENDS, ONNXRUNTIME, PYTHON, Backend, backend_named
from clipship.serving.repository.config_pbtxt import read_config, text_from_config
from clipship.serving.repository.golden_samples import write_samples
from clipship.serving.repository.models import (
    ModelSettings,
    configs_from_settings,
    model_settings_from_bundle,
    plan_files,
)
from clipship.serving.repository.tuning import DEFAULT_TUNING, Tuning
from clipship.serving.repository.validate import validate_repository
from clipship.serving.repository.versions import (
    ClassifierVersions,
    copy_sources,
    name_version,
    remove_folder,
    version_info_of,
    write_version,
)
from clipship.serving.repository.vocabularies import validate_same_encoder, validated_name

DOORS_COPY = "clipship_doors.py"
"""Copy of ``triton_models/python/doors.py`` in the models that have doors."""

_TOLERANCES = {"clipship_precisions.py": precisions, "clipship_tolerances.py": tolerances}
_MODULES: Mapping[str, Mapping[str, ModuleType]] = {
    ADMISSION: {},
    PREPROCESS: {**_TOLERANCES, "clipship_images.py": decoding},
    ENCODER: {**_TOLERANCES, "clipship_runtimes.py": runtimes, "clipship_processor.py": processor},
    CLASSIFIER: _TOLERANCES,
}
"""By source in ``triton_models/python``: copies of modules of ``clipship/core`` that it imports."""


def repository_from_bundle(
    bundle: Bundle,
    out: Path,
    *,
    backend: str,
    precision: Precision = "fp32",
    max_batch_size: int = 64,
    top_k: int = 5,
    plans: Sequence[TensorRtPlan] = (),
    tensorrt_version: str | None = None,
    others: Mapping[str, Bundle] | None = None,
    tuning: Tuning = DEFAULT_TUNING,
) -> Path:
    """Write the model repository of ``bundle`` to the folder ``out``, atomically; returns ``out``.

    Args:
        precision: of the image encoder; of its variants the python backend takes the one that was fastest where the
            bundle was packed, the onnxruntime backend the portable one. Plans have their own.
        plans: for the tensorrt backend, one for each kind of GPU of the server.
        tensorrt_version: the server's; None: that of the first plan.
        others: further bundles with the same image encoder, by the names of their vocabularies.
        tuning: serving options.

    Raises:
        CheckFailed: a bundle's verification did not pass.
        PlanError: the server could not load a plan, or it is not of the bundle.
        UsageError: a number is out of range, the backend is unknown, or ``out`` is a folder of something else.
        OSError: the disk is full, or ``out`` cannot be written.
    """
    chosen = backend_named(backend)
    others = others or {}
    for each in (bundle, *others.values()):
        validate_verification(each)
    _validate_folder(out)
    tuning.validate_backend(chosen, max_batch_size)
    _validate_plans(bundle, plans, chosen, max_batch_size, tensorrt_version)
    encoder = DEFAULT_ENCODER if plans else _encoder_variant(bundle, chosen, precision, tuning)
    validate_same_encoder(bundle, others, (variant_of(plans[0].info, bundle) if plans else None) or encoder)
    numbers: dict[str, Any] = {"max_batch_size": max_batch_size, "top_k": top_k, "tuning": tuning}
    settings = model_settings_from_bundle(bundle, encoder=encoder, plans=plans, others=others, **numbers)
    with replace_folder(out) as folder:
        configs = configs_from_settings(settings, chosen)
        for name, config in configs.items():
            _write_config(folder / name, config)
        _write_encoder(bundle, folder, settings, plans)
        for vocabulary, each in zip(settings.vocabularies, (bundle, *others.values()), strict=True):
            write_version(folder / of_vocabulary(CLASSIFIER, vocabulary.name) / "1", each, vocabulary.top_k)
        _write_sources(folder, configs)
        _write_warmup_files(bundle, folder)
        write_samples(folder, bundle)
        validate_repository(folder)
    return out


def add_vocabulary(repository: Path, bundle: Bundle, name: str) -> tuple[str, ...]:
    """Add the models of a further vocabulary to ``repository``, configured as the first one's.

    Leftovers of a killed run are replaced. Returns the models' names in the order to load them.

    Raises:
        UsageError: the name cannot be a model's.
        RepositoryError: a configuration of the first vocabulary cannot be read.
    """
    validated_name(name)
    added = []
    for model in (CLASSIFIER, CLASSIFY, CLASSIFY_ENCODED):
        config = read_config(repository / model)
        _rename(config, name)
        staged = repository / CLASSIFIER / config.name  # in a model's folder Triton looks at numbers only
        with replace_folder(staged) as folder:
            if model == CLASSIFIER:
                name_version(config, 1, version_info_of(bundle))
            _write_config(folder, config)
            if model == CLASSIFIER:
                write_version(folder / "1", bundle, int(config.parameters[TOP_K].string_value))
                copy_sources(repository / model / str(ClassifierVersions(repository / model).active()), folder / "1")
        if (repository / config.name).exists():
            remove_folder(repository / config.name, aside=repository / CLASSIFIER)
        staged.rename(repository / config.name)
        added.append(config.name)
    return tuple(added)


def remove_vocabulary(repository: Path, name: str) -> None:
    """Delete a further vocabulary's models, ensembles first, so that the rest always loads."""
    for model in (CLASSIFY_ENCODED, CLASSIFY, CLASSIFIER):
        folder = repository / of_vocabulary(model, name)
        if folder.is_dir():
            remove_folder(folder, aside=repository / CLASSIFIER)


def _rename(config: Any, vocabulary: str) -> None:
    """Make a configuration of the first vocabulary that of ``vocabulary``."""
    config.name = of_vocabulary(config.name, vocabulary)
    for step in config.ensemble_scheduling.step:
        if step.model_name == CLASSIFIER:
            step.model_name = of_vocabulary(CLASSIFIER, vocabulary)


def sources_folder() -> Path:
    """``triton_models/``: inside the installed package, or at the root of a checkout."""
    serving = Path(__file__).resolve().parents[1]
    candidates = (serving / "triton_models", serving.parents[2] / "triton_models")
    for folder in candidates:
        if (folder / "python").is_dir():
            return folder
    raise UsageError(f"the Triton model sources are missing from {candidates[0]}: install clipship again")


def validate_verification(bundle: Bundle) -> None:
    """Validate that the verification of ``clipship pack`` passed.

    Raises:
        CheckFailed: it did not.
    """
    verification: Mapping[str, Any] = bundle.verification()
    if verification.get("passed") is not True:
        raise CheckFailed(
            f"{bundle.path}: the bundle's verification did not pass, so no repository is written: "
            "see its verification.json, and pack it again"
        )


def _validate_folder(out: Path) -> None:
    """``out`` is replaced, so it must be new, empty, or a clipship repository."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CLASSIFY / "config.pbtxt").is_file():
        raise UsageError(f"{out}: is not a clipship repository: give a new folder")


def _validate_plans(
    bundle: Bundle, plans: Sequence[TensorRtPlan], backend: Backend, max_batch_size: int, tensorrt_version: str | None
) -> None:
    """Validate that a server with this TensorRT can load the plans, and that they accept its batches."""
    if backend.takes_plans != bool(plans):
        able = " or ".join(each.name for each in BACKENDS.values() if each.takes_plans)
        raise UsageError(f"backend {backend.name} with {len(plans)} plans: give --plan with --backend {able} only")
    for plan in plans:
        version = tensorrt_version or plans[0].info.runtime_version
        validate_plan(plan, Target(runtime="tensorrt", version=version, platform="linux"), bundle)
        plan.info.profile.validate(1)
        plan.info.profile.validate(max_batch_size)
    twice = [gpu for gpu, count in Counter(gpu for plan in plans for gpu in plan.info.gpus).items() if count > 1]
    if twice:
        raise UsageError(f"two plans are for {', '.join(twice)}: give one for each kind of GPU")


def _encoder_variant(bundle: Bundle, backend: Backend, precision: Precision, tuning: Tuning) -> EncoderVariant:
    """The variant that runs without plans. The Python model adapts it to the server's processor."""
    gpu = tuning.on_gpu
    if backend.triton_runs_onnx and not gpu and never_runs("onnx", precision):
        raise UsageError(
            f"precision {precision} on the device {tuning.device} with the {backend.name} backend: a server without a "
            f"GPU could not load it, as ONNX Runtime has no {precision} kernels for processors: give --device gpu, "
            "--precision fp32, or --backend python where the bundle has it by OpenVINO"
        )
    variant = bundle.fastest_encoder(precision, backend.runtimes, gpu=gpu)
    here = "" if gpu else emulates(variant.runtime, variant.precision, this_processor())
    if here:
        log(f"this machine's processor could not load the model, make sure that the server's can: {here}")
    return variant


def _write_config(model: Path, config: Any) -> None:
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(text_from_config(config), encoding="utf-8")
    if config.platform == "ensemble":
        (model / "1" / ".keep").touch()  # Triton needs the folder; object stores drop empty ones


def _write_encoder(bundle: Bundle, folder: Path, settings: ModelSettings, plans: Sequence[TensorRtPlan]) -> None:
    version = folder / ENCODER / "1"
    for plan, name in zip(plans, plan_files(settings.plans), strict=True):
        shutil.copyfile(plan.file, version / name)
    if not plans:
        shutil.copyfile(bundle.path / settings.encoder.file, version / ONNXRUNTIME.model_file)
        weights = f"{settings.encoder.file}.data"  # of a graph above 2 GB, which names this file
        if weights in bundle.files:
            shutil.copyfile(bundle.path / weights, version / weights)


def _write_sources(folder: Path, configs: Mapping[str, Any]) -> None:
    """Copy what runs inside the Python backend: each model's source, and the modules that it imports."""
    sources = sources_folder() / "python"
    for name in (name for name, config in configs.items() if config.backend == PYTHON.name):
        version, source = folder / name / "1", next(each for each in _MODULES if name.startswith(each))
        shutil.copyfile(sources / source / "model.py", version / PYTHON.model_file)
        if source != CLASSIFIER:
            shutil.copyfile(sources / "doors.py", version / DOORS_COPY)
        for copy, module in _MODULES[source].items():
            _copy_source(module, version / copy)


def _copy_source(module: ModuleType, target: Path) -> None:
    """Copy ``module``, which imports the copy of ``precisions.py`` beside it: Triton's Python may have no clipship."""
    source = inspect.getsource(module).replace("from clipship.core.precisions", "from clipship_precisions")
    target.write_text(source, encoding="utf-8")


def _write_warmup_files(bundle: Bundle, folder: Path) -> None:
    """The first golden image, as pixels and as the file it came from."""
    golden = bundle.golden()
    encoded = (bundle.path / "golden" / golden.files[0]).read_bytes()
    # Triton's form of one string element: its length as 4 bytes, little end first, then the bytes.
    element = struct.pack("<I", len(encoded)) + encoded
    pixels = golden.pixels[0].tobytes()
    image = image_tensor(bundle.image_spec.size_px)
    for model, name, sample in ((ENCODER, image.name, pixels), (PREPROCESS, ENCODED.name, element)):
        (folder / model / "warmup").mkdir()
        (folder / model / "warmup" / name).write_bytes(sample)
