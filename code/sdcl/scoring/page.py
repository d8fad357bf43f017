"""The page of a test or of an experiment: one HTML file that needs no server, no network and no other file."""

import io
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.text import Text

from sdcl.runs.atomic import write_text
from sdcl.scoring.charts import (
    INK,
    Chart,
    Curves,
    bland_altman,
    by_case,
    case_points,
    forest,
    inked,
    structures_of,
    training,
)
from sdcl.scoring.comparison import Entry, Row, lines_of
from sdcl.scoring.figures import save_figure, without_glyph_warnings
from sdcl.scoring.tables import MEAN, METRICS, digits_of

PAGE, CURVES = "report.html", "training.png"
ASSETS = Path(__file__).with_name("assets")
SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
CURVE = re.compile(r"curve-(?P<row>\d+)-")
MOST_POINTS = 4_000  # limit for all charts of cases; beyond it they show the mean of the structures, then fewer cases
MOST_CELLS = 30_000  # limit for all tables of cases
MOST_BYTES = 5_000_000  # limit of the page
LEAST_CASES = 3  # in the viewer: worst, median, best


@dataclass(frozen=True)
class Table:
    """A table: its lines of cells, the header first; bold cells are marked with **."""

    title: str
    lines: Sequence[Sequence[str]]
    is_open: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: of its heading.
        title: of it.
        charts: by name; the first is shown, the others are chosen.
        switches: names of the rows whose curves can be switched off, in the charts' order.
        tables: below them.
        links: titles and addresses, relative to the page.
    """

    id: str
    title: str
    charts: Sequence[tuple[str, Chart]] = ()
    switches: Sequence[str] = ()
    tables: Sequence[Table] = ()
    links: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: of the page.
        head: sentences below it: what was scored, selected, compared; which commit.
        entries: the rows, with each case's scores.
        rows: the cells of the table; see make_rows().
        viewer: from viewer.viewer(); None: there are no pictures.
        curves: of the training.
        further: sections at the end, such as the settings.
        order: cases by name, those to be looked at first in front.
    """

    title: str
    head: Sequence[str]
    entries: Sequence[Entry]
    rows: Sequence[Row]
    viewer: dict[str, Any] | None = None
    curves: Sequence[Curves] = ()
    further: Sequence[Section] = ()
    order: Sequence[str] = ()


def write_page(folder: Path, page: Page) -> list[str]:
    """Write report.html, whole or not at all, and its training curves as training.png; return the files' names.

    Args:
        folder: where to.
        page: what it shows.
    """
    if page.viewer and not page.viewer["cases"]:  # not one was small enough
        page = replace(page, viewer=None, head=[*page.head, "No case's pictures fit into this page."])
    with inked():
        sections = [_shown(section) for section in sections_of(page)]
    titles = [("cases", "Cases")] * bool(page.viewer) + [(section.id, section.title) for section in sections]
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    content = {
        "page": page, "sections": sections, "titles": titles, "viewer": None,
        "css": Markup((ASSETS / "report.css").read_text("utf-8")),  # noqa: S704 - ours
        "js": Markup((ASSETS / "report.js").read_text("utf-8")),  # noqa: S704 - ours
    }  # fmt: skip
    template = environment.get_template("report.html")

    def render() -> str:
        if page.viewer:
            content["viewer"] = embedded(page.viewer)
        return template.render(content | {"page": page})

    if page.viewer:
        scores = _scores(page)
        cases = [one | {"scores": scores(one["name"])} for one in page.viewer["cases"]]
        page = replace(page, viewer={**page.viewer, "cases": cases})
    text = render()
    if page.viewer and len(text) > MOST_BYTES:  # nearly all ASCII, so characters approximate bytes
        page = replace(page, viewer=_smaller(page.viewer, len(text) - MOST_BYTES))
        text = render()
    if len(text.encode()) > MOST_BYTES:
        size = f"This page has {len(text.encode()) / 1e6:.1f} MB, above the limit of {MOST_BYTES / 1e6:g} MB."
        page = replace(page, head=[*page.head, size])
        text = render()
    write_text(folder / PAGE, text)
    chart = training(page.curves)
    if chart is None:
        return [PAGE]
    save_figure(chart.figure, folder / CURVES)
    return [PAGE, CURVES]


def _smaller(viewer: dict[str, Any], excess: int) -> dict[str, Any]:
    """Leave out the viewer's last cases until so many bytes are saved, but not the first three."""
    kept = list(viewer["cases"])
    while excess > -200 and len(kept) > LEAST_CASES:  # the sentence below takes some
        excess -= len(embedded(kept.pop()))
    left_out = len(viewer["cases"]) - len(kept)
    if not left_out:
        return viewer
    said = f"{viewer['said']} {left_out} more cases are left out, so that this page stays small."
    return {**viewer, "cases": kept, "said": said}


