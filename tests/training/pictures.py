"""Image files for data sets of a few pictures."""

from pathlib import Path

from PIL import Image


def write_jpegs(folder: Path, *names: str) -> Path:
    """Write small real JPEG files ``names``, which may have folders, below ``folder``."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number % 256, 90, 160)).save(path, format="JPEG")
    return folder
