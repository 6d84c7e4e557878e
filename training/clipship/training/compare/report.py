"""The report as tables in the form of the papers: Markdown, HTML and the terminal show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clipship.core.tables import Table
from clipship.training.compare import published
from clipship.training.compare.published import Published
from clipship.training.compare.summary import AVERAGE, Curve, Stat, Summary, SummaryRow, Variant, variant_of

FORMAT = "clipship-comparison"
FORMAT_VERSION = 1
NOTHING = "–"
"""The cell of a number that is missing."""


@dataclass
class _Notes:
    """Footnotes: the sources, numbered in the order they are cited."""

    sources: list[str] = field(default_factory=list)

    def cell(self, found: Published | None) -> str:
        if found is None:
            return NOTHING
        return f"{' / '.join(f'{value:.2f}' for value in found.values)} {self.mark(found.source)}"

    def mark(self, source: str) -> str:
        if source not in self.sources:
            self.sources.append(source)
        return f"[{self.sources.index(source) + 1}]"


def tables_of(summary: Summary) -> list[Table]:
    """The tables of the comparison's protocol, and a table of the runs that failed."""
    if summary.protocol == "few-shot":
        tables = [_few_shot_table(summary)]
    elif summary.protocol == "cross-dataset":
        tables = [_cross_table(summary)]
    else:
        curves = _synthetic_tables(summary) if summary.is_over_synthetic else []
        tables = [*curves, _base_to_new_table(summary), *_generalised_tables(summary)]
    return [*tables, _effort_table(summary), *_failures(summary)]


def _cell(stat: Stat | None) -> str:
    return NOTHING if stat is None else str(stat)


def _cells(row: SummaryRow, *names: str) -> tuple[str, ...]:
    return tuple(_cell(row.stats[name]) for name in names)


def _name_of(summary: Summary, row: SummaryRow) -> str:
    """The data set, with the shots if recipes differ in them."""
    is_mixed = len({one.shots for one in summary.results}) > 1
    return f"{row.dataset}, {row.variant.shots} shots" if is_mixed else row.dataset


def _base_to_new_table(summary: Summary) -> Table:
    keys = ("base", "new", "harmonic_mean", "open_base", "open_new", "open_harmonic_mean")
    notes, rows, known = _Notes(), [], False
    for row in summary.rows_of(summary.datasets, summary.datasets):
        found = _published_base_to_new(row, summary.datasets)
        known |= found is not None
        rows.append((_name_of(summary, row), row.variant.label, *_cells(row, *keys), notes.cell(found)))
    header = ("data set", "recipe", "base", "new", "H", "open base", "open new", "open H", "published base / new / H")
    width = len(header) if known else len(header) - 1
    return Table(
        title="Base to new",
        header=header[:width],
        rows=tuple(row[:width] for row in rows),
        notes=tuple(notes.sources),
    )


def _published_base_to_new(row: SummaryRow, datasets: Sequence[str]) -> Published | None:
    recipe, shots, synthetic = row.variant
    if shots != published.SHOTS or synthetic.shots is not None:
        return None
    if row.dataset == AVERAGE:
        return published.average_base_and_new(recipe, datasets)
    return published.base_and_new(recipe, row.dataset)


def _generalised_tables(summary: Summary) -> list[Table]:
    """U, S and H of the data sets with splits for generalised zero-shot learning."""
    datasets = [name for name in summary.datasets if summary.has("unseen", name)]
    if not datasets:
        return []
    notes, rows = _Notes(), []
    for row in summary.rows_of(datasets, datasets):
        cells = _cells(row, "unseen", "seen", "generalised_harmonic_mean")
        recipe, _, synthetic = row.variant
        found = None if synthetic.shots is not None else published.generalised(recipe, row.dataset)
        rows.append((_name_of(summary, row), row.variant.label, *cells, notes.cell(found)))
    header = ("data set", "recipe", "U", "S", "H", "published U / S / H")
    title = "Generalised zero-shot (mean over classes)"
    return [Table(title=title, header=header, rows=tuple(rows), notes=tuple(notes.sources))]


