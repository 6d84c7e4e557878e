"""The folder format of synthetic images of classes.

::

    DIR/manifest.json               what made the images, the template, the class names
    DIR/images.parquet              one row per candidate, with the columns of `SCHEMA`
    DIR/images/<class>/<seed>.jpg   the candidates (or .webp); those that were not kept may be deleted
    DIR/sheets/<class>.jpg          a contact sheet of each class, where one was made

The manifest is written last, so a folder with one is complete. Format version 2 added the columns
from `negative_prompt` on; version 1 is read, and lacks them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipship.core.errors import DataError, near
from clipship.core.files import read_record, replace_file, replace_folder, write_json_atomic

FORMAT = "clipship-synthetic-set"
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
MANIFEST_FILE = "manifest.json"
TABLE_FILE = "images.parquet"
UNFINISHED_FILE = "unfinished.json"
"""Takes the manifest's place while `clipship synthesize` has not finished."""
IMAGE_FOLDER = "images"
SHEET_FOLDER = "sheets"
JPEG_QUALITY = 92
SYNTHETIC = "synthetic"
"""Where ``clipship train`` looks for a synthetic set, below the data set's folder."""
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("score", pa.float32()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("pipeline", pa.string()),
        pa.field("revision", pa.string()),
        pa.field("scheduler", pa.string()),
        pa.field("steps", pa.int32()),
        pa.field("guidance", pa.float64()),
        pa.field("source", pa.string()),
        pa.field("batch", pa.int64()),
    ]
)
_VERSION_1 = SCHEMA.names[: SCHEMA.names.index("negative_prompt")]
_MANIFEST_KEYS = {"format", "format_version", "generator", "template", "class_names", "images_per_class"}


@dataclass(frozen=True, kw_only=True)
class SyntheticImage:
    """One candidate image."""

    path: Path
    """The file, joined to the set's folder."""
    class_name: str
    prompt: str
    seed: int
    score: float | None
    """CLIP cosine of the image and what it should show; None if it was not scored."""
    kept: bool
    reason: str | None
    """Why it was not kept."""
    negative_prompt: str | None = None
    pipeline: str | None = None
    """The folder or hub id of the text-to-image pipeline."""
    revision: str | None = None
    """The hub's commit, or the SHA-256 of a local pipeline's files."""
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    """Classifier-free guidance scale."""
    source: str | None = None
    """The real image that image-to-image started from."""
    batch: int | None = None
    """Number of the batch it was made in."""


@dataclass(frozen=True, kw_only=True)
class SyntheticSet:
    """Synthetic images of an ordered list of classes."""

    folder: Path
    generator: dict[str, Any]
    """What made the images, in its maker's own form."""
    template: str
    """The text whose `{}` took the class names."""
    class_names: tuple[str, ...]
    images_per_class: int
    """How many images of a class were to be kept; there may be fewer, or none."""
    images: tuple[SyntheticImage, ...]
    """All candidates, class by class."""

    @classmethod
    def load(cls, folder: Path) -> "SyntheticSet":
        """Read a complete set.

        Raises:
            DataError: no set, an unfinished one, another format version, or missing files of kept images.
        """
        manifest = read_manifest(folder)
        images = tuple(_read_images(folder, manifest))
        _validate_files(folder, images)
        return cls(
            folder=folder,
            generator=manifest["generator"],
            template=manifest["template"],
            class_names=tuple(manifest["class_names"]),
            images_per_class=manifest["images_per_class"],
            images=images,
        )

    def kept(self, class_name: str) -> list[SyntheticImage]:
        """Return the kept images of a class, best score first.

        Raises:
            DataError: the set does not have the class.
        """
        if class_name not in self.class_names:
            raise DataError(f"{self.folder} has no class {class_name!r}; {near(class_name, self.class_names)}")
        chosen = [image for image in self.images if image.kept and image.class_name == class_name]
        return sorted(chosen, key=lambda image: 0.0 if image.score is None else -image.score)


