"""The report as one HTML page without external files: tables, figures and style, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipship.core.tables import Table
from clipship.training.compare.plots import inlined

TITLES = {
    "base-new": "Base and new accuracy",
    "accuracy-against-shots": "Accuracy against shots",
    "accuracy-against-synthetic": "Accuracy against synthetic images a class",
    "cross-dataset": "From one data set to others",
    "losses": "Loss of each epoch, mean and spread over seeds",
    "reliability": "Reliability: how often a confidence is right",
}
"""Headings of the figures by name."""

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def page_of(
    title: str, how: str, tables: Sequence[Table], plots: Mapping[str, str], environment: Mapping[str, str]
) -> str:
    """The page. ``plots`` are SVG by name; everything else is text, which is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    figures = [{"title": TITLES[name], "svg": Markup(inlined(svg, name))} for name, svg in plots.items()]
    return template.render(title=title, how=how, tables=tables, plots=figures, environment=environment)