@dataclass(frozen=True)
class _Drawn:
    """A chart as SVG."""

    svg: Markup
    caption: str


def embedded(content: Any) -> Markup:
    """Return JSON that may stand in a page's script element, whatever its texts hold."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704 - nothing in it ends the element


def sections_of(page: Page) -> list[Section]:
    """Return a page's sections below the viewer, in the order that they are looked at."""
    there = {
        key[0]
        for entry in page.entries
        for scores in entry.scores.values()
        for key in scores
        if _has_number(scores[key])
    }
    metrics = [m for m in METRICS if m in there] or ["dice"]
    counts = list(dict.fromkeys(entry.labelnum for entry in page.entries))

    def named(entry: Entry, name: str = "") -> str:
        parts = [name] * bool(name) + [f"{entry.labelnum} labelled"] * (len(counts) > 1)
        return ", ".join(parts) or "all"

    whole = [entry for entry in page.entries if entry.scores]
    reference = next((row.reference for row in page.rows if row.reference), "")
    per_case = sum(len(structures_of([e])) * len(e.scores) for e in whole)
    some, few = _cases_to_draw(page, whole, per_case)
    charts = [(named(e, f"{e.method}/{e.predictor}"), bland_altman(e, some)) for e in whole]
    volumes = [(name, chart) for name, chart in charts if chart is not None]
    groups = [[entry for entry in whole if entry.labelnum == count] for count in counts]
    groups = [group for group in groups if group]
    drawn, of_cases = _bounded(groups, len(metrics))
    if drawn is not groups:  # the means alone
        some, fewer = _cases_to_draw(page, whole, len(whole) * len(metrics))
        of_cases = of_cases.replace(")", f"{fewer})")
        points = [(named(group[0], METRICS[m]), case_points(group, m, some)) for m in metrics for group in drawn]
    else:
        points = [(named(group[0], METRICS[m]), case_points(group, m)) for m in metrics for group in drawn]
    shown = MEAN if any(row.structure == MEAN for row in page.rows) else next((r.structure for r in page.rows), MEAN)
    intervals, tables = [], []
    for metric in metrics:
        for group in groups:
            mine = [row for row in page.rows if row.labelnum == group[0].labelnum]
            title = named(group[0], METRICS[metric])
            intervals.append((title, forest(mine, metric, shown)))
            tables.append(Table(title, lines_of(mine, metric, group[0].labelnum), metric == "dice"))
    sections = [
        *[Section("volumes", f"Volume, predicted against reference{few}", _first(volumes, reference))] * bool(volumes),
        Section("points", of_cases, points, tables=[_case_table(page, metric, len(metrics)) for metric in metrics]),
        Section("table", "The table", intervals, tables=tables),
    ]
    chart = training(page.curves)
    if chart is not None:
        names = list(dict.fromkeys(one.name for one in page.curves))
        sections.append(Section("training", "Training", [("all", chart)], names if len(names) > 1 else ()))
    return [*sections, *page.further]


def facts_table(title: str, facts: Mapping[str, Any], is_open: bool = False) -> Table:
    """Return names and values as a table."""
    lines = [
        [name, value if isinstance(value, str) else json.dumps(value, default=str)] for name, value in facts.items()
    ]
    return Table(title, [["", ""], *lines], is_open)


def _has_number(values: Mapping[str, float]) -> bool:
    return any(not math.isnan(value) for value in values.values())


def _first(charts: Sequence[tuple[str, Chart]], reference: str) -> Sequence[tuple[str, Chart]]:
    """Put the chart of the row that the others are compared with first: it is what is shown unasked."""
    return sorted(charts, key=lambda one: not one[0].startswith(reference))


def _bounded(groups: Sequence[Sequence[Entry]], metrics: int) -> tuple[Sequence[Sequence[Entry]], str]:
    """Keep the structures' mean alone where all would be too many points; return what is drawn and its title."""
    number = sum(
        len(by_case(entry, "dice", s)) for group in groups for entry in group for s in [MEAN, *structures_of([entry])]
    )
    if number * metrics <= MOST_POINTS:
        return groups, "Each case"

    def of_mean(entry: Entry) -> Entry:
        kept = {seed: {k: v for k, v in scores.items() if k[1] == MEAN} for seed, scores in entry.scores.items()}
        return replace(entry, scores=kept) if all(kept.values()) else entry

    return [[of_mean(entry) for entry in group] for group in groups], "Each case (the mean of its structures)"


