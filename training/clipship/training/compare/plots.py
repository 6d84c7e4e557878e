"""The figures as SVG: text as paths, no date, equal bytes for equal numbers, ink in the colour of the page's text.

Shapes: E epochs, S seeds.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipship.training.compare.results import RunResult
from clipship.training.compare.summary import Curve, Stat, Summary, Variant, variant_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b7dd8", "#e07b39", "#2e9e6b", "#c0504d", "#8d6cc7", "#a08a2c", "#d16ba5", "#3fa7b5", "#7f7f7f", "#6b8e23")
"""One a recipe, distinct on white and on black."""
MARKERS = "osD^vPX*<>"

_INK = "#010203"
"""Placeholder of the page's text colour until the figure is finished."""
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "clipship",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    **{
        name: _INK
        for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    },
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_COLUMNS = 2
"""Panels side by side."""

Draw = Callable[["Figure"], None]


def plots_of(summary: Summary) -> dict[str, str]:
    """The figures that the comparison has numbers for: SVG by name."""
    if not any(one.scores for one in summary.results):
        return {}
    name, svg = _accuracy_plot(summary)
    drawn = {name: svg, "losses": loss_curves(summary), "reliability": reliability_diagrams(summary)}
    return {name: svg for name, svg in drawn.items() if svg}


def _accuracy_plot(summary: Summary) -> tuple[str, str]:
    """The figure of the protocol, with a group of bars or a panel for each data set and for their average."""
    names = summary.datasets_and_average
    if summary.protocol == "cross-dataset":
        return "cross-dataset", _bars(summary, names, ("all",), "accuracy %")
    if summary.protocol == "few-shot":
        panels = {name: (name, "all") for name in names}
        return "accuracy-against-shots", _curves(summary, panels, "real images a class")
    if summary.is_over_synthetic:
        titles = {"harmonic_mean": "H", "open_harmonic_mean": "H among all names"}
        panels = {f"{name}: {title}": (name, key) for name in names for key, title in titles.items()}
        return "accuracy-against-synthetic", _curves(summary, panels, "synthetic images a class")
    return "base-new", _bars(summary, names, ("base", "new"), "accuracy % (full: base, pale: new)")


