"""Tables as Markdown and as files."""

from __future__ import annotations

import json
from pathlib import Path

from clipship.core.tables import Table, with_spread, write_table

TABLE = Table(title="Speed", header=("model", "path", "x"), rows=(("a|b", "c", "1.00"),), notes=("where",))


def test_markdown() -> None:
    expected = "### Speed\n\n| model | path | x |\n| --- | --- | ---: |\n| a\\|b | c | 1.00 |\n\n[1] where\n"
    assert TABLE.to_markdown() == expected
    assert Table(header=("a",), rows=(("1",),), text_columns=0).to_markdown() == "| a |\n| ---: |\n| 1 |\n"


def test_the_median_and_its_spread() -> None:
    assert with_spread([3, 1, 2]) == "2.00 (1.00-3.00)"
    assert with_spread([3000.4, 1000], ",.0f") == "2,000 (1,000-3,000)"


def test_both_files(tmp_path: Path) -> None:
    write_table(tmp_path, "speed", [{"x": 1}], TABLE)
    assert json.loads((tmp_path / "speed.json").read_text()) == [{"x": 1}]
    assert (tmp_path / "speed.md").read_text() == TABLE.to_markdown()
