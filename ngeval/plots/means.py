"""Geometric means over batches with their intervals, as lines with bands."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from ngeval.analysis import intervals as bootstrap


def geometric_means(x: pd.Series, values: pd.Series[float]) -> pd.DataFrame:
    """The geometric mean of positive values for each x, with its 95 % bootstrap interval.

    Returns:
        Columns ``x, gamma_over_sgd_geomean`` and that with ``_low`` and ``_high``, in order of x;
        intervals of a single value are NaN.
    """
    found = bootstrap.geometric_means(pd.DataFrame({"x": x, "value": values}), ["x"], "value")
    mean = "gamma_over_sgd_geomean"
    names = {"mean": mean, "low": f"{mean}_low", "high": f"{mean}_high"}
    return found.rename(columns=names).sort_values("x")


def line_with_band(
    axes: Axes,
    means: pd.DataFrame,
    x: str,
    style: tuple[str, str, str],
    label: str,
    *,
    markers: bool = True,
) -> None:
    """Draw the column ``gamma_over_sgd_geomean`` with its interval.

    Args:
        axes: where to draw.
        means: of `summarize` or `geometric_means`, in order of x.
        x: the column of the horizontal axis.
        style: colour, marker and dash.
        label: for the legend.
        markers: on each point; without them a line of many points is easier to follow.
    """
    colour, marker, dash = style
    axes.plot(
        means[x],
        means["gamma_over_sgd_geomean"],
        color=colour,
        linestyle=dash,
        marker=marker if markers else "",
        label=label,
    )
    axes.fill_between(
        means[x].to_numpy(dtype=float),
        means["gamma_over_sgd_geomean_low"].to_numpy(dtype=float),
        means["gamma_over_sgd_geomean_high"].to_numpy(dtype=float),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