def _few_shot_table(summary: Summary) -> Table:
    return _curve_table(
        summary, "all", "Accuracy over all classes against shots", lambda count: f"{count} shot{'s' * (count > 1)}"
    )


def _synthetic_tables(summary: Summary) -> list[Table]:
    """Accuracy of the new classes and of both halves against synthetic images a class."""
    titles = {
        "new": "New classes",
        "harmonic_mean": "Harmonic mean of base and new classes",
        "open_new": "New classes among all names",
        "open_harmonic_mean": "Harmonic mean among all names",
    }
    return [
        _curve_table(summary, key, f"{title} against synthetic images a class", str) for key, title in titles.items()
    ]


def _curve_table(summary: Summary, key: str, title: str, column: Callable[[int], str]) -> Table:
    """The curves of the comparison, a column for each number of images."""
    curves = summary.curves()
    counts = sorted({count for curve in curves for count in curve.points})
    rows = [
        (name, curve.label, *(_curve_cell(summary, name, curve, key, count) for count in counts))
        for name in summary.datasets_and_average
        for curve in curves
    ]
    return Table(title=title, header=("data set", "recipe", *map(column, counts)), rows=tuple(rows))


def _curve_cell(summary: Summary, dataset: str, curve: Curve, key: str, count: int) -> str:
    return _cell(summary.row(dataset, curve.points[count]).stats[key]) if count in curve.points else NOTHING


def _cross_table(summary: Summary) -> Table:
    source = summary.datasets[0]
    notes, rows = _Notes(), []
    for recipe in summary.recipes:
        for shots in summary.shots(recipe):
            ours = (summary.row(name, Variant(recipe, shots)) for name in (*summary.datasets, AVERAGE))
            rows.append((recipe, *(_cell(row.stats["all"]) for row in ours)))
        theirs = published.transfer(recipe, source)
        if published.SHOTS in summary.shots(recipe) and set(theirs) & set(summary.targets):
            rows.append(_published_transfer(recipe, summary, notes))
    return Table(
        title=f"Learned on {source}, every class among all names",
        header=("recipe", f"{source} (source)", *summary.targets, AVERAGE),
        rows=tuple(rows),
        notes=tuple(notes.sources),
        text_columns=1,
    )


def _published_transfer(recipe: str, summary: Summary, notes: _Notes) -> tuple[str, ...]:
    theirs = published.transfer(recipe, summary.datasets[0])
    values = [theirs[name].values[0] if name in theirs else None for name in summary.datasets]
    known = [value for value in values[1:] if value is not None]
    average = sum(known) / len(known) if len(known) == len(summary.targets) else None
    cells = (NOTHING if value is None else f"{value:.2f}" for value in (*values, average))
    sources = dict.fromkeys(theirs[name].source for name in summary.targets if name in theirs)
    return (f"{recipe}, published {notes.mark('; '.join(sources))}", *cells)


def _effort_table(summary: Summary) -> Table:
    """Learned parameters, time and calibration error of every recipe."""
    rows = []
    for recipe in summary.recipes:
        done = [one for one in summary.results if one.recipe == recipe and not one.error]
        whole = [one.seconds for one in done if not one.resumed]
        sizes = sorted({one.learned_parameters for one in done})
        rows.append(
            (
                recipe,
                done[0].method if done else NOTHING,
                f"{len(done)}",
                NOTHING if not sizes else " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1]))),
                f"{sum(whole) / len(whole):.1f}" if whole else NOTHING,
                *(_mean_ece(done, name) for name in ("ece_before", "ece_after")),
                "; ".join(sorted({one.selection for one in done})) or NOTHING,
            )
        )
    header = ("recipe", "method", "runs", "learned parameters", "seconds a run", "ECE %", "ECE % with temperature")
    return Table(title="What the runs took", header=(*header, "weights kept"), rows=tuple(rows))


