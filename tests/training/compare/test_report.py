"""The report of given results: tables to the letter, figures that are XML, a page that needs nothing else."""

import hashlib
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clipship.core.cli.multi_value_option import MultiValueCommand
from clipship.core.errors import CheckpointError
from clipship.core.tables import Table
from clipship.training.compare import published
from clipship.training.compare.cli import compare
from clipship.training.compare.page import page_of
from clipship.training.compare.plots import losses_over_seeds, mean_error, plots_of, pooled_bins, standalone
from clipship.training.compare.report import how_made, json_of, markdown_of, tables_of
from clipship.training.compare.results import RunResult, read_result
from clipship.training.compare.summary import Numbers, Summary, Variant, averaged, row_of
from clipship.training.datasets.records import PUBLISHED_DATASETS
from clipship.training.evaluation.evaluate import harmonic_mean
from clipship.training.recipes import RECIPES


def scores(base: float, new: float, **more: Any) -> dict[str, Any]:
    bins = [{"confidence": None, "accuracy": None, "count": 0}, {"confidence": 80.0, "accuracy": base, "count": 10}]
    common = {"all": (base + new) / 2, "ece_before": 12.0, "ece_after": None, "reliability": bins}
    return {"base": base, "new": new, "open_base": base - 10, "open_new": new - 20, **common, **more}


def result(recipe: str, dataset: str, seed: int, measured: Mapping[str, Any], shots: int = 16) -> RunResult:
    losses = [{"epoch": epoch, "total": 2.0 / epoch + seed / 10} for epoch in (1, 2, 3)]
    return RunResult(
        recipe=recipe,
        method=recipe,
        base_model="model",
        dataset=dataset,
        seed=seed,
        shots=shots,
        identity=f"{recipe} {dataset} {seed} {shots}",
        scores=measured,
        losses=losses if recipe != "zero-shot" else [],
        learned_parameters=2048,
        seconds=2.5,
        selection="last step",
    )


def base_to_new() -> Summary:
    results = [
        *(result("zero-shot", "EuroSAT", seed, {"EuroSAT": scores(56.0, 64.0)}) for seed in (1, 2)),
        *(result("coop", "EuroSAT", seed, {"EuroSAT": scores(90.0 + seed, 50.0 + seed)}) for seed in (1, 2)),
        *(result("zero-shot", "Mine<b>", seed, {"Mine<b>": scores(40.0, 60.0)}) for seed in (1, 2)),
        result("coop", "Mine<b>", 1, {"Mine<b>": scores(80.0, 40.0)}),
        replace(result("coop", "Mine<b>", 2, {}), error="the loss is nan | stop", losses=()),
    ]
    return Summary(
        protocol="base-to-new", recipes=("zero-shot", "coop"), datasets=("EuroSAT", "Mine<b>"), results=tuple(results)
    )


GOLDEN = """\
### Base to new

| data set | recipe | base | new | H | open base | open new | open H | published base / new / H |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| EuroSAT | zero-shot | 56.00 ± 0.00 | 64.00 ± 0.00 | 59.73 ± 0.00 | 46.00 ± 0.00 | 44.00 ± 0.00 | 44.98 ± 0.00 | 56.48 / 64.05 / 60.03 [1] |
| EuroSAT | coop | 91.50 ± 0.71 | 51.50 ± 0.71 | 65.91 ± 0.76 | 81.50 ± 0.71 | 31.50 ± 0.71 | 45.44 ± 0.85 | 92.19 / 54.74 / 68.69 [1] |
| Mine<b> | zero-shot | 40.00 ± 0.00 | 60.00 ± 0.00 | 48.00 ± 0.00 | 30.00 ± 0.00 | 40.00 ± 0.00 | 34.29 ± 0.00 | – |
| Mine<b> | coop | 80.00 | 40.00 | 53.33 | 70.00 | 20.00 | 31.11 | – |
| average | zero-shot | 48.00 ± 0.00 | 62.00 ± 0.00 | 54.11 ± 0.00 | 38.00 ± 0.00 | 42.00 ± 0.00 | 39.90 ± 0.00 | – |
| average | coop | 85.50 | 45.50 | 59.39 | 75.50 | 25.50 | 38.12 | – |

[1] PromptKD's repository (zhengli97/PromptKD, images/exp_results.png), which quotes each method's paper
"""  # noqa: E501


