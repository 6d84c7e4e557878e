"""``clipship pack`` and ``clipship verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.bundle import read_bundle
from clipship.core.cli import emit, json_option
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.files import sha256_of
from clipship.core.progress import log
from clipship.core.vocabulary import Vocabulary, vocabulary_from_file

if TYPE_CHECKING:
    from clipship.training.checkpoint import Checkpoint


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--vocabulary",
    type=click.Path(path_type=Path),
    help="Class names, one a line, or JSON. [default: the checkpoint's]",
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="Verify with images of this folder. [default: built in]"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@json_option
def pack(checkpoint: Path, vocabulary: Path | None, images: Path | None, out: Path, as_json: bool) -> None:
    """Export CHECKPOINT to ONNX for a vocabulary, compare it with PyTorch, and write the bundle.

    The bundle is written only when every comparison is within tolerance.

    Example: clipship pack runs/prints --images world/prints --out bundles/prints
    """
    _require_export_packages()
    from clipship.export.pack import bundle_from_method, refuse_foreign_folder
    from clipship.export.pictures import pictures_for
    from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint

    refuse_foreign_folder(out)
    saved = load_checkpoint(checkpoint)
    words = vocabulary_from_file(vocabulary) if vocabulary else Vocabulary(names=saved.task.class_names)
    pictures = pictures_for(images)
    log(f"verifying with {len(pictures)} images of {images or 'the built-in world'}")
    bundle = bundle_from_method(
        method_from_checkpoint(saved),
        words,
        pictures,
        out,
        provenance=_provenance(checkpoint, saved),
        temperature=saved.temperature,
    )
    result = {"bundle": str(out), "digest": bundle.digest, "classes": len(words), **bundle.verification()}
    line = f"{out}: {len(words)} classes, verified on {len(pictures)} images, digest {bundle.digest[:16]}"
    emit(result, line, as_json=as_json)


def _provenance(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the learned prompts come from, for people who read the manifest."""
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
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Compare with PyTorch running this checkpoint.")
@click.option("--images", type=click.Path(path_type=Path), help="Compare on images of this folder (with --checkpoint).")
@json_option
def verify(bundle: Path, checkpoint: Path | None, images: Path | None, as_json: bool) -> None:
    """Compare the ONNX files of BUNDLE, run here, with its golden samples, and with PyTorch given a checkpoint.

    Example: clipship verify bundles/prints --checkpoint runs/prints --images world/prints
    """
    _require_export_packages()
    from clipship.export.verify import Verification, verify_bundle

    opened = read_bundle(bundle)
    verification = verify_bundle(opened)
    if checkpoint:
        from clipship.export.pictures import pictures_for
        from clipship.export.reference import verify_against_method
        from clipship.training.checkpoint import load_checkpoint, method_from_checkpoint

        method = method_from_checkpoint(load_checkpoint(checkpoint))
        live = verify_against_method(opened, method, pictures_for(images))
        verification = Verification((*verification.comparisons, *live.comparisons))
    emit(verification.to_json(), str(verification), as_json=as_json)
    if not verification:
        failed = sum(not one for one in verification.comparisons)
        raise CheckFailed(f"{bundle}: {failed} of {len(verification.comparisons)} comparisons are out of tolerance")


def _require_export_packages() -> None:
    for package in ("torch", "onnx", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "export") from error
