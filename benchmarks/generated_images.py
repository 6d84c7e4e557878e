"""Generated images beside drawn ones: `python -m benchmarks.generated_images [--pipeline FOLDER] [--sheet FILE]`.

`clipship-tiny` classifies images generated for class names of the world, and pictures of the same names drawn in the
look of pre-training. The result is top-1 accuracy on generated images as a share of that on drawn ones, for
compositions that training has shown and for those it holds out. Nothing is filtered.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from clipship.core.files import replace_file
from clipship.training.model.builtin import MODELS, TINY, TINY_DIFFUSION
from clipship.training.model.clip import load_clip
from clipship.training.synthesis.recipes import TINY_GUIDANCE, TINY_STEPS
from clipship.world.diffusion.judge import FLOOR, JudgeRow, questions, rows_of, total_of
from clipship.world.diffusion.pipeline import generate, hide_progress_bars, load_pipeline

_SHEET_COLUMNS = 8
_TEXT_PX = 230
_GAP_PX = 2


def write_sheet(path: Path, pipeline: Any, **options: Any) -> None:
    """Write a PNG of generated images: a seen and an unseen name of every question, the prompt on the left."""
    lines = [
        (question.prompts[question.unseen.index(unseen)], unseen)
        for question in questions()
        for unseen in (False, True)
        if unseen in question.unseen
    ]
    prompts = [prompt for prompt, _ in lines for _ in range(_SHEET_COLUMNS)]
    images = generate(pipeline, prompts, range(len(prompts)), **options)
    step_px = images[0].width + _GAP_PX
    sheet = Image.new("RGB", (_TEXT_PX + _SHEET_COLUMNS * step_px, len(lines) * step_px), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, _SHEET_COLUMNS)
        sheet.paste(image, (_TEXT_PX + column * step_px, row * step_px))
    for row, (prompt, unseen) in enumerate(lines):
        text = f"{prompt}\n(never shown in training)" if unseen else prompt
        draw.text((_GAP_PX, row * step_px + step_px // 3), text, fill="black")
    with replace_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _judged(options: argparse.Namespace) -> list[JudgeRow]:
    clip, pipeline = load_clip(TINY), load_pipeline(options.pipeline)
    how = {"steps": options.steps, "guidance": options.guidance}
    print(f"{'names':14} {'shown':7} {'images':>6} {'drawn':>7} {'generated':>10} {'share':>7}")
    rows = []
    for question in questions():
        for row in rows_of(clip, pipeline, question, per_class=options.per_class, **how):
            rows.append(row)
            print(str(row))
    totals = [total_of(rows, shown) for shown in ("seen", "unseen")]
    for row in totals:
        print(str(row))
    if options.sheet is not None:
        write_sheet(options.sheet, pipeline, **how)
    return totals


def main() -> None:
    """Run the script; exit code 1 if a share is below `FLOOR`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generated_images", description=__doc__)
    parser.add_argument(
        "--pipeline", type=Path, default=MODELS / TINY_DIFFUSION, metavar="FOLDER", help="default: the committed"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a contact sheet, PNG")
    parser.add_argument("--per-class", type=int, default=4, help="images of a name (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TINY_STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=TINY_GUIDANCE, help="guidance scale (default: %(default)s)")
    options = parser.parse_args()
    hide_progress_bars()
    totals = _judged(options)
    if not all(totals):
        sys.exit(f"generated images have less than {100 * FLOOR:.0f} % of the accuracy on drawn ones")


if __name__ == "__main__":
    main()