def _cases_to_draw(page: Page, entries: Sequence[Entry], per_case: int) -> tuple[Collection[str] | None, str]:
    """Choose the cases whose points are drawn where all would be too many: the first three, and of the rest every k-th.

    Args:
        page: its order of the cases is from the worst to the best, but for the first three.
        entries: the rows of the table.
        per_case: number of points of a case.

    Returns:
        The cases, None for all, and what is to be said of it.
    """
    known = dict.fromkeys(
        case for e in entries for by in e.scores.values() for values in by.values() for case in values
    )
    ordered = set(page.order)
    names = [*(name for name in page.order if name in known), *(name for name in known if name not in ordered)]
    most = max(MOST_POINTS // max(per_case, 1), LEAST_CASES)
    if len(names) <= most:
        return None, ""
    rest = names[LEAST_CASES:]
    step = len(rest) / max(most - LEAST_CASES, 1)
    chosen = {*names[:LEAST_CASES], *(rest[int(k * step)] for k in range(most - LEAST_CASES))}
    return chosen, f"; {len(chosen)} of {len(names)} cases are drawn"


def _case_table(page: Page, metric: str, metrics: int) -> Table:
    """Return each case's score under each row, of so many metrics' tables."""
    whole = [entry for entry in page.entries if entry.scores]
    structures = {structure for e in whole for scores in e.scores.values() for _, structure in scores}
    shown = MEAN if MEAN in structures else next(iter(structures), MEAN)
    values = [by_case(entry, metric, shown) for entry in whole]
    several = len({entry.labelnum for entry in whole}) > 1
    head = [f"{e.method}/{e.predictor}" + (f", {e.labelnum} labelled" if several else "") for e in whole]
    cases = [*page.order, *sorted({case for each in values for case in each} - set(page.order))]
    most = max(MOST_CELLS // (max(len(whole), 1) * metrics), LEAST_CASES)
    lines = [[case, *(_number(each.get(case), metric) for each in values)] for case in cases[:most]]
    less = f"; the first {most} of {len(cases)}, cases.csv has all" if most < len(cases) else ""
    return Table(f"{METRICS[metric]} of each case, {shown}{less}", [["case", *head], *lines])


def _scores(page: Page) -> Callable[[str], list[list[str]]]:
    """Return what makes the table beside a case's pictures: each row's Dice by structure."""
    structures = list(dict.fromkeys(row.structure for row in page.rows))
    found = [(e, [by_case(e, "dice", structure) for structure in structures]) for e in page.entries]

    def scores(case: str) -> list[list[str]]:
        lines = [[f"{e.method}/{e.predictor}", *(_number(by.get(case), "dice") for by in each)] for e, each in found]
        return [["Dice", *structures], *lines]

    return scores


def _number(value: float | None, metric: str) -> str:
    return "–" if value is None else f"{value:.{digits_of(metric)}f}"


# --- SVG ---


def _shown(section: Section) -> Section:
    charts = [
        (name, _Drawn(svg_of(chart, f"{section.id}{k}"), chart.caption))
        for k, (name, chart) in enumerate(section.charts)
    ]
    return replace(section, charts=charts)


def svg_of(chart: Chart, key: str) -> Markup:
    """Return a chart as SVG for a page: in the page's colours, its points with their names.

    Args:
        chart: drawn within inked().
        key: begins all of its identifiers, so that a page may hold several.
    """
    for text in chart.figure.findobj(Text):
        text.set_parse_math(False)  # two $ in a case's name are no formula
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}), without_glyph_warnings():
        chart.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(file.getvalue())
    for element in list(root):
        if element.tag == f"{{{SVG}}}metadata" or element.find(f"{{{SVG}}}style") is not None:
            root.remove(element)  # who made it; a style that would be the whole page's
    for element in root.iter():
        _name_points(element, chart.points)
        if match := CURVE.match(element.get("id", "")):
            element.set("data-row", match["row"])
        for name, value in list(element.attrib.items()):
            value = value.replace(INK, "currentColor").replace("url(#", f"url(#{key}-")
            value = f"{key}-{value}" if name == "id" else f"#{key}-{value[1:]}" if name == LINK else value
            element.set(name, value)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - made of elements


def _name_points(group: ElementTree.Element, points: Mapping[str, Sequence[str]]) -> None:
    """Give the points of a group their names: for the script, and as what readers of a screen and pointers find."""
    names = points.get(group.get("id", ""))
    if names is None:
        return
    uses = [element for element in group.iter(f"{{{SVG}}}use") if element.get("class") is None]
    for element, name in zip(uses, names, strict=True):
        element.set("class", "point")
        element.set("data-name", name)
