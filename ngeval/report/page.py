"""The page itself: one HTML file that holds everything it shows, and fetches nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from itertools import count
from typing import NamedTuple

import jinja2
import pandas as pd

from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES
from ngeval.errors import InputError
from ngeval.report.charts import Chart, gamma_charts, layer_charts, sample_charts
from ngeval.report.facts import facts, run_facts, troubles
from ngeval.report.findings import findings
from ngeval.report.sources import Source, Topic, topics
from ngeval.report.tables import HEADS, Table, gamma_table
from ngeval.utils.text import encodable

MAX_CELLS = 4_000_000
"""Values of a table that is put into the page; of a larger one only the means are."""


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
    page = _template().render(
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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["packed"] = lambda text: packed(encodable(text).encode())
    return environment.from_string(_file("report.html"))
