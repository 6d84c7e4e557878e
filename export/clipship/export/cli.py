"""``clipship pack`` and ``clipship verify``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.bundle import Bundle, read_bundle
from clipship.core.cli.main import emit, json_option, other_stage, require_packages
from clipship.core.errors import CheckFailed
from clipship.core.files import sha256_of
from clipship.core.precisions import PRECISIONS, REDUCED, Precision
from clipship.core.progress import log
from clipship.core.vocabulary import Vocabulary, vocabulary_from_file

if TYPE_CHECKING:
    from clipship.core.comparison import Verification, VerificationSamples
    from clipship.training.checkpoint import Checkpoint

_PATH, _FILE = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)
_PACKAGES = ("torch", "onnx", "onnxruntime")


@click.command()
@click.argument("checkpoint", type=_PATH)
@click.option("--vocabulary", type=_PATH, help="Class names, one a line, or JSON. [default: the checkpoint's]")
@click.option("--images", type=_PATH, help="Verify with the images in this folder. [default: built in]")
@click.option("--out", type=_PATH, required=True, help="The bundle to write.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(REDUCED),
    multiple=True,
    help="A reduced precision of the image encoder to keep beside float32; may be repeated.",
)
@click.option(
    "--opset",
    type=click.Choice(["18", "20", "23"]),
    default="18",
    show_default=True,
    help="ONNX opset: 18 also suits old runtimes; 20 has GELU as one node, 23 attention.",
)
@click.option("--allow-random-weights", is_flag=True, help="Pack a model with untrained weights.")
@json_option
def pack(
    checkpoint: Path,
    vocabulary: Path | None,
    images: Path | None,
    out: Path,
    precisions: tuple[Precision, ...],
    opset: str,
    allow_random_weights: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to ONNX for a vocabulary, compare it with PyTorch, and write the bundle.

    The bundle is written only when every comparison is within tolerance. Reduced precisions are calibrated on the
    images, and the last lines say how fast they are here.

    Example: clipship pack runs/prints --images world/prints --out bundles/prints --precision fp16 --precision int8
    """
    require_packages("export", *_PACKAGES)
    from clipship.export.image_input import pictures_for
    from clipship.export.pack import bundle_from_method, validate_folder, validate_weights
    from clipship.export.precision.encoder_variants import Profile, speed_line
    from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint
    from clipship.training.evaluation.inference import distinguishable_names

    validate_folder(out)
    saved = load_checkpoint(checkpoint)
    if not allow_random_weights:
        validate_weights(saved.config.base_model)
    words = vocabulary_from_file(vocabulary) if vocabulary else None
    method = method_from_checkpoint(saved)
    words = words or Vocabulary(names=distinguishable_names(method))
    pictures = pictures_for(images)
    log(f"verifying with {len(pictures)} images of {images or 'the built-in world'}")
    bundle = bundle_from_method(
        method,
        words,
        pictures,
        out,
        provenance=_provenance(checkpoint, saved),
        temperature=saved.temperature,
        profile=Profile(opset=int(opset), precisions=tuple(dict.fromkeys(precisions))),
    )
    result = {"bundle": str(out), "digest": bundle.digest, "classes": len(words), **bundle.verification()}
    result["image_encoders"] = [variant.to_json() for variant in bundle.image_encoders]
    line = f"{out}: {len(words)} classes, verified on {len(pictures)} images, digest {bundle.digest[:16]}"
    variants = (speed_line(variant) for variant in bundle.image_encoders[1:])
    emit(result, "\n".join([line, *variants]), as_json=as_json)


def _provenance(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the learned prompts come from, for the manifest."""
    from clipship.training.checkpoint import LEARNED

    return {
        "learned_sha256": sha256_of(folder / LEARNED),
        "config": checkpoint.config.to_json(),
        "dataset": checkpoint.dataset,
        "data_digest": checkpoint.data_digest,
        "scores": dict(checkpoint.scores),
        "calibration": checkpoint.calibration,
        "trained_with": dict(checkpoint.versions),
    }


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--checkpoint", type=_PATH, help="Compare with PyTorch running this checkpoint.")
@click.option(
    "--images",
    type=_PATH,
    help="Compare on images of this folder, too: with PyTorch, or without --checkpoint with image_encoder.onnx.",
)
@click.option("--url", metavar="HOST:PORT", help="Compare a live Triton that serves the bundle (its gRPC port).")
@click.option("--plan", type=_PATH, help="Compare this TensorRT plan on this machine's GPU.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="What the encoder behind --url computes in.",
)
@click.option(
    "--provider", "providers", multiple=True, help="An ONNX Runtime provider; may be repeated. [default: all here]"
)
@click.option("--max-batch", type=click.IntRange(min=1), default=64, show_default=True, help="The largest batch.")
@click.option("--report", type=_FILE, help="Write an HTML page with the worst images.")
@json_option
def verify(bundle: Path, report: Path | None, as_json: bool, **given: Any) -> None:
    """Compare all that BUNDLE offers with its golden samples, and given a checkpoint with PyTorch.

    Each variant is run by the runtime that serves it, in batches of 1, 2, 7 and --max-batch. What cannot run here is
    named. The exit code is 1 when a comparison is out of tolerance.

    Example: clipship verify bundles/prints --checkpoint runs/prints --images world/prints --report prints.html
    """
    require_packages("export", *_PACKAGES)
    from clipship.export.verification.report import text_from_verification, write_page

    opened = read_bundle(bundle)
    samples, verification = _verified(opened, **given)
    if report:
        write_page(report, opened, verification, samples)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    emit(verification.to_json(), text_from_verification(verification, width=width), as_json=as_json)
    if not verification:
        failed = sum(not one for one in verification.rows)
        raise CheckFailed(f"{bundle}: {failed} of {len(verification.rows)} comparisons are out of tolerance")


def _verified(
    bundle: Bundle,
    *,
    checkpoint: Path | None,
    images: Path | None,
    url: str | None,
    plan: Path | None,
    precision: str,
    providers: tuple[str, ...],
    max_batch: int,
) -> tuple[list[VerificationSamples], Verification]:
    """All comparisons that the options request; what fails quickly comes first."""
    from clipship.core.comparison import Verification, batch_sizes_up_to, golden_samples
    from clipship.export.image_input import pictures_for
    from clipship.export.reference import samples_from_pictures, validate_base_model, verify_text
    from clipship.export.verification.verify import verify_bundle, verify_plan
    from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint

    sizes = batch_sizes_up_to(max_batch)
    method = method_from_checkpoint(load_checkpoint(checkpoint)) if checkpoint else None
    samples = [golden_samples(bundle)]
    if method:
        validate_base_model(bundle, method)
    if images or method:  # without a folder, the built-in world's
        samples.append(samples_from_pictures(bundle, pictures_for(images), method))
    other = Verification(())
    if url:
        other += other_stage("verify_server")(bundle, url, samples, precision=precision, batch_sizes=sizes)
    if plan:
        other += verify_plan(bundle, plan, samples, batch_sizes=sizes)
    total = verify_bundle(bundle, samples, batch_sizes=sizes, providers=providers or None)
    text = verify_text(bundle, method) if method else Verification(())
    return samples, total + text + other
