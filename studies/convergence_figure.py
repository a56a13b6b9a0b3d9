"""The figure of *convergence*: loss against time with the prediction, and against steps."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.plots.style import PAGE, in_style, legend_under
from ngeval.plots.ticks import log_scale
from studies.convergence_findings import CROSS_ENTROPY, REGRESSIONS, compared
from studies.drawing import draw_line, keep_to_lines, style_of
from studies.statistics import geometric_intervals

SHADES = ("#08306B", "#2171B5", "#6BAED6", "#C6DBEF")
"""Shades of iEF's blue; the smallest η is darkest."""


def figure(rows: pd.DataFrame) -> Figure:
    """One column for each loss: iEF at several η on top, iEF against EF and SGD below."""
    kinds = [kind for kind in (*REGRESSIONS, CROSS_ENTROPY) if kind in set(rows["kind"])]
    with in_style():
        drawn, grid = plt.subplots(
            2, len(kinds), figsize=(PAGE, 5.8), squeeze=False, layout="constrained"
        )
        for column, kind in enumerate(kinds):
            _plot_times(rows[rows["kind"] == kind], grid[0, column], kind)
            _plot_steps(rows, grid[1, column], kind)
    return drawn


def _plot_times(rows: pd.DataFrame, axes: Axes, kind: str) -> None:
    """Mean loss against t, over the two curves that theory predicts it to lie between."""
    predicted = rows[(rows["method"] == "ief") & rows["low"].notna()]
    rates = sorted(predicted["learning_rate"].unique())
    finest = predicted[predicted["learning_rate"] == rates[0]]
    low, high = (finest.groupby("time")[end].mean() for end in ("low", "high"))
    is_power_law = kind == CROSS_ENTROPY  # shown on logarithmic axes, where t = 0 has no place
    shown = low.index > 0 if is_power_law else low.index >= 0
    axes.fill_between(
        low.index[shown], low[shown], high[shown], color="#BBBBBB", alpha=0.5, linewidth=0
    )
    for end, text in ((low, "predicted"), (high, None)):
        axes.plot(end.index[shown], end[shown], color="black", linewidth=1, label=text)
    for shade, rate in zip(SHADES, rates, strict=False):
        part = predicted[predicted["learning_rate"] == rate]
        part = part[part["time"] > 0] if is_power_law else part
        intervals = geometric_intervals(part, "time", "loss")
        draw_line(axes, intervals, shade, dash="--", label=f"iEF, η = {rate:g}")
    log_scale(axes, *("xy" if is_power_law else "y"))
    keep_to_lines(axes)
    axes.set_xlabel("time t = η × steps")
    axes.set_ylabel("mean training loss (nats)")
    axes.set_title(kind)
    legend_under(axes, 2)


def _plot_steps(rows: pd.DataFrame, axes: Axes, kind: str) -> None:
    """Mean loss against steps, each optimizer at its best learning rate."""
    for name, part in compared(rows, kind).items():
        colour, _, dash = style_of(name)
        label = f"{name}, η = {part['learning_rate'].iloc[0]:g}"
        draw_line(axes, geometric_intervals(part, "step", "loss"), colour, dash=dash, label=label)
    log_scale(axes, "y")
    keep_to_lines(axes)
    axes.set_xlabel("full-batch steps")
    axes.set_ylabel("mean training loss (nats)")
    axes.set_title("each at its best η of those tried")
    legend_under(axes, 2)