def test_the_table_of_base_to_new_to_the_letter() -> None:
    tables = tables_of(base_to_new())
    assert tables[0].to_markdown() == GOLDEN
    assert [table.title for table in tables] == ["Base to new", "What the runs took", "Runs that failed"]
    assert tables[2].rows == (("Mine<b>", "coop", "16", "2", "the loss is nan | stop"),)
    assert "the loss is nan \\| stop" in tables[2].to_markdown()


def test_h_is_the_harmonic_mean_of_the_averages_and_not_the_average_of_harmonic_means() -> None:
    row = row_of("x", Variant("y", 16), [{"base": 90.0, "new": 10.0}, {"base": 50.0, "new": 50.0}])
    found = row.stats["harmonic_mean"]
    assert found is not None
    assert found.mean == harmonic_mean(70, 30)
    assert found.spread == pytest.approx(statistics.stdev([18.0, 50.0]))
    assert str(row_of("x", Variant("y", 16), [{"base": 1.0}]).stats["base"]) == "1.00"
    assert row_of("x", Variant("y", 16), [{"base": 1.0}, {"base": None}]).stats["base"] is None


def test_averages_take_each_seed_first() -> None:
    first: dict[int, Numbers] = {1: {"base": 10.0, "new": 1.0}, 2: {"base": 20.0, "new": None}}
    second: dict[int, Numbers] = {2: {"base": 40.0, "new": 3.0}, 3: {"base": 99.0, "new": 9.0}}
    (only,) = averaged([first, second])
    assert (only["base"], only["new"]) == (30.0, None)
    assert averaged([]) == []


def test_generalised_zero_shot_has_a_table_of_its_own() -> None:
    measured = {"CUB": scores(60.0, 50.0, seen=63.0, unseen=49.0)}
    summary = Summary(
        protocol="base-to-new", recipes=("coop",), datasets=("CUB",), results=(result("coop", "CUB", 1, measured),)
    )
    table = tables_of(summary)[1]
    assert table.header == ("data set", "recipe", "U", "S", "H", "published U / S / H")
    assert table.rows == (("CUB", "coop", "49.00", "63.00", "55.12", "49.20 / 63.80 / 55.60 [1]"),)
    assert "ZeroDiff" in table.notes[0]


def test_transfer_stands_above_the_published_row() -> None:
    names = ("ImageNet", "Caltech101", "ImageNetV2")
    measured = {name: scores(70.0 + number, 70.0 + number) for number, name in enumerate(names)}
    ours = result("coop-cross", "ImageNet", 1, measured)
    summary = Summary(protocol="cross-dataset", recipes=("coop-cross",), datasets=names, results=(ours,))
    table = tables_of(summary)[0]
    assert table.header == ("recipe", "ImageNet (source)", "Caltech101", "ImageNetV2", "average")
    assert table.rows == (
        ("coop-cross", "70.00", "71.00", "72.00", "71.50"),
        ("coop-cross, published [1]", "71.51", "93.70", "64.20", "78.95"),
    )
    assert set(plots_of(summary)) == {"cross-dataset", "losses", "reliability"}
    elsewhere = replace(summary, datasets=names[1:], results=(replace(ours, dataset="Caltech101"),))
    assert len(tables_of(elsewhere)[0].rows) == 1, "the published runs learned from ImageNet"


def test_few_shot_counts_are_columns() -> None:
    results = tuple(result("coop", "EuroSAT", 1, {"EuroSAT": scores(50.0 + n, 50.0 + n)}, shots=n) for n in (1, 2, 16))
    summary = Summary(protocol="few-shot", recipes=("coop",), datasets=("EuroSAT",), results=results)
    table = tables_of(summary)[0]
    assert table.header == ("data set", "recipe", "1 shot", "2 shots", "16 shots")
    assert table.rows == (("EuroSAT", "coop", "51.00", "52.00", "66.00"),)
    assert set(plots_of(summary)) == {"accuracy-against-shots", "losses", "reliability"}


