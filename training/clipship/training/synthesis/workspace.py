"""The folder of a set that is being made: whatever stops the run, finished batches are kept.

::

    DIR/unfinished.json      the settings; the manifest replaces it when the set is whole
    DIR/images/CLASS/SEED    the images
    DIR/batches/N.json       the record of a batch, written when all of its images are in place

Every file appears whole or not at all, and a batch is made if and only if it has a record. A kill loses the batch in
progress: it is made again, with the same seeds, over what was written of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.files import read_record, write_bytes_atomic, write_json_atomic
from clipship.training.synthesis.candidates import Candidate
from clipship.training.synthetic_set import IMAGE_FOLDER, MANIFEST_FILE, UNFINISHED_FILE, read_manifest

FORMAT = "clipship-synthesis"
FORMAT_VERSION = 2
KIND = "clipship-synthesize"
"""The generator in the manifest of a finished set."""

_BATCHES = "batches"
_ADVICE = "delete the folder and start again"
_HOW = ("batch_size",)
"""Settings that may change between starts: they decide how images are made, not which."""


@dataclass(frozen=True, kw_only=True)
class CandidateRecord(Candidate):
    """A candidate that was made."""

    path: str
    """Below the folder; the file is missing if there is a reason."""
    batch: int
    reason: str | None
    """Why the image cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The unfinished folder, which several processes share."""

    folder: Path

    def records(self) -> dict[tuple[int, int], CandidateRecord]:
        """What all processes have made so far, by :attr:`Candidate.key`.

        Raises:
            DataError: a record is damaged.
        """
        return {record.key: record for path in self._batches.glob("*.json") for record in _records_in(path)}

    def add(self, records: Sequence[CandidateRecord], files: Mapping[str, bytes]) -> None:
        """Write the images of one batch (by :attr:`CandidateRecord.path`), then its record.

        Raises:
            OSError: the disk is full; the batch counts as not made.
        """
        for path, data in files.items():
            write_bytes_atomic(self.folder / path, data)
        write_json_atomic(self._batches / f"{records[0].batch}.json", [asdict(record) for record in records])

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write ``settings``, or validate that they are those of the run that made images here.

        Raises:
            DataError: they differ, with what differs, or their file is damaged.
        """
        path = self.folder / UNFINISHED_FILE
        if path.exists():
            record = read_record(path, record_format=FORMAT, version=FORMAT_VERSION, error=DataError, advice=_ADVICE)
            if self.records():
                _validate_same_settings(self.folder, record["settings"], settings)
                return
        write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": dict(settings)})
        shutil.rmtree(self.folder / IMAGE_FOLDER, ignore_errors=True)  # of a killed batch of other settings

    def finish(self) -> None:
        """Delete what only an unfinished set needs, behind the manifest."""
        for path in self.folder.glob(f"{IMAGE_FOLDER}/*/.*.part"):  # of killed processes
            path.unlink()
        shutil.rmtree(self._batches, ignore_errors=True)
        (self.folder / UNFINISHED_FILE).unlink(missing_ok=True)

    @property
    def _batches(self) -> Path:
        return self.folder / _BATCHES


def _records_in(path: Path) -> list[CandidateRecord]:
    try:
        return [CandidateRecord(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it, and the batch is made again") from error


def is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds the whole set of ``settings``.

    Raises:
        DataError: it holds a set of other settings, with what differs, or something else.
    """
    if (folder / MANIFEST_FILE).is_file():
        generator = read_manifest(folder)["generator"]
        if generator.get("kind") != KIND:
            raise DataError(
                f"{folder}: holds a set made by {generator.get('kind', 'something else')}: give another --out"
            )
        _validate_same_settings(folder, generator["settings"], settings)
        return True
    others = [one for one in folder.iterdir() if not one.name.endswith(".part")] if folder.is_dir() else []
    if others and not (folder / UNFINISHED_FILE).is_file():
        raise DataError(f"{folder}: holds other files and no synthetic set: give an empty or a new folder")
    return False


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed, as "steps 50 -> 30", without what does not change the images, such as the pipeline's path."""
    same_files = old.get("pipeline_revision") == new.get("pipeline_revision")
    ignored = (*_HOW, "pipeline") if same_files else _HOW
    names = [name for name in dict.fromkeys([*old, *new]) if name not in ignored]
    return [_change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _validate_same_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        raise DataError(
            f"{folder}: was made with other settings ({'; '.join(changed)}): give the same ones, or another --out"
        )


def _change(name: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        gone = [f"- {one!r}" for one in old if one not in new]
        come = [f"+ {one!r}" for one in new if one not in old]
        shown = [*gone, *come][:4] or ["another order"]
        return f"{name} {', '.join(shown)}{', ...' if len(gone) + len(come) > 4 else ''}"
    return f"{name} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{text[:8]}..." if is_digest else text or "''"
