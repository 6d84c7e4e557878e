"""From file bytes to the encoder's pixels, beside open_clip's own transform in the same run.

    python benchmarks/decoding.py --out runs/decoding
    python benchmarks/decoding.py --images photographs/ --models clipship-tiny ViT-B-32/random --out runs/decoding

Pictures are those of a folder, or smooth synthetic ones, resized to each size and saved as JPEG files of quality 90.
One core: every way decodes every file in each round, in turn, and a ratio is between the medians of a round, so a
machine that is slow for a while is slow for all. Counted is the thread's processor time (none of the ways starts other
threads for one image), so that other programs on the core are not. open_clip's way is what its users run:
``PIL.Image.open``, then its transform, which ends with normalised float32; the others end with uint8, the rest is in
the exported graph. Pillow's ways say whether Pillow alone would do: the whole image resized and then cropped, or with
``box`` only the crop, or with ``draft`` an image that the JPEG decoder has shrunk. Threads: images a second of 1
thread, 2, and as many as there are cores. Difference: of the "fast" pixels from the exact ones, and what it does to
the embedding; and of what simplejpeg's quicker settings would give.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.images import decoding as images
from clipship.core.images.decoding import (
    ImageSpec,
    Resample,
    centred_corner,
    decode_image,
    pixels_from_bytes,
    resized_size,
)
from clipship.core.images.files import files_in
from clipship.core.tables import Table, machine, with_spread, write_table

SIZES = ("500x375", "300x225", "1920x1080", "4000x3000")
PICTURES = 24
QUALITY = 90
SPEC = ImageSpec(size_px=224, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))

Way = Callable[[bytes], Any]


def pictures(folder: Path | None) -> list[Image.Image]:
    """Evenly from the files of ``folder``, the larger ones; or synthetic ones."""
    if folder is None:
        random = np.random.default_rng(0)
        coarse = random.integers(0, 256, (PICTURES, 24, 32, 3), dtype=np.uint8)
        return [Image.fromarray(one).resize((640, 480), Image.Resampling.BICUBIC) for one in coarse]
    files = [Path(found.path) for found in files_in(str(folder))]
    decoded = [decode_image(path.read_bytes()) for path in files[:: max(1, len(files) // (4 * PICTURES))]]
    return sorted(decoded, key=lambda image: -min(image.size))[:PICTURES]


def jpegs(sources: Sequence[Image.Image], size: str) -> list[bytes]:
    """Each of ``sources`` as a JPEG file of ``size``."""
    width, height = map(int, size.split("x"))
    found = []
    for source in sources if width * height < 4_000_000 else sources[:4]:
        buffer = io.BytesIO()
        source.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
        found.append(buffer.getvalue())
    return found


def by_pillow(data: bytes, *, box: bool = False, draft: bool = False) -> NDArray[np.uint8]:
    """Pillow's own resize of the whole image, then the crop.

    Args:
        box: resize the part that the crop keeps, and no more.
        draft: let the JPEG decoder shrink the image by 2, 4 or 8 first.
    """
    image = Image.open(io.BytesIO(data))
    width, height = resized_size(*image.size, SPEC.size_px)
    left, top = centred_corner(width, height, SPEC.size_px)
    crop = (left, top, left + SPEC.size_px, top + SPEC.size_px)
    if draft:
        image.draft("RGB", (width, height))
    rgb = image.convert("RGB")
    if not box:
        return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC).crop(crop))
    across, down = rgb.width / width, rgb.height / height
    kept = (crop[0] * across, crop[1] * down, crop[2] * across, crop[3] * down)
    return np.asarray(rgb.resize((SPEC.size_px, SPEC.size_px), Image.Resampling.BICUBIC, box=kept))


def ways() -> dict[str, Way]:
    """By name: open_clip's first, then ours with each decoder that is installed."""
    from open_clip import image_transform

    transform = image_transform(SPEC.size_px, is_train=False, mean=SPEC.mean, std=SPEC.std)
    found: dict[str, Way] = {"open_clip": lambda data: transform(Image.open(io.BytesIO(data))), "Pillow": by_pillow}
    found["Pillow, box"] = partial(by_pillow, box=True)
    found["Pillow, draft and box"] = partial(by_pillow, box=True, draft=True)
    for resample in get_args(Resample):
        found[f"{resample}, Pillow decodes"] = partial(pixels_from_bytes, spec=SPEC, resample=resample)
        if images._simplejpeg() is not None:
            found[f"{resample}, simplejpeg decodes"] = partial(pixels_from_bytes, spec=SPEC, resample=resample)
    return found


