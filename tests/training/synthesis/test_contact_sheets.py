"""Contact sheets: one a class, kept images first and framed green."""

from pathlib import Path

import pytest
from PIL import Image

from clipship.training.synthesis.contact_sheets import CELL_PX, COLUMNS, write_sheet
from clipship.training.synthetic_set import SyntheticImage

from ..conftest import coloured

GREEN, RED = (30, 150, 60), (200, 60, 50)


def candidate(folder: Path, seed: int, *, score: float | None, kept: bool, there: bool = True) -> SyntheticImage:
    path = folder / f"{seed}.png"
    if there:
        coloured((20 * seed, 20, 20), seed).save(path)
    reason = None if kept else "not among the best"
    return SyntheticImage(path=path, class_name="sky blue", prompt="", seed=seed, score=score, kept=kept, reason=reason)


def test_a_sheet_shows_the_kept_ones_first(tmp_path: Path) -> None:
    images = [
        candidate(tmp_path, 1, score=0.1, kept=False),
        candidate(tmp_path, 2, score=0.2, kept=True),
        candidate(tmp_path, 3, score=0.3, kept=True),
        candidate(tmp_path, 4, score=None, kept=False, there=False),
    ]
    write_sheet(tmp_path, "sky blue", images)
    with Image.open(tmp_path / "sheets" / "sky_blue.jpg") as sheet:
        side = sheet.width // 3
        assert side == CELL_PX + 8
        frames = [sheet.getpixel((side * place + 1, 14 + side // 2)) for place in range(3)]
        middles = [sheet.getpixel((side * place + side // 2, 14 + side // 2)) for place in range(3)]
    assert [pytest.approx(colour, abs=25) for colour in (GREEN, GREEN, RED)] == frames
    assert [colour[0] for colour in middles if isinstance(colour, tuple)] == pytest.approx([60, 40, 20], abs=30)


def test_many_images_make_rows_and_none_make_an_empty_sheet(tmp_path: Path) -> None:
    write_sheet(tmp_path, "many", [candidate(tmp_path, 1, score=None, kept=True)] * (2 * COLUMNS + 1))
    write_sheet(tmp_path, "none", [])
    with Image.open(tmp_path / "sheets" / "many.jpg") as many, Image.open(tmp_path / "sheets" / "none.jpg") as none:
        assert many.size == (COLUMNS * 136, 14 + 3 * 150)
        assert none.width == 136
