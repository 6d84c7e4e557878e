"""Contact sheets: the candidates of a class with their scores, kept ones first."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipship.core.files import write_bytes_atomic
from clipship.training.inputs.batches import decoded
from clipship.training.synthetic_set import SHEET_FOLDER, SyntheticImage, folder_of

CELL_PX = 128
COLUMNS = 8
MOST = 96
"""Maximum of images on a sheet; the best ones are shown."""

_FRAME_PX, _TEXT_PX = 4, 14
_KEPT, _DROPPED, _INK, _PAPER = (30, 150, 60), (200, 60, 50), (20, 20, 20), (250, 250, 250)


def write_sheet(folder: Path, class_name: str, images: Sequence[SyntheticImage]) -> None:
    """Write the sheet of a class to ``folder/sheets``: kept images framed green, the others red; scores below.

    Images without a file, such as those the safety checker rejected, are left out.

    Raises:
        DataError: an image cannot be decoded.
    """
    usable = [image for image in _in_order(images) if image.path.is_file()]
    shown = usable[:MOST]
    rows = max(1, -(-len(shown) // COLUMNS))
    side, height = CELL_PX + 2 * _FRAME_PX, CELL_PX + 2 * _FRAME_PX + _TEXT_PX
    sheet = Image.new("RGB", (side * min(COLUMNS, max(1, len(shown))), _TEXT_PX + height * rows), _PAPER)
    draw = ImageDraw.Draw(sheet)
    kept = sum(image.kept for image in usable)
    _write(draw, (_FRAME_PX, 1), f"{class_name}: {kept} of {len(usable)} kept")
    for place, image in enumerate(shown):
        left, top = side * (place % COLUMNS), _TEXT_PX + height * (place // COLUMNS)
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_KEPT if image.kept else _DROPPED)
        cell = ImageOps.contain(decoded(image.path), (CELL_PX, CELL_PX))
        sheet.paste(cell, (left + (side - cell.width) // 2, top + (side - cell.height) // 2))
        _write(draw, (left + _FRAME_PX, top + side), "" if image.score is None else f"{image.score:.3f}")
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=88)
    write_bytes_atomic(folder / SHEET_FOLDER / f"{folder_of(class_name)}.jpg", data.getvalue())


def _in_order(images: Sequence[SyntheticImage]) -> list[SyntheticImage]:
    """Kept before dropped, best score first."""
    return sorted(images, key=lambda image: (not image.kept, 0.0 if image.score is None else -image.score))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Draw ``text`` in Pillow's own font; letters that are not Latin become boxes."""
    draw.text(place, text, fill=_INK, font=ImageFont.load_default(size=11))