def over_synthetic(names: tuple[str, ...] = ("EuroSAT", "Mine")) -> Summary:
    """Accuracy rises with the images, more with the filter; CoOp learns from none."""
    results = [result("coop", name, 1, {name: scores(50.0, 40.0)}) for name in names]
    for name in names:
        for count, filtered in ((0, True), (1, True), (16, True), (1, False), (16, False)):
            measured = {name: scores(60.0, 40.0 + count + 2 * filtered)}
            one = result("sync-clip", name, 1, measured)
            results.append(replace(one, synthetic_shots=count, synthetic_filter=filtered))
    recipes = ("coop", "sync-clip")
    return Summary(protocol="base-to-new", recipes=recipes, datasets=names, results=tuple(results))


def test_numbers_of_synthetic_images_are_columns_and_the_filter_a_row() -> None:
    summary = over_synthetic()
    tables = tables_of(summary)
    titles = ("New classes", "Harmonic mean of base and new classes", "New classes among all names")
    assert [table.title.removesuffix(" against synthetic images a class") for table in tables[:3]] == [*titles]
    assert tables[0].header == ("data set", "recipe", "0", "1", "16")
    assert tables[0].rows[:3] == (
        ("EuroSAT", "coop", "40.00", "–", "–"),
        ("EuroSAT", "sync-clip", "42.00", "43.00", "58.00"),
        ("EuroSAT", "sync-clip, no filter", "42.00", "41.00", "56.00"),
    )
    assert tables[0].rows[-1] == ("average", "sync-clip, no filter", "42.00", "41.00", "56.00")
    whole = next(table for table in tables if table.title == "Base to new")
    assert [row[1] for row in whole.rows[:6]] == [
        "coop",
        "sync-clip, 0 synthetic",
        *("sync-clip, 1 synthetic", "sync-clip, 1 synthetic, no filter"),
        *("sync-clip, 16 synthetic", "sync-clip, 16 synthetic, no filter"),
    ]
    assert "16 real images a class, 0, 1, 16 synthetic ones: those with CLIP's best scores or the first" in how_made(
        summary
    )


def test_published_numbers_are_not_beside_other_numbers_of_synthetic_images() -> None:
    ours = over_synthetic(("EuroSAT",))
    renamed = tuple(replace(one, recipe="promptsrc") if one.recipe == "sync-clip" else one for one in ours.results)
    table = tables_of(replace(ours, recipes=("coop", "promptsrc"), results=renamed))[4]
    assert table.rows[0][-1].startswith("92.19"), "CoOp's"
    assert {row[-1] for row in table.rows[1:]} == {"–"}


def test_curves_of_synthetic_images_take_the_place_of_the_bars() -> None:
    summary = over_synthetic()
    plots = plots_of(summary)
    assert set(plots) == {"accuracy-against-synthetic", "losses", "reliability"}
    assert plots == plots_of(summary)
    ElementTree.fromstring(standalone(plots["accuracy-against-synthetic"]))
    level, filtered, unfiltered = summary.curves()
    assert (level.label, level.level, [*level.points]) == ("coop", True, [0])
    assert (filtered.label, filtered.filtered, [*filtered.points]) == ("sync-clip", True, [0, 1, 16])
    assert (unfiltered.label, unfiltered.filtered) == ("sync-clip, no filter", False)
    assert unfiltered.points[0] == filtered.points[0], "without images there is nothing to filter"
    rows = json_of(summary, {})["rows"]
    one = next(row for row in rows if (row["synthetic_shots"], row["synthetic_filter"]) == (16, False))
    assert one["stats"]["new"]["mean"] == 56.0