def _bars(summary: Summary, names: Sequence[str], keys: Sequence[str], label: str) -> str:
    from matplotlib.figure import Figure

    runs = [(recipe, shots) for recipe, shots, _ in summary.variants()]
    width = 0.8 / (len(runs) * len(keys))
    with _styled():
        figure = Figure(figsize=(max(6.0, 1.2 + 0.32 * len(names) * len(runs) * len(keys)), 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (recipe, shots) in enumerate(runs):
            rows = [summary.row(name, Variant(recipe, shots)).stats for name in names]
            for part, key in enumerate(keys):
                places = [place + width * (number * len(keys) + part) for place in range(len(names))]
                _bar(axes, places, [row[key] for row in rows], width, number, recipe if part == 0 else "", part > 0)
        centre = width * (len(runs) * len(keys) - 1) / 2
        axes.set_xticks([place + centre for place in range(len(names))], list(names), rotation=20, ha="right")
        axes.set_ylabel(label)
        axes.set_ylim(0, 100)
        _legend(figure)
        return _svg(figure)


def _bar(
    axes: Axes, places: Sequence[float], stats: Sequence[Stat | None], width: float, number: int, label: str, pale: bool
) -> None:
    heights = [stat.mean if stat else 0.0 for stat in stats]
    spreads = [(stat.spread or 0.0) if stat else 0.0 for stat in stats]
    axes.bar(
        places,
        heights,
        width * 0.92,
        yerr=spreads if any(spreads) else None,
        color=_colour(number),
        alpha=0.45 if pale else 1.0,
        label=label or None,
        error_kw={"ecolor": _INK, "elinewidth": 0.8, "capsize": 1.5},
    )


def _curves(summary: Summary, panels: Mapping[str, tuple[str, str]], label: str) -> str:
    """The comparison's curves; ``panels`` are a data set and the name of an accuracy by title."""
    curves = summary.curves()
    ticks = sorted({number for curve in curves for number in curve.points})

    def draw(axes: Axes, title: str) -> None:
        for curve in curves:
            _curve(axes, summary, curve, *panels[title])
        if ticks[0]:
            axes.set_xscale("log", base=2)
        else:
            axes.set_xscale(
                "symlog", base=2, linthresh=1, linscale=0.5
            )  # linear up to 1: a logarithm has no place for 0
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy %")

    return _panels(list(panels), draw)


def _curve(axes: Axes, summary: Summary, curve: Curve, dataset: str, key: str) -> None:
    """One line; a recipe that learns from none of the images is a dotted one at its accuracy."""
    found = [(count, summary.row(dataset, variant).stats[key]) for count, variant in curve.points.items()]
    known = [(count, stat) for count, stat in found if stat is not None]
    number, means = summary.recipes.index(curve.recipe), [stat.mean for _, stat in known]
    if curve.level:
        for mean in means:
            axes.axhline(mean, color=_colour(number), linewidth=1.2, linestyle=":", label=curve.label)
        return
    spreads = [stat.spread or 0.0 for _, stat in known]
    _line(axes, [count for count, _ in known], means, spreads, number, curve.label, dashed=not curve.filtered)


def loss_curves(summary: Summary) -> str:
    """The loss of every epoch, mean and spread over seeds, a panel for each data set; empty if nothing is learned."""
    from matplotlib.ticker import MaxNLocator

    names = [name for name in summary.datasets if any(one.losses and one.dataset == name for one in summary.results)]

    def draw(axes: Axes, name: str) -> None:
        for number, recipe in enumerate(summary.recipes):
            runs = _with_most_images(summary, name, recipe)
            if runs:
                epochs, means, spreads = losses_over_seeds(runs)
                _line(axes, epochs, means, spreads, number, recipe, marker="" if len(epochs) > 1 else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")

    return _panels(names, draw)


def _with_most_images(summary: Summary, dataset: str, recipe: str) -> list[RunResult]:
    """The runs of ``recipe`` whose losses are shown: those with most real and then most synthetic images."""
    runs = [one for one in summary.results if (one.dataset, one.recipe) == (dataset, recipe) and one.losses]
    known = {variant_of(one) for one in runs}
    most = [variant for variant in summary.variants() if variant in known and variant.synthetic.filtered][-1:]
    return [one for one in runs if variant_of(one) in most]


def losses_over_seeds(runs: Sequence[RunResult]) -> tuple[list[float], list[float], list[float]]:
    """Epochs [E], mean losses [E] and their spreads [E] over the S runs of one recipe."""
    columns = list(zip(*(one.losses for one in runs), strict=False))
    epochs = [float(column[0].get("epoch", number)) for number, column in enumerate(columns, start=1)]
    totals = [[one["total"] for one in column] for column in columns]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in totals]
    return epochs, [statistics.mean(column) for column in totals], spreads


def reliability_diagrams(summary: Summary) -> str:
    """Accuracy against confidence over all runs of a recipe, with the expected calibration error; a panel a recipe."""
    pooled = {recipe: pooled_bins(summary.results, recipe) for recipe in summary.recipes}
    known = [recipe for recipe, bins in pooled.items() if bins]

    def draw(axes: Axes, recipe: str) -> None:
        bins = pooled[recipe]
        axes.plot([0, 100], [0, 100], color=_INK, linewidth=0.8, linestyle=":")
        places = [100 * (number + 0.5) / len(bins) for number in range(len(bins))]
        heights = [accuracy or 0.0 for _, accuracy, _ in bins]
        axes.bar(places, heights, 92 / len(bins), color=_colour(summary.recipes.index(recipe)))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("confidence %")
        axes.set_ylabel("accuracy %")
        axes.set_title(f"{recipe}: ECE {mean_error(summary.results, recipe):.2f} %", fontsize=9)

    return _panels(known, draw, titled=False, legend=False)


Bin = tuple[float | None, float | None, int]
"""Mean confidence, accuracy, images."""


def pooled_bins(results: Sequence[RunResult], recipe: str) -> list[Bin]:
    """The reliability bins of all runs of ``recipe``, weighted by their images; empty where none were measured."""
    diagrams = [scores.get("reliability") for one in results if one.recipe == recipe for scores in one.scores.values()]
    return [_pooled(column) for column in zip(*filter(None, diagrams), strict=False)]


def _pooled(bins: Sequence[Mapping[str, Any]]) -> Bin:
    count = sum(one["count"] for one in bins)
    filled = [one for one in bins if one["count"]]
    if not count:
        return None, None, 0
    confidence, accuracy = (
        sum(one[key] * one["count"] for one in filled) / count for key in ("confidence", "accuracy")
    )
    return confidence, accuracy, count


def mean_error(results: Sequence[RunResult], recipe: str) -> float:
    """The mean over runs and data sets of the expected calibration error of the diagrams, in percent."""
    scores = [one for result in results if result.recipe == recipe for one in result.scores.values()]
    errors = [one["ece_before"] if one.get("ece_after") is None else one["ece_after"] for one in scores]
    return float(statistics.mean(error for error in errors if error is not None))


def _line(
    axes: Axes,
    places: Sequence[float],
    means: Sequence[float],
    spreads: Sequence[float],
    number: int,
    label: str,
    marker: str | None = None,
    dashed: bool = False,
) -> None:
    """A line through the means, and a band as wide as the spread on both sides."""
    mark = MARKERS[number % len(MARKERS)] if marker is None else marker
    style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "none"} if dashed else {}
    axes.plot(places, means, color=_colour(number), marker=mark, markersize=4, linewidth=1.4, label=label, **style)
    if any(spreads):
        low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=_colour(number), alpha=0.18, linewidth=0)


def _panels(
    names: Sequence[str], draw: Callable[[Axes, str], None], *, titled: bool = True, legend: bool = True
) -> str:
    """A panel for each of ``names``; empty without any."""
    from matplotlib.figure import Figure

    if not names:
        return ""
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with _styled():
        figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.3), layout="constrained")
        for number, name in enumerate(names, start=1):
            axes = figure.add_subplot(rows, columns, number)
            draw(axes, name)
            if titled:
                axes.set_title(name, fontsize=9)
        if legend:
            _legend(figure)
        return _svg(figure)


def _legend(figure: Figure) -> None:
    """One legend for all panels: a recipe may be in some of them only."""
    known = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels, handles = list(known), list(known.values())
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, max(1, len(labels))), frameon=False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _styled() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _svg(figure: Figure) -> str:
    """The SVG element without the prolog, its ink in ``currentColor``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def standalone(svg: str) -> str:
    """``svg`` as a stand-alone file: black on white in every viewer."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("<svg ", '<svg style="background:#fff" ', 1)


def inlined(svg: str, name: str) -> str:
    """``svg`` with unique ids, to share a page with others."""
    return re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found[1]}{name}-", svg)
