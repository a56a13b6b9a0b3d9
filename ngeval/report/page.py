"""The page itself: one HTML file that holds everything it shows, and fetches nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from itertools import count
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from ngeval.errors import InputError
from ngeval.report.charts import (
    gamma_charts,
    layer_charts,
    sample_charts,
    training_charts,
)
from ngeval.report.checked_rows import GAMMAS, LAYERS, SAMPLES, TRAINING
from ngeval.report.colours import DARK
from ngeval.report.facts import CONVENTIONS, Trouble, facts, run_facts, troubles
from ngeval.report.findings import findings
from ngeval.report.sources import Source, Topic, topics
from ngeval.report.summaries import Grades, grades
from ngeval.report.tables import Table, gamma_table, training_table
from ngeval.report.traces import Chart
from ngeval.report.wording import printable

MAX_CELLS = 4_000_000
"""Values of a table that goes into the page as it is; of a larger one the means go."""


@dataclass(frozen=True)
class Shown:
    """A task as the page shows it.

    Attributes:
        name: its heading.
        facts: what was measured.
        findings: sentences.
        charts: by their ids.
        tables: that sort.
    """

    name: str
    facts: list[tuple[str, str]]
    findings: list[str]
    charts: dict[str, Chart] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Download:
    """Rows to take from the page.

    Attributes:
        name: of the file that is made.
        original: of the file that they come from.
        content: CSV, gzip, base64.
        note: what is in it.
    """

    name: str
    original: str
    content: str
    note: str


def make_page(sources: Sequence[Source], title: str | None = None) -> str:
    """A report's HTML.

    Args:
        sources: the result files; see `ngeval.report.read_sources`.
        title: of the page; None names the tasks.

    Raises:
        InputError: there are no sources, or a column of numbers holds something else.
    """
    if not sources:
        raise InputError("a report needs at least one result file")
    found = topics(sources)
    made = {topic.name: _grades(topic) for topic in found}
    ids = count(1)
    shown = [_shown(topic, made[topic.name], ids) for topic in found]
    charts = {key: chart for entry in shown for key, chart in entry.charts.items()}
    told: list[Trouble] = [trouble for topic in found for trouble in troubles(topic)]
    scripts = {"plotly": get_plotlyjs() if charts else "", "own": _file("report.js")}
    page = _template().render(
        title=title or "ngeval: " + ", ".join(topic.name for topic in found),
        dark=DARK,
        shown=shown,
        several=len(shown) > 1,
        conventions=CONVENTIONS if any(made.values()) else (),
        runs=[(source.shown, run_facts(source)) for source in sources],
        failures=[trouble for trouble in told if trouble.status != "ok"],
        notes=list(
            dict.fromkeys(
                [*(n for s in sources for n in s.notes), *(n for t in found for n in t.notes)]
            )
        ),
        remarks=[trouble for trouble in told if trouble.status == "ok"],
        downloads=[_download(source, made, found) for source in sources],
        data=json_text({key: chart.payload() for key, chart in charts.items()}),
        css=_file("report.css"),
        scripts=scripts,
        policy=_policy(scripts),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("ngeval"),
    )
    return printable(page)  # a name that is no text must not cost the page


def json_text(value: Any) -> str:
    r"""JSON that may stand in a script element: nothing in it ends the element or begins another.

    >>> print(json_text("</script>"))
    "\u003c/script\u003e"
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _grades(topic: Topic) -> Grades | None:
    return grades(topic.tables[GAMMAS]) if GAMMAS in topic.tables else None


def _shown(topic: Topic, short: Grades | None, ids: count[int]) -> Shown:
    charts: list[Chart] = []
    tables: list[Table] = []
    labels = topic.labels
    if short is not None:
        charts += gamma_charts(short, labels)
        tables.append(gamma_table(short, labels))
    if SAMPLES in topic.tables:
        charts += sample_charts(topic.tables[SAMPLES], labels)
    if LAYERS in topic.tables:
        charts += layer_charts(topic.tables[LAYERS], labels)
    if TRAINING in topic.tables:
        charts += training_charts(topic.tables[TRAINING])
        tables.append(training_table(topic.tables[TRAINING]))
    keyed = {f"chart-{next(ids)}": chart for chart in charts}
    return Shown(topic.name, facts(topic), findings(topic, short), keyed, tables)


def _download(source: Source, made: dict[str, Grades | None], found: Sequence[Topic]) -> Download:
    table, stem = source.table, source.shown.removesuffix(source.path.suffix).replace("/", "-")
    name = f"{stem}.csv"
    note = f"{len(table):,} rows, all columns"
    if table.size > MAX_CELLS:
        parts = [
            short.summary.assign(task=topic.name)
            for topic in found
            if source.kind == GAMMAS
            and source in topic.sources
            and (short := made[topic.name]) is not None
        ]
        lost = f"the {len(table):,} rows themselves are too many for a page"
        if not parts:
            return Download(name, source.shown, "", lost)
        name, note = f"{stem}-means.csv", f"means over batches; {lost}"
        table = pd.concat(parts)
    text = io.BytesIO()
    table.to_csv(text, index=False, encoding="utf-8", errors="replace")
    packed = gzip.compress(text.getvalue(), compresslevel=6, mtime=0)
    return Download(name, source.shown, base64.b64encode(packed).decode("ascii"), note)


def _policy(scripts: dict[str, str]) -> str:
    """A Content-Security-Policy: these scripts and no others, no network."""
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in scripts.values() if text)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _file(name: str) -> str:
    return (resources.files("ngeval.report") / name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("report.html"))
