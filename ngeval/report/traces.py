"""What charts are made of: plotly's traces and axes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ngeval.report.colours import Look
from ngeval.report.wording import chart_text, with_interval

Trace = dict[str, Any]
"""A trace of plotly; ``meta.colours`` has its colour on a light and on a dark page."""


@dataclass(frozen=True)
class Chart:
    """A chart with a list to choose from.

    Attributes:
        title: above it.
        note: what it shows, in a sentence.
        choice: what the list chooses.
        options: the entries and what each shows.
        layout: of plotly, for all entries.
        columns: heads of its table of numbers: of the series, of x, of the value.
        start: the entry that is shown first.
        sideways: the value is along x, names along y.
    """

    title: str
    note: str
    choice: str
    options: list[tuple[str, list[Trace]]]
    layout: dict[str, Any]
    columns: tuple[str, str, str]
    start: int = 0
    sideways: bool = False

    def payload(self) -> dict[str, Any]:
        """What the page's script draws it from."""
        return {
            "traces": [traces for _, traces in self.options],
            "layout": self.layout,
            "columns": list(self.columns),
            "sideways": self.sideways,
        }


@dataclass(frozen=True)
class Line:
    """A line over a number or over stages, with an interval.

    Attributes:
        name: in the legend.
        look: colour, dash and marker.
        x: where.
        y: the value.
        low: the interval, NaN where there is none.
        high: likewise.
        hover: shown beside a point, in plotly's template.
        extra: further values of each point, ``customdata[2]`` and so on.
        markers: draw points as well.
        band: draw the interval.
    """

    name: str
    look: Look
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    hover: str = ""
    extra: Sequence[Sequence[Any]] = field(default_factory=list)
    markers: bool = True
    band: bool = True

    def traces(self) -> Iterator[Trace]:
        """The line, and the band behind it."""
        ends = [rounded(end) if len(end) else [None] * len(self.x) for end in (self.low, self.high)]
        yield {
            "type": "scatter",
            "mode": "lines+markers" if self.markers else "lines",
            "name": chart_text(self.name),
            "legendgroup": f"of {chart_text(self.name)}",  # plotly keys by it: no "constructor"
            "x": list(self.x),
            "y": rounded(self.y),
            "customdata": [list(entry) for entry in zip(*ends, *self.extra, strict=True)],
            "hovertemplate": self.hover,
            "line": {"width": 2, "dash": self.look.dash},
            "marker": {"size": 7, "symbol": self.look.symbol},
            "meta": {"colours": self.look.colours},
        }
        known = [
            i for i, (low, high) in enumerate(zip(*ends, strict=True)) if None not in (low, high)
        ]
        if self.band and len(known) > 1:
            x = [self.x[i] for i in known]
            yield {
                "type": "scatter",
                "mode": "lines",
                "legendgroup": f"of {chart_text(self.name)}",
                "x": x + x[::-1],
                "y": [ends[1][i] for i in known] + [ends[0][i] for i in reversed(known)],
                "fill": "toself",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "meta": {"colours": self.look.colours, "band": True},
            }


def rounded(values: Iterable[float]) -> list[float | None]:
    """Five significant digits, None for what JSON has no word for."""
    short = (float(f"{v:.5g}") for v in map(float, values))
    return [v if math.isfinite(v) else None for v in short]


def dots(
    names: Sequence[str],
    values: pd.DataFrame,
    told: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    title: str,
) -> Trace:
    """A point with its interval for each name, from the bottom up.

    Names stand as ticks at whole numbers, so that two that are shortened alike stay two.

    Args:
        names: of the rows.
        values: three columns: value, low and high end.
        told: a line more of hover text for each.
        pairs: the colour of each, on a light and on a dark page.
        title: of the value.
    """
    middle, below, above = values.to_numpy(dtype=float).T
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded(middle),
        "y": list(range(len(names))),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": rounded(np.nan_to_num(above - middle)),
            "arrayminus": rounded(np.nan_to_num(middle - below)),
        },
        "text": [chart_text(name) for name in names],
        "customdata": [
            [*ends, chart_text(note), with_interval(*row)]
            for *ends, note, row in zip(
                rounded(below), rounded(above), told, values.to_numpy(dtype=float), strict=True
            )
        ],
        "hovertemplate": (
            f"%{{text}}<br>%{{customdata[2]}}<br>{title} = %{{customdata[3]}}<extra></extra>"
        ),
        "marker": {"size": 9},
        "meta": {"points": [list(pair) for pair in pairs]},
    }


def reference(
    name: str, x: Sequence[Any], y: Sequence[float], look: Look, value: str
) -> list[Trace]:
    """A line without points or interval that others are seen against."""
    hover = f"%{{fullData.name}}<br>{value} = %{{y:.3~g}}<extra></extra>"
    return list(Line(name, look, x, y, hover=hover, markers=False).traces())


def stage_axis(
    rows: pd.DataFrame, checkpoints: Sequence[str], labels: dict[str, str]
) -> tuple[list[Any], dict[str, Any]]:
    """Where each checkpoint stands on the axis of stages: at its epoch or step, if all tell it."""
    single = rows.drop_duplicates("checkpoint").set_index("checkpoint").loc[list(checkpoints)]
    for told in ("epoch", "step"):
        if told in single and np.isfinite(single[told]).all() and single[told].is_unique:
            axis = {"title": {"text": f"training {told}"}, "rangemode": "tozero"}
            return [float(value) for value in single[told]], axis
    names = [chart_text(labels[name]) for name in checkpoints]
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "automargin": True}
    return list(range(len(names))), {"title": {"text": "checkpoint"}, **ticks}


def log_axis(title: str) -> dict[str, Any]:
    """A logarithmic axis; the page's script chooses its ticks by what is shown."""
    return {
        "type": "log",
        "title": {"text": title},
        "exponentformat": "power",
        "automargin": True,
    }
