"""Per-sample gradient norms over training."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import violin_stats
from matplotlib.figure import Figure
from matplotlib.mlab import GaussianKDE

from ngeval.analysis.norms import imbalance_means
from ngeval.analysis.tables import numbers, require
from ngeval.errors import InputError
from ngeval.plots.style import (
    COLUMN,
    in_style,
    legend_below,
    legend_under,
    line_with_band,
    own_axes,
    stage_axis,
    with_stage,
)
from ngeval.plots.ticks import log_scale

MAX_VIOLINS = 15
"""Stages whose distributions are drawn; of more stages, bands of quantiles are."""

_BLUE, _GREY = "#0072B2", "#444444"  # grey, which no method has
_BANDS = ((0.05, 0.95, 0.2, "5–95 %"), (0.25, 0.75, 0.35, "25–75 %"))


def plot_norms(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The distribution of per-sample gradient norms at each training stage.

    Up to `MAX_VIOLINS` stages: a density each (of the logarithms, Gaussian kernel, Scott's width),
    all of the same width, from the least norm to the greatest; more stages: bands of quantiles.
    The line joins the medians. Norms that are 0 or not finite have no place on the logarithmic
    axis; the title counts them.

    Args:
        table: ``ngeval imbalance``'s output, one row for each sample.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or has no norm above 0.
    """
    require(table, "checkpoint", "gradient_norm")
    rows = numbers(with_stage(table), "gradient_norm")
    positive = rows[rows["gradient_norm"].between(0, np.inf, inclusive="neither")]
    if positive.empty:
        raise InputError("no sample has a gradient norm above 0, so there is nothing to draw")
    with own_axes(ax) as axes:
        if positive["x"].nunique() <= MAX_VIOLINS:
            _draw_violins(positive, axes)
        else:
            _draw_bands(positive, axes)
        medians = positive.groupby("x")["gradient_norm"].median()
        axes.plot(medians.index, medians, color="black", marker=".", label="median")
        log_scale(axes, "y")
        stage_axis(axes, rows)
        axes.set_ylabel("per-sample gradient norm\n‖gₙ‖ (nats)")
        zeros = int((rows["gradient_norm"] == 0).sum())
        others = len(rows) - len(positive) - zeros
        counts = {"are 0": zeros, "are not finite": others}
        missing = [f"{n} of {len(rows)} norms {what}" for what, n in counts.items() if n]
        if missing:
            axes.set_title("\n".join(missing))
        legend_under(axes)
    return axes


def plot_imbalance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Imbalance of the gradient norms, max‖gₙ‖/min‖gₙ‖ of a batch, against the training stage.

    The line is the geometric mean over batches, the band its 95 % bootstrap interval. A batch with
    a norm that is 0 or not finite has no such ratio and does not count.

    Args:
        table: ``ngeval imbalance``'s output, one row for each sample.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or every batch has such a norm.
    """
    require(table, "checkpoint", "gradient_norm")
    rows = numbers(with_stage(table), "gradient_norm")
    means = imbalance_means(rows, "x")
    if means.empty:
        raise InputError(
            "every batch has a sample of gradient norm 0 or one that is not finite, so max/min is "
            "not defined"
        )
    with own_axes(ax, (COLUMN, 1.9)) as axes:
        line_with_band(axes, means, "x", (_GREY, "o", "-"), "max/min")
        log_scale(axes, "y")
        stage_axis(axes, rows)
        axes.set_ylabel("imbalance\nmax‖gₙ‖ / min‖gₙ‖")
    return axes


def norms_figure(table: pd.DataFrame, *, width: float | None = None) -> Figure:
    """`plot_norms`, and `plot_imbalance` below it with the same stages.

    Args:
        table: ``ngeval imbalance``'s output, one row for each sample.
        width: of the figure in inches; None takes a column's.
    """
    with in_style():
        figure, (upper, lower) = plt.subplots(
            2,
            1,
            figsize=(width or COLUMN, 3.7),
            height_ratios=(1.7, 1),
            sharex=True,
            layout="constrained",
        )
        plot_norms(table, upper)
        plot_imbalance(table, lower)
        upper.label_outer()
        figure.align_ylabels()
        legend_below(upper, lower)
    return figure


def _draw_violins(rows: pd.DataFrame, axes: Axes) -> None:
    """Densities of the logarithms on the axis of the norms."""
    places = sorted(rows["x"].unique())
    groups = [np.log(rows.loc[rows["x"] == x, "gradient_norm"].to_numpy()) for x in places]
    # Of few stages that are far apart, bodies would reach beyond the first and the last stage.
    gap = float(min(np.diff(places).min(), np.ptp(places) / 6)) if len(places) > 1 else 1.0
    violins = violin_stats(groups, _density, points=120)
    for violin in violins:
        violin["coords"] = np.exp(violin["coords"])
    drawn: dict[str, Any] = axes.violin(violins, places, widths=0.8 * gap, showextrema=False)
    for index, body in enumerate(drawn["bodies"]):
        body.set(facecolor=_BLUE, edgecolor=_BLUE, alpha=0.45, linewidth=0.5)
        body.set_label("all samples" if index == 0 else "")


def _density(logs: np.ndarray, places: np.ndarray) -> np.ndarray:
    is_flat = np.ptp(logs) == 0  # the kernel would have no width
    return np.ones_like(places) if is_flat else GaussianKDE(logs).evaluate(places)


def _draw_bands(rows: pd.DataFrame, axes: Axes) -> None:
    quantiles = rows.groupby("x")["gradient_norm"].quantile(
        np.array([0, 0.05, 0.25, 0.75, 0.95, 1])
    )
    by_stage = quantiles.unstack()
    x = by_stage.index.to_numpy(dtype=float)
    for low, high, alpha, label in _BANDS:
        axes.fill_between(
            x, by_stage[low], by_stage[high], color=_BLUE, alpha=alpha, linewidth=0, label=label
        )
    for edge, text in ((0.0, "min, max"), (1.0, None)):
        axes.plot(x, by_stage[edge], color=_BLUE, linewidth=0.8, linestyle=":", label=text)
