"""γ over training stages and over damping: single panels, and a panel for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.analysis.best_damping import smallest_positive
from ngeval.analysis.intervals import geometric_means
from ngeval.analysis.stages import checkpoint_labels, evenly
from ngeval.analysis.summary import with_natural
from ngeval.analysis.tables import graded, name_in, numbers, require
from ngeval.errors import InputError
from ngeval.plots.names import name_text
from ngeval.plots.style import (
    COLUMN,
    draw_hollow,
    legend_under,
    line_with_band,
    own_axes,
    panels,
    stage_axis,
    styles_of,
    with_stage,
)
from ngeval.plots.ticks import log_scale, number_text

MAX_STAGES = 4
"""Panels of `damping_figure`, unless the checkpoints are chosen."""

FLOOR: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 0.9, "label": "floor"}
"""The line of the floor, which no update is below."""


def plot_stages(table: pd.DataFrame, damping: float | None = None, ax: Axes | None = None) -> Axes:
    """γ/γ_SGD of every method against the training stage.

    The line is the geometric mean over batches, the band its 95 % bootstrap interval; below 1 is
    closer to the natural gradient than SGD. Points all of whose batches are ``uncertain`` are
    hollow.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval gamma``'s output).
        damping: λ as the table has it; None takes the smallest positive one in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or has no rows at that damping.
    """
    table = drawable(table, "checkpoint")
    rows, value = at_damping(table, damping)
    with own_axes(ax, (COLUMN, 2.9)) as axes:
        draw_stages(rows, axes, styles_of(table))
        axes.set_title(f"damping λ = {number_text(value)} ({scale_of(table)})")
        legend_under(axes)
    return axes


def draw_stages(
    rows: pd.DataFrame,
    axes: Axes,
    styles: dict[str, tuple[str, str, str]],
    labels: Mapping[str, str] | None = None,
) -> Axes:
    """`draw_ratios` over the stages, of rows that have one λ for each method and checkpoint."""
    staged = with_stage(rows)
    means = geometric_means(staged, ["x", "method", "status"], "gamma_over_sgd")
    draw_ratios(axes, means, "x", styles, labels)
    stage_axis(axes, staged)
    return axes


def draw_ratios(
    axes: Axes,
    means: pd.DataFrame,
    x: str,
    styles: dict[str, tuple[str, str, str]],
    labels: Mapping[str, str] | None = None,
    *,
    bands: bool = True,
) -> None:
    """The line of each method, with its band, and SGD's at 1.

    The means have columns ``method, mean, low, high`` and ``x``, and may have ``status``: points
    that are not ok are hollow. The styles are those of `styles_of`; the labels replace names of
    methods in the legend.
    """
    others = means[means["method"] != "sgd"]
    for method, part in others.groupby(others["method"].astype(str), sort=False):
        label = (labels or {}).get(method) or name_text(method)
        # Lines over λ have many points; a line through one point would not be visible.
        markers = x != "damping" or len(part) == 1
        line_with_band(axes, part, x, styles[method], label, markers=markers, band=bands)
        if "status" in part:
            draw_hollow(axes, part[part["status"] != "ok"], x, styles[method])
    axes.axhline(1, color="black", linewidth=0.9, label="sgd")
    log_scale(axes, "y")
    axes.set_ylabel("γ relative to SGD\n(lower: closer to NG)")


def plot_damping(
    table: pd.DataFrame, checkpoint: str | None = None, ax: Axes | None = None
) -> Axes:
    """γ/γ_SGD of every method against λ at one checkpoint, with the floor as a dashed line.

    The exact natural gradient is also drawn if ``ng`` was not among the methods, from the bounds on
    its γ that every row has. λ = 0 has no place on a logarithmic axis and is left out. Points all
    of whose batches are ``uncertain`` are hollow.

    Args:
        table: rows of `ngeval.evaluate` at many dampings (``ngeval sweep``'s output).
        checkpoint: its name; None takes the first in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or has no such checkpoint.
    """
    table = drawable(table)
    if "checkpoint" in table:
        checkpoint = name_in(table, "checkpoint", checkpoint)
        table = table[table["checkpoint"].astype(str) == checkpoint]
    rows = table[table["damping"] > 0]
    if rows.empty:
        raise InputError("the only damping is 0, which has no place on a logarithmic axis")
    rows = with_natural(rows)
    floors = rows["gamma_floor"] * rows["gamma_over_sgd"] / rows["gamma"]
    keys = ["method", "damping"]
    floor = geometric_means(rows.assign(floor=floors), keys, "floor", resamples=0)["mean"].median()
    styles = styles_of(rows)
    with own_axes(ax, (COLUMN, 2.9)) as axes:
        means = geometric_means(rows, [*keys, "status"], "gamma_over_sgd")
        draw_ratios(axes, means, "damping", styles)
        axes.axhline(floor, **FLOOR)
        damping_axis(axes, table)
        legend_under(axes)
    return axes


def damping_figure(
    table: pd.DataFrame, checkpoints: Sequence[str] | None = None, *, width: float | None = None
) -> Figure:
    """One panel of `plot_damping` for each checkpoint; more than four are thinned out evenly.

    Args:
        table: rows of `ngeval.evaluate` at many dampings (``ngeval sweep``'s output).
        checkpoints: which; None takes up to four.
        width: of the figure in inches; None takes a column for one panel, else a page.
    """
    labels = checkpoint_labels(table) if "checkpoint" in table else {}
    names: list[str | None] = [*labels] or [None]
    if checkpoints is not None:
        names = list(checkpoints)
    else:
        names = [names[place] for place in evenly(len(names), MAX_STAGES)]
    with panels(len(names), width, 2.1) as (figure, grid):
        for ax, name in zip(grid, names, strict=True):
            plot_damping(table, name, ax)
            if name is not None:
                ax.set_title(name_text(labels[str(name)]))
    return figure


def drawable(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """`usable` rows, and those with status ``uncertain`` where no batch has a usable one.

    Raises:
        InputError: there are no usable rows, or the table lacks a column.
    """
    rows, uncertain = usable(table, *columns), graded(table, "uncertain")
    keys = [key for key in ("checkpoint", "method", "damping") if key in rows]
    missing = ~uncertain.set_index(keys).index.isin(rows.set_index(keys).index)
    return pd.concat([rows, uncertain[missing]])


def usable(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows of a γ table that are ok; see `ngeval.analysis.tables.graded`.

    Raises:
        InputError: there are none, or the table lacks a column.
    """
    require(table, *columns)
    rows = graded(table)
    if rows.empty:
        raise InputError(
            "no row of the table has status 'ok' and a finite positive γ and γ/γ_SGD, so there is "
            "nothing to draw"
        )
    return numbers(rows, "gamma_ng_lower", "gamma_ng_upper")


def at_damping(table: pd.DataFrame, damping: float | None) -> tuple[pd.DataFrame, float]:
    """The rows at the λ nearest to the given one, for None at the smallest positive one; that λ.

    Raises:
        InputError: none is near.
    """
    present = np.sort(table["damping"].unique())
    value = smallest_positive(present)
    if damping is not None:
        distances = np.abs(np.log((present + 1e-300) / (max(damping, 0.0) + 1e-300)))
        value = float(present[np.argmin(distances)])
        if not np.isclose(value, damping, rtol=0.5, atol=0):
            raise InputError(f"no rows near damping {damping:g}; the nearest is {value:g}")
    return table[np.isclose(table["damping"], value, rtol=1e-6, atol=0)], value


def damping_axis(axes: Axes, table: pd.DataFrame) -> None:
    """The logarithmic axis of λ."""
    log_scale(axes, "x")
    axes.set_xlabel(f"damping λ ({scale_of(table)})")


def scale_of(table: pd.DataFrame) -> str:
    """The damping scale: what λ multiplies."""
    return name_text(table["damping_scale"].iloc[0]) if "damping_scale" in table else "absolute"
