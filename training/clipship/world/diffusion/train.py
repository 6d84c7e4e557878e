"""Train `clipship-tiny-diffusion`: `python -m clipship.world.diffusion.train --out DIR [--resume]`.

Three stages: the autoencoder, the latents of all pictures, the denoiser. The run is seeded; killed and started again
with `--resume`, it ends with the weights of an uninterrupted run. The result is `DIR/pipeline`, a folder that
`diffusers.DiffusionPipeline.from_pretrained` loads; it is written at every measurement.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.training.model.builtin import TINY
from clipship.training.model.clip import load_clip
from clipship.world.diffusion import autoencoder as first_stage
from clipship.world.diffusion import denoiser as last_stage
from clipship.world.diffusion.autoencoder import AutoencoderSettings, train_autoencoder
from clipship.world.diffusion.denoiser import DenoiserRun, DenoiserSettings
from clipship.world.diffusion.judge import Question, questions, rows_of, total_of
from clipship.world.diffusion.latents import encoded_pictures, normalise_latents
from clipship.world.diffusion.pipeline import hide_progress_bars, pipeline_of, text_parts, write_pipeline
from clipship.world.training_run import RunSettings, parsed_settings, round_to_half

PIPELINE_FOLDER = "pipeline"
_LATENTS_FOLDER = "latents"
_NORMALISED_ON = 1024
_JUDGED = ("prints", "places", "origami")


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """Writes the pipeline with the current denoiser to `folder`, and judges it by `questions`."""

    folder: Path
    autoencoder: Any
    text_encoder: Any
    tokenizer: Any
    questions: Sequence[Question]

    def write(self, denoiser: Any) -> Any:
        """Write the pipeline and the logs so far; return the pipeline with the weights of the file."""
        half = copy.deepcopy(denoiser).eval().requires_grad_(False)
        round_to_half(half)
        pipeline = pipeline_of(self.autoencoder, half, self.text_encoder, self.tokenizer)
        logs = [self.folder.parent / stage.LOG_FILE for stage in (first_stage, last_stage)]
        write_pipeline(self.folder, pipeline, extra_files=logs)
        return pipeline

    def judge(self, denoiser: Any) -> dict[str, float]:
        """Write the pipeline and return top-1 accuracies in per cent on its images, one image of every name.

        `seen_` and `unseen_` say whether training shows the compositions, `_drawn` are pictures of the same names.
        """
        pipeline, clip = self.write(denoiser), load_clip(TINY)
        rows = [row for question in self.questions for row in rows_of(clip, pipeline, question, per_class=1)]
        totals = [total_of(rows, shown) for shown in ("seen", "unseen")]
        measured = {f"{row.shown}_top1": row.generated for row in totals}
        measured |= {f"{row.shown}_top1_drawn": row.drawn for row in totals}
        return {name: round(value, 2) for name, value in measured.items()}


def train(
    out: Path,
    autoencoder_settings: AutoencoderSettings,
    denoiser_settings: DenoiserSettings,
    *,
    resume: bool = False,
    workers: int = 1,
    judged: Sequence[Question] | None = None,
) -> dict[str, float]:
    """Train all stages, write the pipeline and return its judgement (`Exporter.judge`).

    Args:
        out: folder for the pipeline, the logs, the latents and the checkpoints.
        resume: continue what `out` holds.
        workers: processes that draw pictures.
        judged: what the pipeline is judged by; the names of three data sets when None.

    Raises:
        DataError: `out` has a checkpoint and `resume` is not set, or the other way round.
    """
    out.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(out, autoencoder_settings, resume=resume, workers=workers)
    seed = denoiser_settings.seed
    normalise_latents(autoencoder, seed, min(denoiser_settings.pictures, _NORMALISED_ON))
    latents = encoded_pictures(out / _LATENTS_FOLDER, autoencoder, seed, denoiser_settings.pictures, workers=workers)
    text_encoder, tokenizer = text_parts()
    export = Exporter(
        folder=out / PIPELINE_FOLDER,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        questions=[q for q in questions() if q.name in _JUDGED] if judged is None else judged,
    )
    run = DenoiserRun(
        out, denoiser_settings, latents=latents, text_encoder=text_encoder, tokenizer=tokenizer, judge=export.judge
    )
    if run.is_finished(resume=resume):
        return run.measure()
    run.begin(resume=resume and run.checkpoint_path.is_file())
    run.train(run.batches())
    judgement = run.measure()
    run.log(event="finished", step=run.step, train_s=round(run.train_s), **judgement)
    export.write(run.average.module)  # again, with the last line of the log
    return judgement


def main() -> None:
    """Run the script."""
    stages: dict[str, RunSettings] = {"autoencoder-": AutoencoderSettings(), "denoiser-": DenoiserSettings()}
    options, (first, last) = parsed_settings("clipship.world.diffusion.train", __doc__, stages)
    assert isinstance(first, AutoencoderSettings)
    assert isinstance(last, DenoiserSettings)
    hide_progress_bars()
    judgement = train(options["out"], first, last, resume=options["resume"], workers=options["workers"])
    sys.stdout.write(f"{options['out'] / PIPELINE_FOLDER}: {judgement}\n")


if __name__ == "__main__":
    main()
