"""The report names the processor, and which way the tests that depend on it have gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipship.core.tables import machine
from tests.strangers import own

_WAYS = pytest.StashKey[list[str]]()


def pytest_report_header() -> str:
    return f"processor: {machine()}"


@pytest.fixture
def tell_way(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """For a test whose path depends on the processor: the summary tells which one it took."""
    ways = request.config.stash.setdefault(_WAYS, [])
    return lambda way: ways.append(f"{request.node.nodeid}: {way}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ways = config.stash.get(_WAYS, [])
    if ways:
        terminalreporter.section(f"ways taken on {machine()}")
        terminalreporter.write("\n".join([*ways, ""]))


@pytest.fixture
def stranger_folder() -> Iterator[Path]:
    """An empty folder of a user without an account, which that user can reach (pytest's own are closed to others)."""
    with tempfile.TemporaryDirectory() as folder:
        yield own(Path(folder))