def decoder_of(name: str) -> AbstractContextManager[Any]:
    """While a way of that ``name`` runs."""
    return nullcontext() if "simplejpeg" in name else patch.object(images, "_simplejpeg", lambda: None)


def round_ms(way: Way, files: Sequence[bytes]) -> float:
    """Median milliseconds of this thread's processor time that a file takes."""
    taken = []
    for data in files:
        started = time.thread_time()
        way(data)
        taken.append(time.thread_time() - started)
    return 1000 * statistics.median(taken)


def one_core(sources: Sequence[Image.Image], size: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each way: milliseconds and the ratio to open_clip's, of every round."""
    files, found = jpegs(sources, size), ways()
    taken: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, way in found.items():
            with decoder_of(name):
                measured = round_ms(way, files)
            if number:  # the first warms up
                taken[name].append(measured)
    exact = [pixels_from_bytes(data, SPEC).astype(int) for data in files]
    largest = {
        name: max(int(np.abs(way(data) - pixels).max()) for data, pixels in zip(files, exact, strict=True))
        for name, way in found.items()
        if name != "open_clip"  # its transform ends with normalised floats
    }
    return [
        {
            "size": size,
            "way": name,
            "file_kb": round(statistics.mean(map(len, files)) / 1000, 1),
            "ms": [round(each, 3) for each in each_ms],
            "largest": largest.get(name),
            "ratio": [round(theirs / ours, 3) for theirs, ours in zip(taken["open_clip"], each_ms, strict=True)],
        }
        for name, each_ms in taken.items()
    ]


def threads(files: Sequence[bytes], seconds: float) -> list[dict[str, Any]]:
    """Images a second of each way with 1 thread, 2, ... the number of cores."""
    cores = len(os.sched_getaffinity(0))
    rows = []
    for name, way in ways().items():
        for count in sorted({1, 2, cores}):
            with decoder_of(name), ThreadPoolExecutor(count) as pool:
                started, done = time.perf_counter(), 0
                while time.perf_counter() - started < seconds:
                    done += len(list(pool.map(way, files)))
                rate = done / (time.perf_counter() - started)
            rows.append({"way": name, "threads": count, "cores": cores, "images_per_s": round(rate, 1)})
    return rows


def differences(files: Sequence[bytes], models: Sequence[str]) -> list[dict[str, Any]]:
    """How far the fast pixels are from the exact ones, and the embeddings of both by each model."""
    import torch

    from clipship.training.model.clip import load_clip

    rows = []
    for model in models:
        torch.manual_seed(0)
        clip = load_clip(model)
        pixels = [
            np.stack([pixels_from_bytes(data, clip.image_spec, how) for data in files]) for how in get_args(Resample)
        ]
        with torch.inference_mode():
            features = [
                torch.nn.functional.normalize(clip.model.encode_image(clip.normalize(torch.from_numpy(each))), dim=-1)
                for each in pixels
            ]
        apart = np.abs(pixels[0].astype(int) - pixels[1])
        cosines = (features[0].double() * features[1].double()).sum(dim=-1)
        rows.append(
            {
                "model": model,
                "size_px": clip.image_spec.size_px,
                "share_off": float((apart > 0).mean()),
                "largest": int(apart.max()),
                "cosine_median": float(cosines.median()),
                "cosine_smallest": float(cosines.min()),
            }
        )
    return rows


def hostile_jpegs(quality: int) -> list[bytes]:
    """Noise and stripes of one pixel, larger and smaller than the encoder's input, in two subsamplings of colour."""
    random, found = np.random.default_rng(0), []
    for height, width in ((375, 500), (224, 300), (100, 120)):
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        stripes = (np.indices((height, width)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
        for pixels, subsampling in itertools.product((noise, stripes), (0, 2)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
            found.append(buffer.getvalue())
    return found


def quicker_settings(sources: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """How far the pixels are from the exact ones with settings of the JPEG decoder that nothing here uses, and why."""
    turbo = images._simplejpeg()
    if turbo is None:
        return []
    sets = {"photographs": [data for size in SIZES[:2] for data in jpegs(sources, size)]}
    sets |= {f"hostile, quality {quality}": hostile_jpegs(quality) for quality in (75, 100)}
    rows = []
    for (setting, name), (which, files) in itertools.product(
        {"fastdct": "fast DCT", "fastupsample": "fast upsampling"}.items(), sets.items()
    ):
        apart = [
            np.abs(np.subtract(*(images.pixels_from_array(each, SPEC).astype(int) for each in pair)))
            for pair in ((turbo.decode_jpeg(data), turbo.decode_jpeg(data, **{setting: True})) for data in files)
        ]
        share = float(np.mean([(each > 0).mean() for each in apart]))
        rows.append({"setting": name, "pictures": which, "largest": int(max(map(np.max, apart))), "share_off": share})
    return rows


def off_by(largest: int | None) -> str:
    """The largest difference from the exact pixels."""
    return "" if largest is None else f"{largest}/255"


def tables(found: dict[str, list[dict[str, Any]]]) -> dict[str, Table]:
    """Markdown of what was measured, by the name of its part."""
    return {
        "one_core": Table(
            title=f"One core of {machine()}",
            header=("size", "way", "ms an image", "times open_clip", "off by at most"),
            rows=tuple(
                (row["size"], row["way"], with_spread(row["ms"]), with_spread(row["ratio"]), off_by(row["largest"]))
                for row in found["one_core"]
            ),
        ),
        "threads": Table(
            title=f"Threads on {machine()}",
            header=("way", "threads", "images/s"),
            rows=tuple((row["way"], str(row["threads"]), f"{row['images_per_s']:.0f}") for row in found["threads"]),
        ),
        "difference": Table(
            title="Fast against exact",
            header=("model", "pixels", "values off", "by at most", "cosine, median", "smallest"),
            rows=tuple(
                (
                    row["model"],
                    str(row["size_px"]),
                    f"{row['share_off']:.4%}",
                    f"{row['largest']}/255",
                    f"{row['cosine_median']:.8f}",
                    f"{row['cosine_smallest']:.8f}",
                )
                for row in found["difference"]
            ),
        ),
        "quicker": Table(
            title="Quicker settings of the JPEG decoder against exact",
            header=("setting", "pictures", "values off", "by at most"),
            rows=tuple(
                (row["setting"], row["pictures"], f"{row['share_off']:.0%}", f"{row['largest']}/255")
                for row in found["quicker"]
            ),
            text_columns=2,
        ),
    }


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of photographs; without it, synthetic pictures")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--models", nargs="*", default=["clipship-tiny"], help="whose embeddings are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement with threads")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sources = pictures(options.images)
    files = jpegs(sources, options.sizes[0])
    found = {
        "one_core": [row for size in options.sizes for row in one_core(sources, size, options.rounds)],
        "threads": threads(files, options.seconds),
        "difference": differences(files, options.models),
        "quicker": quicker_settings(sources),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for part, table in tables(found).items():
        write_table(options.out, part, found[part], table)
        print(table.to_markdown())


if __name__ == "__main__":
    main()
