"""γ over training stages and over damping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ngeval.errors import InputError, nearest_name
from ngeval.plots.style import (
    STYLE,
    checkpoint_title,
    new_axes,
    number_text,
    plain_ticks,
    require,
    stage_label,
    styles_of,
    with_stage,
)
from ngeval.prepared import check_dampings
from ngeval.summary import SUMMARIZED, summarize


def plot_stages(table: pd.DataFrame, damping: float | None = None, ax: Axes | None = None) -> Axes:
    """γ/γ_SGD of every method against the training stage.

    The line is the geometric mean over batches, the band its 95 % bootstrap interval; below 1 is
    closer to the natural gradient than SGD.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval gamma``'s output).
        damping: which λ, as given; None takes the smallest positive one in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns, or nothing at that damping.
    """
    table = usable(table, "checkpoint")
    damping = chosen_damping(table, damping)
    rows = table[np.isclose(table["damping"], damping, rtol=1e-6, atol=0)]
    axes = draw_stages(rows, new_axes(ax, (4.2, 3.2)), styles_of(table))
    axes.set_title(f"damping λ = {number_text(damping)} ({scale_of(table)})")
    axes.legend(ncols=2)
    return axes


def draw_stages(
    rows: pd.DataFrame,
    axes: Axes,
    styles: dict[str, tuple[str, str, str]],
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """Lines with bands over the stages, of rows that have one λ for each method and checkpoint.

    Args:
        rows: those that could be computed.
        axes: where to draw.
        styles: of each method; see `styles_of`.
        labels: other names for the legend.
    """
    staged = with_stage(rows)
    summary = summarize(staged, ("x", "method"))
    for method in _drawn_methods(summary):
        part = summary[summary["method"] == method].sort_values("x")
        label = (labels or {}).get(method, method)
        _line_with_band(axes, part, "x", styles[method], label)
    _ratio_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(stage_label(staged))
    return axes


def plot_damping(
    table: pd.DataFrame, checkpoint: str | None = None, ax: Axes | None = None
) -> Axes:
    """γ/γ_SGD of every method against λ at one checkpoint, with the floor as a dashed line.

    λ = 0 has no place on a logarithmic axis and is left out.

    Args:
        table: rows of `ngeval.evaluate` at many dampings (``ngeval sweep``'s output).
        checkpoint: which one; None takes the first in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns, or no such checkpoint.
    """
    table = usable(table)
    if "checkpoint" in table:
        names = list(dict.fromkeys(table["checkpoint"].astype(str)))
        checkpoint = names[0] if checkpoint is None else checkpoint
        table = table[table["checkpoint"] == checkpoint]
        if table.empty:
            raise InputError(
                f"no rows for checkpoint {checkpoint!r}; {nearest_name(checkpoint, names)}"
            )
    rows = table[table["damping"] > 0]
    if rows.empty:
        raise InputError("the only damping is 0, which has no place on a logarithmic axis")
    axes = new_axes(ax, (4.2, 3.2))
    summary = summarize(rows, ("method", "damping"))
    styles = styles_of(table)
    for method in _drawn_methods(summary):
        part = summary[summary["method"] == method].sort_values("damping")
        single = len(part) == 1  # a line through one point would not be seen
        _line_with_band(axes, part, "damping", styles[method], method, markers=single)
    floor = float(summary["floor_over_sgd"].median())
    axes.axhline(floor, color="#555555", linestyle="--", linewidth=1, label="floor")
    axes.set_xscale("log")
    _ratio_axis(axes)
    axes.set_xlabel(f"damping λ ({scale_of(table)})")
    axes.legend(ncols=2)
    return axes


def stages_figure(table: pd.DataFrame, dampings: Sequence[float] | None = None) -> Figure:
    """One panel of `plot_stages` for each damping (default: the smallest positive one)."""
    chosen = [None] if dampings is None else list(dampings)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(chosen), figsize=(4.2 * len(chosen), 3.4), squeeze=False, layout="constrained"
        )
        for ax, damping in zip(axes[0], chosen, strict=True):
            plot_stages(table, damping, ax)
    return figure


def damping_figure(table: pd.DataFrame, checkpoints: Sequence[str] | None = None) -> Figure:
    """One panel of `plot_damping` for each checkpoint; more than four are thinned out evenly."""
    names = list(dict.fromkeys(table["checkpoint"])) if "checkpoint" in table else [None]
    if checkpoints is not None:
        names = list(checkpoints)
    if len(names) > 4:
        names = [names[round(i * (len(names) - 1) / 3)] for i in range(4)]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(names),
            figsize=(3.6 * len(names), 3.4),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for index, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
            plot_damping(table, name, ax)
            if name is not None:
                ax.set_title(checkpoint_title(table, name))
            if index:
                ax.set_ylabel("")
            ax.get_legend().remove()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def usable(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows of a γ table that could be computed.

    Raises:
        InputError: there are none, or the table has not the columns.
    """
    require(table, *columns, "method", "damping", "status", *SUMMARIZED)
    usable = table[table["status"] == "ok"]
    if usable.empty:
        raise InputError("no row of the table has status 'ok', so there is nothing to draw")
    return usable


def chosen_damping(table: pd.DataFrame, damping: float | None) -> float:
    """The λ of the table that is nearest to the one asked for; None: the smallest positive one.

    Raises:
        InputError: none is near.
    """
    present = np.sort(table["damping"].unique())
    if damping is None:
        positive = present[present > 0]
        return float(positive[0] if len(positive) else present[0])
    check_dampings([damping])
    nearest = float(present[np.argmin(np.abs(np.log((present + 1e-300) / (damping + 1e-300))))])
    if not np.isclose(nearest, damping, rtol=0.5, atol=0):
        raise InputError(f"no rows near damping {damping:g}; the nearest is {nearest:g}")
    return nearest


def scale_of(table: pd.DataFrame) -> str:
    """What λ multiplies."""
    return str(table["damping_scale"].iloc[0]) if "damping_scale" in table else "absolute"


def _drawn_methods(summary: pd.DataFrame) -> list[str]:
    """The methods in the order of the table; SGD is the line at 1."""
    return [method for method in dict.fromkeys(summary["method"]) if method != "sgd"]


def _line_with_band(
    axes: Axes,
    part: pd.DataFrame,
    x: str,
    style: tuple[str, str, str],
    label: str,
    markers: bool = True,
) -> None:
    colour, marker, dash = style
    axes.plot(
        part[x],
        part["gamma_over_sgd_geomean"],
        color=colour,
        linestyle=dash,
        marker=marker if markers else "",
        label=label,
    )
    axes.fill_between(
        part[x].to_numpy(dtype=float),
        part["gamma_over_sgd_geomean_low"].to_numpy(dtype=float),
        part["gamma_over_sgd_geomean_high"].to_numpy(dtype=float),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )


def _ratio_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=1, label="sgd")
    plain_ticks(axes.yaxis)
    axes.set_ylabel("γ relative to SGD (lower: closer to NG)")
