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
    """``name==version`` of each requirement with a lower bound, once."""
    found = (_BOUND.match(requirement) for requirement in requirements)
    return iter(dict.fromkeys(f"{one['name']}=={one['version']}" for one in found if one))


def main() -> None:
    """Print them."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    print("\n".join(lowest([*project["dependencies"], *(one for extra in extras for one in extra)])))


if __name__ == "__main__":
    main()
