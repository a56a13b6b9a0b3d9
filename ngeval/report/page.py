"""The page itself: one HTML file that holds everything it shows, and fetches nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from itertools import count
from typing import NamedTuple

import jinja2
import pandas as pd

from ngeval.analysis.stages import evenly
from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES
from ngeval.errors import InputError
from ngeval.report.charts import Chart, gamma_charts, layer_charts, sample_charts
from ngeval.report.facts import facts, run_facts, troubles
from ngeval.report.findings import findings
from ngeval.report.sources import Source, Topic, topics
from ngeval.report.summaries import Grades
from ngeval.report.wording import damping_text, interval_text, value_text
from ngeval.utils.text import encodable

MAX_CELLS = 4_000_000
"""Values of a table that is put into the page; of a larger one only the means are."""

MAX_ROWS = 5_000
"""Rows of a table in the page; of a longer one not all dampings are shown."""

HEADS = ["method", "γ/γ_SGD", "interval", "γ/γ_min", "interval", "λ", "checkpoint", "batches"]


class Cell(NamedTuple):
    """A cell's text, and the number that it sorts by; without one it sorts by the text."""

    text: str
    key: str | None = None


class Row(NamedTuple):
    """A row, with the values that its table can be filtered by."""

    cells: list[Cell]
    filters: dict[str, str]
    hidden: bool


class Filter(NamedTuple):
    """A list to choose rows by: pairs of value and label; ``""`` is all of them."""

    name: str
    label: str
    options: list[tuple[str, str]]
    chosen: str


class Table(NamedTuple):
    """All rows, of which those are hidden that the filters exclude at first; a note below them."""

    rows: list[Row]
    filters: list[Filter]
    note: str


class Section(NamedTuple):
    """A task as the page shows it: a name and what follows in each part of the page."""

    name: str
    facts: list[tuple[str, str]]
    findings: list[str]
    charts: dict[str, Chart]
    table: Table | None


class Download(NamedTuple):
    """Rows to save from the page, packed: the file's name, the original's, what is in it."""

    name: str
    original: str
    content: str
    note: str