@dataclass(frozen=True, kw_only=True)
class SyntheticSetWriter:
    """Collects the candidates of a set that is being written; see `write_synthetic_set`."""

    folder: Path
    class_names: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        image: Image.Image,
        *,
        class_name: str,
        prompt: str,
        seed: int,
        score: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Write one candidate; it is kept unless there is a reason not to.

        Raises:
            DataError: the class is not one of the set's, or has an image of this seed already.
        """
        if class_name not in self.class_names:
            raise DataError(f"{class_name!r} is not a class of this set; {near(class_name, self.class_names)}")
        relative = PurePosixPath(IMAGE_FOLDER, folder_of(class_name), f"{seed}.jpg")
        path = self.folder / relative
        if path.exists():
            raise DataError(f"the class {class_name!r} has two images of seed {seed}; give every image its own seed")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(path, quality=JPEG_QUALITY)
        row = {"path": str(relative), "class_name": class_name, "prompt": prompt, "seed": seed}
        self.rows.append(row | {"score": score, "kept": reason is None, "reason": reason})


@contextmanager
def write_synthetic_set(
    out: Path, *, generator: dict[str, Any], template: str, class_names: Sequence[str], images_per_class: int
) -> Iterator[SyntheticSetWriter]:
    """Yield a writer; the set appears at `out` only if the block ends without an exception.

    An older set at `out` is replaced. The other arguments are as in `SyntheticSet`.

    Raises:
        DataError: `out` is something else than a synthetic set, or two classes would share a folder.
    """
    _validate_replaceable(out)
    validate_class_folders(class_names)
    with replace_folder(out) as folder:
        writer = SyntheticSetWriter(folder=folder, class_names=tuple(class_names))
        yield writer
        complete(
            folder,
            writer.rows,
            generator=generator,
            template=template,
            class_names=class_names,
            images_per_class=images_per_class,
        )


def complete(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    generator: dict[str, Any],
    template: str,
    class_names: Sequence[str],
    images_per_class: int,
) -> None:
    """Write the table of `rows` and then the manifest, which complete the set in `folder`.

    A row has the columns of `SCHEMA`; those that are left out are null. The other arguments are as in `SyntheticSet`.
    """
    with replace_file(folder / TABLE_FILE) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), temporary)
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "generator": generator, "template": template}
    manifest |= {"class_names": list(class_names), "images_per_class": images_per_class}
    write_json_atomic(folder / MANIFEST_FILE, manifest)


def folder_of(class_name: str) -> str:
    """Return the folder name of a class: spaces and everything a file system may refuse become `_`."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in class_name).lstrip(".") or "_"


def _validate_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_manifest(out)
    except DataError as error:
        raise DataError(f"{out} exists and is not a synthetic set ({error}); choose another folder") from error


def validate_class_folders(class_names: Sequence[str]) -> None:
    """Refuse names that would share a folder.

    Raises:
        DataError: two classes have the same folder name, or one name occurs twice.
    """
    taken: dict[str, str] = {}
    for name in class_names:
        other = taken.setdefault(folder_of(name), name)
        if other != name or list(class_names).count(name) > 1:
            raise DataError(f"the classes {other!r} and {name!r} would share {folder_of(name)!r}; rename one")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a set.

    Raises:
        DataError: no manifest, an unfinished set, no JSON, another format, or a missing key.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file() and (folder / UNFINISHED_FILE).is_file():
        raise DataError(f"{folder} is not finished; run the same clipship synthesize again to continue")
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_FILE}; give the folder that holds manifest.json and images.parquet")
    manifest = read_record(
        path, record_format=FORMAT, version=READ_VERSIONS, error=DataError, advice="write the set again"
    )
    if missing := sorted(_MANIFEST_KEYS - set(manifest)):
        raise DataError(f"{path} lacks {', '.join(missing)}; write the set again")
    return manifest


def _read_images(folder: Path, manifest: Mapping[str, Any]) -> Iterator[SyntheticImage]:
    class_names = set(manifest["class_names"])
    columns = _VERSION_1 if manifest["format_version"] == 1 else SCHEMA.names
    path = folder / TABLE_FILE
    if not path.is_file():
        raise DataError(f"{path} is missing; write the set again")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}); write the set again") from error
    if missing := sorted(set(columns) - set(table.column_names)):
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; write the set again")
    for row in table.select(columns).to_pylist():
        if row["class_name"] not in class_names:
            raise DataError(f"{path}: the class {row['class_name']!r} is not in {MANIFEST_FILE}; write the set again")
        yield SyntheticImage(**row | {"path": _inside(folder, row["path"])})


def _inside(folder: Path, relative: str) -> Path:
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{folder / TABLE_FILE} names {relative!r}, which is outside the set; do not use this set")
    return folder / parts


def _validate_files(folder: Path, images: Sequence[SyntheticImage]) -> None:
    missing = [image.path for image in images if image.kept and not image.path.is_file()]
    if missing:
        shown = ", ".join(str(path.relative_to(folder)) for path in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{folder} lacks images that it keeps: {shown}{more}; copy the whole folder or write it again")
