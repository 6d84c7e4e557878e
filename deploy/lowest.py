"""Prints the lowest version of every package that pyproject.toml allows, as constraints for pip.

>>> python deploy/lowest.py > lowest.txt && pip install -c lowest.txt '.[export]'
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_BOUND = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?>=(?P<version>[\w.]+)")


def lowest(requirements: Iterable[str]) -> Iterator[str]:
    """``name==version`` of each package with a lower bound, the highest of those that it has."""
    bounds: dict[str, str] = {}
    for found in filter(None, map(_BOUND.match, requirements)):
        name, version = found["name"], found["version"]
        bounds[name] = max(bounds.get(name, version), version, key=lambda one: [*map(int, one.split("."))])
    return (f"{name}=={version}" for name, version in bounds.items())


def main() -> None:
    """Print them."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    print("\n".join(lowest([*project["dependencies"], *(one for extra in extras for one in extra)])))


if __name__ == "__main__":
    main()
