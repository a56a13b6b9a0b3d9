"""The charts of a report: γ over training and damping, rankings, norms, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.analysis.best_damping import smallest_positive
from ngeval.analysis.layer_summary import leading_layers, with_rest
from ngeval.analysis.norms import imbalance_means
from ngeval.analysis.stages import evenly, in_order, three_stages
from ngeval.plots.gamma import FLOOR, damping_axis, draw_ratios
from ngeval.plots.imbalance import norms_figure, plot_norms
from ngeval.plots.layers import BARS, MAX_LAYERS, draw_layers, panel_height
from ngeval.plots.ranking import draw_points, method_axis, ranking_height
from ngeval.plots.style import panels, stage_axis, styles_of, with_stage
from ngeval.report.summaries import Grades, layer_means
from ngeval.report.svg import Point, svg_text
from ngeval.report.wording import damping_text, number, with_interval
from ngeval.utils.text import shortened

RATIO, BEST = "γ/γ_SGD", "γ/γ_min"

HEIGHT = 2.5
"""Of the panel of a picture, in inches."""

MAX_OPTIONS = 16
"""Pictures of a chart; of more, these are spread evenly over all."""

MAX_BANDS = 8
"""Methods whose intervals are drawn; those of more would hide the lines."""

QUANTILES = {
    "largest": 1.0,
    "95 %": 0.95,
    "75 %": 0.75,
    "median": 0.5,
    "25 %": 0.25,
    "5 %": 0.05,
    "smallest": 0.0,
}
"""Of gradient norms."""


class Picture(NamedTuple):
    """A figure and the values in it."""

    figure: Figure
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """Pictures of which one is shown.

    They are chosen from a list with the label ``choice``; its entries are the ``options``, each
    with what draws the picture, of which the one in place ``start`` is shown first.
    """

    title: str
    note: str
    choice: str
    options: Sequence[tuple[str, Callable[[], Picture]]]
    start: int = 0

    def drawn(self, key: str) -> Iterator[tuple[str, str, bool]]:
        """Label, SVG and whether it is first, of a few pictures; the key is the chart's id."""
        for place in sorted({self.start, *evenly(len(self.options), MAX_OPTIONS)}):
            label, draw = self.options[place]
            figure, points = draw()
            name = f"{self.title}; its numbers are in the table below"
            svg = svg_text(figure, name, points, f"{key}-{place}")
            yield label, svg, place == self.start


def gamma_charts(short: Grades, labels: dict[str, str]) -> Iterator[Chart]:
    """γ/γ_SGD over stages and over λ, and the ranking, unless there is nothing to show."""
    last = len(short.checkpoints) - 1
    if last:
        parts = [("the best of each method", short.best)]
        parts += [
            (damping_text(value), short.summary[short.summary["damping"] == value])
            for value in short.dampings
        ]
        yield Chart(
            "γ over training",
            "γ over SGD's, geometric mean over batches with its 95 % bootstrap interval; below 1 "
            "is nearer to the natural gradient than SGD. No update is below the floor.",
            "damping λ",
            [(name, partial(_stages, short, labels, part)) for name, part in parts],
            1 + short.dampings.index(short.smallest),
        )
    if sum(value > 0 for value in short.dampings) > 1:
        yield Chart(
            "γ over damping",
            "γ over SGD's at every λ, with the exact natural gradient's and the floor.",
            "checkpoint",
            [(labels[name], partial(_dampings, short, labels, name)) for name in short.checkpoints],
            last,
        )
    if len(short.methods) > 1:
        meaning = "γ over the least possible, 1 is the natural gradient itself"
        yield Chart(
            "Ranking",
            "Each method at its best λ, chosen on the same batches: "
            f"{meaning if _has_least(short) else RATIO}; geometric mean over batches with its "
            "95 % bootstrap interval.",
            "checkpoint",
            [(labels[name], partial(_ranking, short, labels, name)) for name in short.checkpoints],
            last,
        )


def _has_least(short: Grades) -> bool:
    return bool(short.summary["best"].notna().any())


def _name(text: str) -> str:
    """A name on one line."""
    return shortened(" ".join(text.split()))


def _lines(
    row: dict[Any, Any], columns: Sequence[str], title: str, labels: dict[str, str]
) -> tuple[str, ...]:
    """What is shown beside a method's value, which has columns for itself and its interval."""
    where = f"{_name(labels[row['checkpoint']])}, λ = {damping_text(row['damping'])}"
    value = with_interval(*(row[column] for column in columns))
    return _name(row["method"]), where, f"{title} = {value}", f"batches: {row['batches']:.0f}"


def _draw_ratios(
    axes: Axes, short: Grades, means: pd.DataFrame, x: str, labels: dict[str, str]
) -> list[Point]:
    """The methods' lines over a column; the values on them."""
    styles = styles_of(pd.concat([short.summary, means]))
    draw_ratios(axes, means, x, styles, bands=len(short.methods) <= MAX_BANDS)
    return [
        Point(axes, row[x], row["mean"], _lines(row, ("mean", "low", "high"), RATIO, labels))
        for row in means.to_dict("records")
    ]


def _floor_point(axes: Axes, x: float, floor: float, label: str) -> Point:
    return Point(axes, x, floor, ("floor", _name(label), f"{RATIO} = {number(floor)}"))


def _stages(short: Grades, labels: dict[str, str], part: pd.DataFrame) -> Picture:
    rows = with_stage(short.rows)
    places = rows.groupby("checkpoint")["x"].first()
    means = part.rename(columns={"ratio": "mean"}).assign(x=part["checkpoint"].map(places))
    floors = short.stages.set_index("checkpoint")["floor"]
    with panels(1, None, HEIGHT) as (figure, (axes,)):
        points = _draw_ratios(axes, short, means, "x", labels)
        axes.plot(places[floors.index], floors, **FLOOR)
        stage_axis(axes, rows)
    at_floor = [
        _floor_point(axes, places[name], floors[name], labels[name]) for name in floors.index
    ]
    return Picture(figure, at_floor + points)


