"""Per-sample gradient norms over training."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ngeval.plots.style import STYLE, legend_below, new_axes, require, stage_label, with_stage


def plot_imbalance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Per-sample gradient norms against the training stage: quantiles, and max/min on the right.

    Args:
        table: ``ngeval imbalance``'s output, one row for each sample.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns.
    """
    require(table, "checkpoint", "gradient_norm")
    rows = with_stage(table)
    axes = new_axes(ax, (4.6, 3.2))
    quantiles = rows.groupby("x")["gradient_norm"].quantile(
        np.array([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    )
    by_stage = quantiles.unstack()
    x = by_stage.index.to_numpy(dtype=float)
    blue, orange = "#0072B2", "#D55E00"
    for low, high, alpha, label in ((0.05, 0.95, 0.2, "5–95 %"), (0.25, 0.75, 0.35, "25–75 %")):
        axes.fill_between(
            x, by_stage[low], by_stage[high], color=blue, alpha=alpha, linewidth=0, label=label
        )
    axes.plot(x, by_stage[0.5], color=blue, label="median")
    for edge in (0.0, 1.0):
        text = "min, max" if edge == 0 else None
        axes.plot(x, by_stage[edge], color=blue, linewidth=0.8, linestyle=":", label=text)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(stage_label(rows))
    axes.set_ylabel("per-sample gradient norm ‖gₙ‖ (nats)")
    right = axes.twinx()
    keys = [key for key in ("x", "batch") if key in rows]
    extremes = rows.groupby(keys)["gradient_norm"].agg(["min", "max"])
    ratio = (extremes["max"] / extremes["min"].where(extremes["min"] > 0)).groupby("x").median()
    right.plot(ratio.index, ratio, color=orange, marker="o", label="max/min")
    right.set_yscale("log")
    right.set_ylabel("imbalance max‖gₙ‖ / min‖gₙ‖", color=orange)
    right.tick_params(axis="y", colors=orange)
    right.spines["right"].set(visible=True, color=orange)
    right.grid(visible=False)
    legend_below(axes, right)
    return axes


def imbalance_figure(table: pd.DataFrame) -> Figure:
    """`plot_imbalance` in a figure of its own."""
    with mpl.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
        plot_imbalance(table, ax)
    return figure
