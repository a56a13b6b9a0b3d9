"""Geometric means over batches with their intervals, as lines with bands."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes


def line_with_band(
    axes: Axes,
    means: pd.DataFrame,
    x: str,
    style: tuple[str, str, str],
    label: str,
    *,
    markers: bool = True,
    band: bool = True,
) -> None:
    """Draw geometric means with their intervals.

    Args:
        axes: where to draw.
        means: `ngeval.analysis.intervals.geometric_means`.
        x: the column of the horizontal axis.
        style: colour, marker and dash.
        label: for the legend.
        markers: on each point; a line of many points is easier to follow without.
        band: whether to draw the interval.
    """
    means = means.sort_values(x)
    colour, marker, dash = style
    axes.plot(
        means[x],
        means["mean"],
        color=colour,
        linestyle=dash,
        marker=marker if markers else "",
        label=label,
    )
    if not band:
        return
    axes.fill_between(
        means[x].to_numpy(dtype=float),
        means["low"].to_numpy(dtype=float),
        means["high"].to_numpy(dtype=float),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