def _dampings(short: Grades, labels: dict[str, str], checkpoint: str) -> Picture:
    rows = short.at(checkpoint)
    if "ng" not in short.methods:
        natural = short.natural[short.natural["checkpoint"] == checkpoint]
        rows = pd.concat([rows, natural.assign(method="ng")])
    means = rows[rows["damping"] > 0].rename(columns={"ratio": "mean"})
    floor = float(short.stages.set_index("checkpoint")["floor"][checkpoint])
    with panels(1, None, HEIGHT) as (figure, (axes,)):
        points = _draw_ratios(axes, short, means, "damping", labels)
        axes.axhline(floor, **FLOOR)
        damping_axis(axes, short.rows)
    return Picture(figure, [_floor_point(axes, short.smallest, floor, labels[checkpoint]), *points])


def _ranking(short: Grades, labels: dict[str, str], checkpoint: str) -> Picture:
    title, columns = RATIO, ["ratio", "low", "high"]
    if _has_least(short):
        title, columns = BEST, ["best", "best_low", "best_high"]
    rows = short.best[short.best["checkpoint"] == checkpoint]
    rows = rows[rows[columns[0]].notna()].sort_values(columns[0], kind="stable")
    styles = styles_of(short.summary)
    points = []
    with panels(1, None, ranking_height(len(rows))) as (figure, (axes,)):
        for place, row in enumerate(rows.to_dict("records")):
            colour, marker, _ = styles[row["method"]]
            draw_points(axes, rows[columns].iloc[[place]], [place], (colour, marker or "o"))
            points.append(Point(axes, row[columns[0]], place, _lines(row, columns, title, labels)))
        method_axis(axes, list(rows["method"]))
        axes.set_xlabel(f"{title} at the best λ")
    return Picture(figure, points)


def sample_charts(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[Chart]:
    """Gradient norms and their imbalance over training."""
    samples = in_order(samples)
    if samples["gradient_norm"].between(0, np.inf, inclusive="neither").any():
        yield Chart(
            "Per-sample gradient norms, and their imbalance",
            "‖g_n‖ over the samples of all batches, and the largest over the smallest of a batch: "
            "geometric mean over batches with its 95 % bootstrap interval.",
            "",
            [("", partial(_norms, samples, labels))],
        )


def _norms(samples: pd.DataFrame, labels: dict[str, str]) -> Picture:
    places = with_stage(samples).groupby("checkpoint")["x"].first()
    means = imbalance_means(samples)
    if means.empty:
        with panels(1, None, HEIGHT) as (figure, (axes,)):
            plot_norms(samples, axes)
    else:
        figure = norms_figure(samples)
    points = []
    positive = samples[samples["gradient_norm"].between(0, np.inf, inclusive="neither")]
    for name, part in positive.groupby("checkpoint", sort=False)["gradient_norm"]:
        for series, level in QUANTILES.items():
            norm = float(part.quantile(level))
            shown = (series, _name(labels[str(name)]), f"‖g‖ = {number(norm)}")
            points.append(Point(figure.axes[0], places[name], norm, shown))
    for row in means.to_dict("records"):
        name, mean = row["checkpoint"], row["mean"]
        ratio = f"max/min = {with_interval(mean, row['low'], row['high'])}"
        lines = ("max/min", _name(labels[name]), ratio, f"batches: {row['count']}")
        points.append(Point(figure.axes[1], places[name], mean, lines))
    return Picture(figure, points)


def layer_charts(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[Chart]:
    """The loss that each layer of an update buys and the KL that it spends."""
    summary = layer_means(table)
    if summary is None:
        return
    updates = _updates(summary)
    parts = dict(list(summary.groupby(["checkpoint", "method", "damping"])))
    leading = leading_layers(summary, MAX_LAYERS)
    options = []
    for checkpoint, method, damping in updates:
        rows = with_rest(parts[checkpoint, method, damping], leading)
        label = f"{method}, λ = {damping_text(damping)}, {labels[checkpoint]}"
        options.append((label, partial(_layers, rows)))
    yield Chart(
        "Layers",
        "Shares of the loss that each layer's part of the update buys and of the KL that it "
        "spends (means over batches); a layer that spends more than it buys raises γ.",
        "update",
        options,
        next(place for place, key in enumerate(updates) if key[0] == updates[-1][0]),
    )


def _updates(summary: pd.DataFrame) -> Sequence[tuple[str, str, float]]:
    """Checkpoint, method and λ; of many, those at the smallest λ, at the first, middle and last."""
    updates = summary[["checkpoint", "method", "damping"]].drop_duplicates()
    for column, values in (
        ("damping", [smallest_positive(updates["damping"])]),
        ("checkpoint", three_stages(summary)),
        ("checkpoint", three_stages(summary)[-1:]),
    ):
        if len(updates) > MAX_OPTIONS:
            updates = updates[updates[column].isin(values)]
    return list(updates.itertuples(index=False, name=None))


def _layers(rows: pd.DataFrame) -> Picture:
    with panels(1, None, panel_height(len(rows)) - 0.1) as (figure, (axes,)):
        draw_layers(axes, rows)
    points = [
        Point(axes, share, place + offset, (name, _name(layer), f"{share:.1%}"))
        for column, (_, name, offset) in BARS.items()
        for place, (layer, share) in enumerate(zip(rows["layer"], rows[column], strict=True))
    ]
    return Picture(figure, points)
