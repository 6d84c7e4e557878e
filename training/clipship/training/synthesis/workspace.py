"""The folder of a set that is being made: what is done stays done, whatever stops the run.

::

    DIR/unfinished.json      the settings; the manifest takes its place when the set is whole
    DIR/journal-R.jsonl      one line for each candidate that process R made, added when its image is in place
    DIR/images/...           the images
    DIR/.batch-R             a batch on its way: its images and their lines, there as a whole or not at all

A batch is written to ``.batch-R``, then its images move to their places and its lines are added to the journal. A run
that finds a ``.batch-R`` finishes those moves first, so a batch is made either wholly or not at all, and never twice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.files import read_record, replace_folder, write_json_atomic
from clipship.training.synthetic_set import MANIFEST_FILE, UNFINISHED_FILE, read_manifest

FORMAT = "clipship-synthesis"
FORMAT_VERSION = 1
KIND = "clipship-synthesize"
"""What the manifest of a finished set calls its generator."""

_ROWS = "rows.json"
_ADVICE = "delete the folder and begin anew"
_HOW = ("batch_size",)
"""Settings that may change from one start to the next: how images are made, not which."""


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """One line of the journal: a candidate that was made."""

    place: int
    attempt: int
    class_name: str
    seed: int
    prompt: str
    source: str | None
    path: str
    """Below the folder; there is no file where there is a reason."""
    batch: int
    reason: str | None
    """Why the image cannot be used."""

    @property
    def key(self) -> tuple[int, int]:
        """As :attr:`clipship.training.synthesis.candidates.Candidate.key`."""
        return self.place, self.attempt


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The unfinished folder, seen from one process."""

    folder: Path
    rank: int = 0

    def rows(self) -> dict[tuple[int, int], CandidateRow]:
        """What all processes have made so far, by :attr:`CandidateRow.key`.

        Raises:
            DataError: a journal is damaged.
        """
        found = {}
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for row in _rows_of(path):
                found[row.key] = row
        return found

    def add(self, rows: Sequence[CandidateRow], files: Mapping[str, bytes]) -> None:
        """Put the images of one batch in their places and note its rows; all of it happens, or nothing.

        Args:
            rows: the batch.
            files: bytes of the image files, by :attr:`CandidateRow.path`.

        Raises:
            OSError: the disk is full; nothing of the batch is kept.
        """
        stage = self.folder / f".batch-{self.rank}"
        with replace_folder(stage) as new:
            for row in rows:
                if row.path in files:
                    _write_through(new / Path(row.path).name, files[row.path])
            _write_through(new / _ROWS, json.dumps([asdict(row) for row in rows]).encode())
        self._settle(stage, known=set())

    def recover(self) -> None:
        """Finish what a killed run had begun: one process does it, before the others start."""
        _delete_begun(self.folder)
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            _drop_torn_line(path)
        known = set(self.rows())
        for stage in sorted(self.folder.glob(".batch-*")):
            self._settle(stage, known)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note ``settings``, or check that they are those of the run that has made something here.

        Raises:
            DataError: it had other settings, with what differs, or its record is damaged.
        """
        path = self.folder / UNFINISHED_FILE
        if not path.exists() or not self.rows():
            write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": dict(settings)})
        record = read_record(path, record_format=FORMAT, version=FORMAT_VERSION, error=DataError, advice=_ADVICE)
        _validate_same_settings(self.folder, record["settings"], settings)

    def finish(self) -> None:
        """Delete what only an unfinished set needs; the manifest is there already."""
        _delete_begun(self.folder)
        for path in (*self.folder.glob("journal-*.jsonl"), self.folder / UNFINISHED_FILE):
            path.unlink(missing_ok=True)

    def _settle(self, stage: Path, known: set[tuple[int, int]]) -> None:
        """Move a batch's images to their places and add its rows but those ``known``; a kill in between is no harm."""
        rows = [CandidateRow(**row) for row in json.loads((stage / _ROWS).read_text(encoding="utf-8"))]
        for row in rows:
            image, final = stage / Path(row.path).name, self.folder / row.path
            if image.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(image, final)
        journal = self.folder / f"journal-{stage.name.rpartition('-')[2]}.jsonl"
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows if row.key not in known]
        _append(journal, "".join(lines).encode())
        done = stage.with_name(f".{stage.name}.done.part")
        os.rename(stage, done)  # deleted file by file, it would be half a batch for a moment
        shutil.rmtree(done)


def is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the set of ``settings`` is in ``folder``, whole.

    Raises:
        DataError: another set is there, with what differs, or something else.
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
    """What changed, as "steps 50 -> 30"; what does not change the images, such as the pipeline's place, is left out."""
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


def _rows_of(path: Path) -> list[CandidateRow]:
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        return [CandidateRow(**json.loads(line)) for line in lines if line.endswith(b"\n")]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {_ADVICE}") from error


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left without its end."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _delete_begun(folder: Path) -> None:
    """Delete batches that a killed run had not written or deleted to the end; nobody does so in a locked folder."""
    for path in folder.glob("..batch-*.part"):
        shutil.rmtree(path)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
