"""The parts of charts: plotly's traces and axes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.stages import stage_column
from ngeval.report.colours import Look
from ngeval.report.wording import chart_text, with_interval

Trace = dict[str, Any]
"""A trace of plotly; ``meta.colours`` has its colour on a light and on a dark page."""


@dataclass(frozen=True)
class Chart:
    """A chart with a list to choose from.

    Attributes:
        title: above it.
        note: a sentence on what it shows.
        choice: the label of the list.
        options: the entries of the list, each with its traces.
        layout: plotly's, for all entries.
        columns: heads of its table of numbers: of the series, of x, of the value.
        start: the entry that is shown first.
        sideways: whether the value is along x and the names along y.
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
        """The data from which the page's script draws it."""
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
        x: a number or place for each point.
        y: the value.
        low: the interval's lower end, NaN if there is no interval.
        high: its upper end.
        hover: plotly's template for what is shown beside a point.
        extra: further values of each point, ``customdata[2]`` and so on.
        markers: whether to draw points as well.
        band: whether to draw the interval.
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
    """Five significant digits; None for NaN and infinities, which JSON does not have."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in map(float, values)]


def dots(
    names: Sequence[str],
    values: pd.DataFrame,
    notes: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    title: str,
) -> Trace:
    """A point with its interval for each name, from the bottom up.

    Names are ticks at whole numbers, so that two names with the same shortened form stay two.

    Args:
        names: of the rows.
        values: three columns: value, low and high end.
        notes: a further line of hover text for each.
        pairs: the colour of each, on a light and on a dark page.
        title: the name of the value.
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
                rounded(below), rounded(above), notes, values.to_numpy(dtype=float), strict=True
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
    """A line without points or interval, to compare others with."""
    hover = f"%{{fullData.name}}<br>{value} = %{{y:.3~g}}<extra></extra>"
    return list(Line(name, look, x, y, hover=hover, markers=False).traces())


def stage_axis(
    rows: pd.DataFrame, checkpoints: Sequence[str], labels: dict[str, str]
) -> tuple[list[Any], dict[str, Any]]:
    """The places of checkpoints on the axis of stages (epoch or step, if known), and the axis."""
    column = stage_column(rows)
    if column is not None:
        single = rows.drop_duplicates("checkpoint").set_index("checkpoint")[column]
        axis = {"title": {"text": f"training {column}"}, "rangemode": "tozero"}
        return single.loc[list(checkpoints)].tolist(), axis
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