def test_the_curve_without_filter_alone_begins_at_no_images_too() -> None:
    summary = over_synthetic()
    left = tuple(one for one in summary.results if one.synthetic_shots == 0 or not one.synthetic_filter)
    (curve,) = replace(summary, recipes=("sync-clip",), results=left).curves()
    assert (curve.label, [*curve.points]) == ("sync-clip, no filter", [0, 1, 16])


def test_a_comparison_of_no_synthetic_images_alone_has_one_point() -> None:
    summary = over_synthetic()
    none = replace(summary, results=tuple(one for one in summary.results if not one.synthetic_shots))
    assert [(curve.label, [*curve.points]) for curve in none.curves()] == [("coop", [0]), ("sync-clip", [0])]
    assert "accuracy-against-synthetic" in plots_of(none)
    assert "16 real images a class, 0 synthetic ones. Learned" in how_made(none)


def test_published_numbers_stay_as_they_were_read() -> None:
    tables = (published.BASE_TO_NEW, published.TRANSFER, published.GENERALISED)
    lines = [
        f"{number} {method} {name} {' '.join(map(str, one.values))}"
        for number, methods in enumerate(tables)
        for method, rows in methods.items()
        for name, one in rows.items()
    ]
    assert len(lines) == 127
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16] == "bede129336cf39b9"
    assert {one.source for methods in tables for rows in methods.values() for one in rows.values()} == set(
        json.loads(Path(published.__file__).with_suffix(".json").read_text())["sources"].values()
    )


def test_published_averages_and_harmonic_means_follow_from_the_rows() -> None:
    for method, rows in published.BASE_TO_NEW.items():
        base, new, mean = rows["average"].values
        assert harmonic_mean(base, new) == pytest.approx(mean, abs=0.0101)
        if set(rows) == {"average"}:
            continue
        halves = [statistics.mean(rows[name].values[half] for name in published.ELEVEN) for half in (0, 1)]
        assert halves == pytest.approx([base, new], abs=0.0101), method
        assert harmonic_mean(*halves) == pytest.approx(mean, abs=0.0101), method
    for rows in published.TRANSFER.values():
        targets = [rows[name].values[0] for name in published.ELEVEN[1:]]
        assert statistics.mean(targets) == pytest.approx(rows["average"].values[0], abs=0.0101)
    for method, rows in published.GENERALISED.items():
        for one in rows.values():
            unseen, seen, mean = one.values
            assert harmonic_mean(unseen, seen) == pytest.approx(mean, abs=0.1), f"{method}: halves rounded to 0.1"


def test_published_names_are_those_of_the_data_sets_and_recipes() -> None:
    known = {record.name for record in PUBLISHED_DATASETS} | {"average"}
    for methods in (published.BASE_TO_NEW, published.TRANSFER, published.GENERALISED):
        assert {name for rows in methods.values() for name in rows} <= known
    assert len(published.ELEVEN) == 11
    recipes = {*published.METHOD_OF_RECIPE, *published.METHOD_OF_CROSS_RECIPE}
    assert recipes <= set(RECIPES)
    assert not any(name.endswith("-tiny") for name in recipes), "the papers' model is another one"
    assert published.base_and_new("coop-tiny", "EuroSAT") is None


def test_an_average_over_some_published_data_sets_is_their_average() -> None:
    found = published.average_base_and_new("coop", ["EuroSAT", "UCF101"])
    assert found is not None
    assert found.values[:2] == pytest.approx(((92.19 + 84.69) / 2, (54.74 + 56.05) / 2))
    assert published.average_base_and_new("coop", ["EuroSAT", "Mine"]) is None
    whole = published.average_base_and_new("kgcoop", published.ELEVEN)
    assert whole is not None
    assert whole.values == (80.73, 73.60, 77.00)
    assert published.average_base_and_new("kgcoop", ["EuroSAT"]) is None


