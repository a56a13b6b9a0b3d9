"""The loss that each layer of an update buys, and the KL that it spends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ngeval.analysis.layer_summary import (
    GEOMETRIC,
    SUMMED,
    leading_layers,
    summarize_layers,
    with_rest,
)
from ngeval.analysis.stages import checkpoint_labels
from ngeval.analysis.tables import name_in, numbers, require
from ngeval.errors import InputError
from ngeval.plots.gamma import at_damping
from ngeval.plots.names import name_text
from ngeval.plots.style import COLUMN, legend_under, own_axes, panels
from ngeval.plots.ticks import number_text

MAX_LAYERS = 24
"""Bars in a picture; the last one is the rest."""

BARS = {
    "decrease_share": ("#0072B2", "loss bought (of dᵀg)", -0.2),
    "curvature_share": ("#E69F00", "KL spent (of dᵀFd)", 0.2),
}
"""The shares: colour, name and place beside the other one."""


def plot_layers(
    table: pd.DataFrame,
    method: str | None = None,
    *,
    damping: float | None = None,
    checkpoint: str | None = None,
    layers: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Each layer's share of the loss that an update buys, and of the KL that it spends.

    Means over batches. A layer whose second bar is the longer spends more than it buys; a negative
    bar is a layer that works against the others. For the natural gradient the two are equal. The
    numbers at the right are γ(d_l) over the least γ of any update of that layer alone.

    Args:
        table: rows of `ngeval.layer_table` (``ngeval layers``'s output).
        method: its name; None takes the first.
        damping: λ as the table has it; None takes the smallest positive one.
        checkpoint: its name; None takes the last.
        layers: those with their own bars; None takes those with the largest shares.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or has no such method, damping or checkpoint.
    """
    summary = _chosen(table, damping, checkpoint)
    method = name_in(summary, "method", method)
    rows = summary[summary["method"] == method]
    rows = with_rest(rows, leading_layers(rows, MAX_LAYERS) if layers is None else layers)
    with own_axes(ax, (COLUMN, panel_height(len(rows)) + 0.3)) as axes:
        draw_layers(axes, rows)
        _write_ratios(axes, rows["gamma_over_best"])
        axes.set_title(f"{name_text(method)}: γ = {rows['gamma_total'].iloc[0]:.3g}")
        legend_under(axes, 2)
    return axes


def draw_layers(axes: Axes, rows: pd.DataFrame) -> None:
    """Two bars for each row with a ``layer`` and its two shares, the first one at the top."""
    places = np.arange(len(rows))
    for column, (colour, label, offset) in BARS.items():
        axes.barh(places + offset, rows[column], 0.4, color=colour, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [name_text(name) for name in rows["layer"]])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the whole update")


def layers_figure(
    table: pd.DataFrame,
    *,
    damping: float | None = None,
    checkpoint: str | None = None,
    width: float | None = None,
) -> Figure:
    """One panel of `plot_layers` for each method, with the same layers in all of them.

    Args:
        table: rows of `ngeval.layer_table` (``ngeval layers``'s output).
        damping: λ as the table has it; None takes the smallest positive one.
        checkpoint: its name; None takes the last.
        width: of the figure in inches; None takes a column for one method, else a page.
    """
    summary = _chosen(table, damping, checkpoint)
    names = list(dict.fromkeys(summary["method"]))
    layers = leading_layers(summary, MAX_LAYERS)
    shown = len(layers) + (summary["layer"].nunique() > len(layers))
    with panels(len(names), width, panel_height(shown), least=2.2) as (figure, grid):
        for axes, method in zip(grid, names, strict=True):
            plot_layers(
                table, method, damping=damping, checkpoint=checkpoint, layers=layers, ax=axes
            )
        where = f"λ = {number_text(summary['damping'].iloc[0])}"
        if "checkpoint" in summary:
            label = checkpoint_labels(table)[str(summary["checkpoint"].iloc[0])]
            where = f"{name_text(label)}, {where}"
        figure.suptitle(where)
    return figure


def _chosen(table: pd.DataFrame, damping: float | None, checkpoint: str | None) -> pd.DataFrame:
    """The means over batches at one λ and checkpoint."""
    require(table, "method", "damping", "layer", "decrease_share", "curvature_share", "status")
    rows = _finite(table[table["status"] != "failed"])
    if "checkpoint" in rows:
        checkpoint = name_in(rows, "checkpoint", checkpoint, default=-1)
        rows = rows[rows["checkpoint"].astype(str) == checkpoint]
    return summarize_layers(at_damping(rows, damping)[0])


def _finite(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose two shares can be drawn; γ ratios that are not possible become NaN."""
    rows = numbers(rows, "damping", "num_parameters", *SUMMED, "excess", *GEOMETRIC)
    rows = rows.replace([np.inf, -np.inf], np.nan).dropna(subset=[*SUMMED, "damping"])
    rows = rows[rows["damping"] >= 0]
    if rows.empty:
        raise InputError(
            "every row of the table has status 'failed' or shares that are not finite, so there is "
            "nothing to draw"
        )
    ratios = {name: rows[name].where(rows[name] > 0) for name in GEOMETRIC if name in rows}
    return rows.assign(**ratios, method=rows["method"].fillna("").astype(str))


def _write_ratios(axes: Axes, ratios: pd.Series[float]) -> None:
    """Write γ(d_l) over the least γ of its layer at the right of each pair of bars."""
    if ratios.isna().all():
        return
    right = axes.get_yaxis_transform()
    style: dict[str, Any] = {"transform": right, "va": "center", "ha": "left", "fontsize": 6.5}
    for place, ratio in enumerate(ratios):
        if np.isfinite(ratio):
            axes.text(1.01, place, f"{ratio:.3g}×", **style)
    axes.text(1.01, -0.75, "γ/best", **style)


def panel_height(bars: int) -> float:
    """Of a panel, in inches."""
    return 0.6 + 0.21 * bars
