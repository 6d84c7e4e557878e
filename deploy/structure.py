"""The structure in figures: folders, modules, lines, import circles, imports of command lines.

    python deploy/structure.py [--json] [--root CHECKOUT]

Every import counts, also one inside a function. In each folder, its modules and subfolders are the *children*; an
import between two files is an arrow between the children that hold them. A *circle* is a set of modules, or of
children of one folder, that import each other. ``tests/core/test_layout.py`` refuses both.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("core", "training", "export", "serving")
MAX_MODULES, MAX_KINDS = 12, 24
KINDS = ("clipship.training.methods", "clipship.training.datasets")
"""Folders in which each module is one method or one data set: up to 24 of them."""

Graph = Mapping[str, Set[str]]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a checkout holds; modules by their dotted names."""

    files: Mapping[str, Path]
    imports: Graph
    """By module: the modules it imports."""

    @property
    def folders(self) -> Mapping[str, list[str]]:
        """By folder, its modules but ``__init__`` and ``__main__``."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, path in self.files.items():
            if path.stem not in ("__init__", "__main__"):
                found[name.rpartition(".")[0]].append(name)
        return dict(sorted(found.items()))

    @property
    def lines(self) -> int:
        """Of all files, blank ones and comments included."""
        return sum(path.read_text(encoding="utf-8").count("\n") for path in self.files.values())

    def crowded(self) -> list[str]:
        """Folders with more modules than are found at a glance."""
        limits = {folder: MAX_KINDS if folder in KINDS else MAX_MODULES for folder in self.folders}
        return [
            f"{folder} has {len(modules)} modules, at most {limits[folder]}"
            for folder, modules in self.folders.items()
            if len(modules) > limits[folder]
        ]

    def circles(self) -> list[str]:
        """Circles of modules, and of the children of each folder."""
        graphs = {"": self.imports} | {folder: self._children(folder) for folder in self._parents()}
        return [f"{folder or 'modules'}: {circle}" for folder, graph in graphs.items() for circle in _circles(graph)]

    def command_lines(self) -> list[str]:
        """Imports of a command-line module by one that is none."""
        return [
            f"{name} imports {other}"
            for name, others in self.imports.items()
            for other in sorted(others)
            if _is_command_line(other) and not (_is_command_line(name) or name == "clipship.__main__")
        ]

    def upward(self, arrows: Mapping[str, Set[str]]) -> list[str]:
        """Imports of a stage that ``arrows`` does not allow."""
        return [
            f"{name} imports {other}"
            for name, others in self.imports.items()
            for other in sorted(others)
            if _stage(other) not in {_stage(name), *arrows[_stage(name)]}
        ]

    def _parents(self) -> list[str]:
        parts = (name.split(".") for name in self.files)
        return sorted({".".join(each[:length]) for each in parts for length in range(1, len(each))})

    def _children(self, folder: str) -> Graph:
        """The arrows between the children of ``folder``."""
        depth = folder.count(".") + 2
        graph: dict[str, set[str]] = defaultdict(set)
        for name, others in self.imports.items():
            for other in others:
                if name.startswith(f"{folder}.") and other.startswith(f"{folder}."):
                    here, there = (".".join(each.split(".")[:depth]) for each in (name, other))
                    if here != there:
                        graph[here].add(there)
        return graph


def _circles(graph: Graph) -> Iterator[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def _stage(name: str) -> str:
    return name.split(".")[1]


def _is_command_line(name: str) -> bool:
    return any(part == "cli" or part.endswith("_cli") for part in name.split("."))


def structure_of(root: Path) -> Structure:
    """The structure of the checkout at ``root``."""
    files = dict(_modules(root))
    return Structure(files=files, imports={name: set(_imported(path, files)) - {name} for name, path in files.items()})


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for source in SOURCES:
        for path in sorted((root / source / "clipship").rglob("*.py")):
            parts = path.relative_to(root / source).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imported(path: Path, known: Collection[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = {each if each in known else node.module for each in submodules}
        else:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        yield from names & set(known)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    structure = structure_of(given.root)
    largest = max(structure.folders, key=lambda folder: len(structure.folders[folder]))
    figures = {
        "modules": len(structure.files),
        "folders": len(structure.folders),
        "lines": structure.lines,
        "largest folder": f"{largest}: {len(structure.folders[largest])} modules",
        "crowded folders": structure.crowded(),
        "circles": structure.circles(),
        "command lines imported by libraries": structure.command_lines(),
    }
    if given.json:
        print(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        listed = value if isinstance(value, list) else []
        print(f"{name:<36} {len(value) if isinstance(value, list) else value}")
        for line in listed:
            print(f"    {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