def test_figures_are_xml_and_the_same_every_time() -> None:
    plots = plots_of(base_to_new())
    assert set(plots) == {"base-new", "losses", "reliability"}
    assert plots == plots_of(base_to_new())
    for svg in plots.values():
        root = ElementTree.fromstring(standalone(svg))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not list(root.iter("{http://www.w3.org/2000/svg}text")), "text is drawn as paths, so no font is needed"
        assert "currentColor" in svg
        assert "#010203" not in svg


def test_a_comparison_without_any_score_has_no_figures() -> None:
    failed = replace(result("coop", "EuroSAT", 1, {}), error="no")
    summary = Summary(protocol="base-to-new", recipes=("coop",), datasets=("EuroSAT",), results=(failed,))
    assert plots_of(summary) == {}
    assert tables_of(summary)[0].rows[0][2:] == ("–",) * 6 + ("92.19 / 54.74 / 68.69 [1]",)


def test_what_the_curves_and_diagrams_show() -> None:
    summary = base_to_new()
    runs = [one for one in summary.results if one.dataset == "EuroSAT" and one.losses]
    epochs, means, spreads = losses_over_seeds(runs)
    assert epochs == [1.0, 2.0, 3.0]
    assert means[1] == pytest.approx(1.15)
    assert spreads == pytest.approx([statistics.stdev([0.1, 0.2])] * 3)
    empty, full = pooled_bins(summary.results, "coop")
    assert empty == (None, None, 0)
    assert full[0] == 80.0
    assert full[1] == pytest.approx((91 + 92 + 80) / 3)
    assert full[2] == 30
    assert mean_error(summary.results, "coop") == 12.0


class Page(HTMLParser):
    """Cells of all tables, addresses, ids, and whether every tag that was opened was closed."""

    VOID = frozenset({"meta", "path", "use", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_holds_every_cell_and_asks_for_nothing() -> None:
    summary = base_to_new()
    tables, plots = tables_of(summary), plots_of(summary)
    text = page_of("Comparison <script>", how_made(summary), tables, plots, {"python": "3 & more"})
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.cells == [cell for table in tables for row in (table.header, *table.rows) for cell in row]
    assert all(address.startswith("#") for address in page.addresses), "figures point into themselves only"
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert page.tags.count("svg") == len(plots)
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "Nothing is selected on test images" in text


def test_the_json_has_every_run_and_the_unrounded_rows() -> None:
    summary = base_to_new()
    content = json_of(summary, {"python": "3"})
    assert content["failed"] == 1
    assert len(content["runs"]) == 8
    coop = next(row for row in content["rows"] if (row["dataset"], row["recipe"]) == ("EuroSAT", "coop"))
    assert coop["stats"]["base"] == {"mean": 91.5, "spread": pytest.approx(math.sqrt(0.5)), "seeds": 2}
    assert [one["recipe"] for one in content["published"]] == ["zero-shot", "coop"]
    assert "seeds 1, 2; 16 real images a class" in markdown_of(summary, tables_of(summary))


def test_published_numbers_are_for_sixteen_images() -> None:
    one = result("coop", "EuroSAT", 1, {"EuroSAT": scores(80.0, 50.0)}, shots=4)
    summary = Summary(protocol="base-to-new", recipes=("coop",), datasets=("EuroSAT",), results=(one,))
    assert tables_of(summary)[0].header[-1] == "open H"


def test_a_table_escapes_its_bars() -> None:
    table = Table(title="T", header=("a|b", "c", "d"), rows=(("1|2", "3", "4"),))
    assert table.to_markdown() == "### T\n\n| a\\|b | c | d |\n| --- | --- | ---: |\n| 1\\|2 | 3 | 4 |\n"


def test_the_command_line() -> None:
    assert isinstance(compare, MultiValueCommand)
    assert "Example: clipship compare " in str(compare.help)
    options = {name for parameter in compare.params for name in parameter.opts}
    assert {"--data", "--seeds", "--shots", "--protocol", "--out", "--jobs", "--device", "--json"} <= options


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "clipship-comparison-run", "format_version": 1}'])
def test_an_unreadable_result_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match="delete the file, and the run is done again"):
        read_result(tmp_path / "result.json")