def make_page(sources: Sequence[Source], title: str | None = None) -> str:
    """The HTML of a report on some result files; the title None names the tasks."""
    if not sources:
        raise InputError("a report needs at least one result file")
    tasks = topics(sources)
    ids = count(1)
    sections = [_section(topic, ids) for topic in tasks]
    reasons = [trouble for topic in tasks for trouble in troubles(topic)]
    notes = [note for source in sources for note in source.notes]
    notes += [note for topic in tasks for note in topic.notes]
    script = _file("report.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["packed"] = lambda text: packed(encodable(text).encode())
    page = environment.from_string(_file("report.html")).render(
        title=title or "ngeval: " + ", ".join(topic.name for topic in tasks),
        sections=sections,
        heads=HEADS,
        several=len(sections) > 1,
        has_gammas=any(topic.short for topic in tasks),
        runs=[(source.shown, run_facts(source)) for source in sources],
        failures=[trouble for trouble in reasons if trouble.status != "ok"],
        notes=list(dict.fromkeys(notes)),
        remarks=[trouble for trouble in reasons if trouble.status == "ok"],
        downloads=[_download(source, tasks) for source in sources],
        css=_file("report.css"),
        script=script,
        policy=_policy(script),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("ngeval"),
    )
    return encodable(page)  # a name may hold bytes that no encoding has


def _section(topic: Topic, ids: count[int]) -> Section:
    charts: list[Chart] = []
    table = None
    labels = topic.labels
    if topic.short is not None:
        charts += gamma_charts(topic.short, labels)
        table = gamma_table(topic.short, labels)
    if SAMPLES in topic.tables:
        charts += sample_charts(topic.tables[SAMPLES], labels)
    if LAYERS in topic.tables:
        charts += layer_charts(topic.tables[LAYERS], labels)
    by_id = {f"chart-{next(ids)}": chart for chart in charts}
    return Section(topic.name, facts(topic), findings(topic), by_id, table)


def gamma_table(short: Grades, labels: dict[str, str]) -> Table:
    """γ ratios of every checkpoint, method and λ; at first the last checkpoint at the smallest λ.

    ``best`` among the λ is each method's best one at that checkpoint.
    """
    dampings = _shown_dampings(short)
    numbers = {value: str(place) for place, value in enumerate(short.dampings)}
    places = {name: str(place) for place, name in enumerate(short.checkpoints)}
    chosen = {"checkpoint": places[short.checkpoints[-1]], "damping": numbers[short.smallest]}
    summary = short.summary.assign(is_best=short.summary.index.isin(short.best.index))
    summary = summary[summary["damping"].isin(dampings) | summary["is_best"]]
    rows = []
    for row in summary.to_dict("records"):
        filters = {
            "checkpoint": places[row["checkpoint"]],
            "damping": numbers[row["damping"]] + (" best" if row["is_best"] else ""),
        }
        hidden = any(chosen[name] not in value.split() for name, value in filters.items())
        cells = [
            Cell(row["method"]),
            *_with_interval(row["ratio"], row["low"], row["high"]),
            *_with_interval(row["best"], row["best_low"], row["best_high"]),
            Cell(damping_text(row["damping"]), _key(row["damping"])),
            Cell(labels[row["checkpoint"]], filters["checkpoint"]),
            Cell(str(row["batches"]), _key(row["batches"])),
        ]
        rows.append(Row(cells, filters, hidden))
    by_damping = [(numbers[value], damping_text(value)) for value in dampings]
    by_checkpoint = [(place, labels[name]) for name, place in places.items()]
    best, all_rows = ("best", "the best of each method"), ("", "all")
    note = ""
    if len(dampings) < len(numbers):
        note = f"{len(dampings)} of {len(numbers)} λ, and each method's best."
    by = [
        Filter("checkpoint", "checkpoint", [all_rows, *by_checkpoint], chosen["checkpoint"]),
        Filter("damping", "damping λ", [all_rows, best, *by_damping], chosen["damping"]),
    ]
    return Table(rows, by, note)


def _shown_dampings(short: Grades) -> list[float]:
    """The λ in the table: all, or as many as fit, always with the smallest."""
    values = short.dampings
    count = max(2, int(MAX_ROWS * len(values) / len(short.summary)))
    return sorted({short.smallest, *(values[place] for place in evenly(len(values), count))})


def _with_interval(value: float, low: float, high: float) -> tuple[Cell, Cell]:
    """A value with as many digits as its interval has, and the interval."""
    interval = Cell(interval_text(low, high) or "–", _key(low))
    return Cell(value_text(value, low, high), _key(value)), interval


def _key(value: float) -> str:
    """What a number sorts by; "", which comes last, if there is none."""
    return "" if math.isnan(value) else f"{float(value):.6g}"


def _download(source: Source, tasks: Sequence[Topic]) -> Download:
    table, stem = source.table, source.shown.removesuffix(source.path.suffix).replace("/", "-")
    name = f"{stem}.csv"
    note = f"{len(table):,} rows, all columns"
    if table.size > MAX_CELLS:
        parts = [
            topic.short.summary.assign(task=topic.name)
            for topic in tasks
            if source.kind == GAMMAS and source in topic.sources and topic.short is not None
        ]
        too_many = f"the {len(table):,} rows themselves are too many for a page"
        if not parts:
            return Download(name, source.shown, "", too_many)
        name, note = f"{stem}-means.csv", f"means over batches; {too_many}"
        table = pd.concat(parts)
    text = io.BytesIO()
    table.to_csv(text, index=False, encoding="utf-8", errors="replace")
    return Download(name, source.shown, packed(text.getvalue()), note)


def packed(content: bytes) -> str:
    """Content that only the page's script reads: gzip, base64."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _policy(script: str) -> str:
    """A Content-Security-Policy: this script and no other, no network."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return (resources.files("ngeval.report") / name).read_text(encoding="utf-8")