def _mean_ece(results: Sequence[Any], name: str) -> str:
    known = [scores[name] for one in results for scores in one.scores.values() if scores.get(name) is not None]
    return f"{sum(known) / len(known):.2f}" if known else NOTHING


def _failures(summary: Summary) -> list[Table]:
    rows = tuple(
        (one.dataset, variant_of(one).label, f"{one.shots}", f"{one.seed}", one.error)
        for one in summary.results
        if one.error
    )
    header = ("data set", "recipe", "shots", "seed", "why")
    return [Table(title="Runs that failed", header=header, rows=rows)] if rows else []


HOW = {
    "base-to-new": "Learned from the base classes only. Base and new: each half of the test images among its own class "
    "names; open: the same images among all class names. H is the harmonic mean of the averages.",
    "few-shot": "Learned from all classes; all test images among all class names.",
    "cross-dataset": "Learned from all classes of the source and from no other data set; the test images of each are "
    "classified among all of its class names.",
}


def how_made(summary: Summary) -> str:
    """How the numbers were made, in a few sentences."""
    seeds = sorted({one.seed for one in summary.results})
    shots = sorted({one.shots for one in summary.results})
    spread = "the mean ± the sample standard deviation over" if len(seeds) > 1 else "of"
    return (
        f"Top-1 accuracy in percent, {spread} {'seeds' if len(seeds) > 1 else 'seed'} {_listed(seeds)}; "
        f"{_listed(shots)} real images a class{_synthetic_images(summary)}. {HOW[summary.protocol]} "
        "Averages over data sets are taken for each seed first. "
        "Nothing is selected on test images."
    )


def _synthetic_images(summary: Summary) -> str:
    if not summary.is_over_synthetic:
        return ""
    chosen = {one.synthetic for one in summary.results if one.synthetic.shots is not None}
    filters = {one.filtered for one in chosen if one.shots}
    how = {True: "those with CLIP's best scores", False: "the first by seed (no filter)"}
    chosen_by = " or ".join(text for filtered, text in how.items() if filtered in filters)
    counts = _listed(sorted({one.shots for one in chosen if one.shots is not None}))
    return f", {counts} synthetic ones" + (f": {chosen_by}" if chosen_by else "")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def markdown_of(summary: Summary, tables: Sequence[Table]) -> str:
    """``table.md``."""
    return "\n".join([f"{how_made(summary)}\n", *(table.to_markdown() for table in tables)])


def json_of(summary: Summary, environment: dict[str, str]) -> dict[str, Any]:
    """``results.json``: every run with everything measured, and the rows unrounded."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "protocol": summary.protocol,
        "how": how_made(summary),
        "environment": environment,
        "recipes": list(summary.recipes),
        "datasets": list(summary.datasets),
        "failed": sum(bool(one.error) for one in summary.results),
        "rows": [row.to_json() for row in summary.rows()],
        "published": _published_json(summary),
        "runs": [asdict(one) for one in summary.results],
    }


def _published_json(summary: Summary) -> list[dict[str, Any]]:
    """The published numbers of the same methods on the same data sets, with their sources."""
    found = []
    for recipe in summary.recipes:
        for name in summary.datasets:
            for protocol, one in _published_on(summary, recipe, name):
                place = {"recipe": recipe, "dataset": name, "protocol": protocol}
                found.append({**place, "values": list(one.values), "source": one.source})
    return found


def _published_on(summary: Summary, recipe: str, dataset: str) -> list[tuple[str, Published]]:
    if summary.protocol == "base-to-new":
        pairs = published.base_and_new(recipe, dataset), published.generalised(recipe, dataset)
        names = ("base-to-new", "generalised zero-shot")
        return [(name, one) for name, one in zip(names, pairs, strict=True) if one is not None]
    found = published.transfer(recipe, summary.datasets[0]).get(dataset) if summary.source else None
    return [] if found is None else [("cross-dataset", found)]
