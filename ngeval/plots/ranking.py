"""Methods against each other over a training run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.analysis.best_damping import at_best_damping
from ngeval.analysis.ranking import ranking
from ngeval.analysis.stages import checkpoint_labels
from ngeval.errors import InputError
from ngeval.plots.gamma import at_damping, draw_stages, scale_of, usable
from ngeval.plots.names import SIDE, name_text
from ngeval.plots.style import COLUMN, legend_under, own_axes, panels, styles_of
from ngeval.plots.ticks import log_scale, number_text

KFAC_METHODS = {
    "ief": "ief",
    "kfac-ief": "kfac-ief (ieKFAC)",
    "kfac": "kfac (KFAC)",
    "kfac-sf": "kfac-sf (KFAC, sampled label)",
    "kfac-ef": "kfac-ef (eKFAC)",
}
"""The methods of Wu et al.'s comparison, with the paper's names. KFAC's output factors are by the
expectation over labels, or by one drawn label, as in training."""

_STAGE_STYLES = (("#56B4E9", "o"), ("#E69F00", "s"), ("#000000", "D"))


def kfac_figure(
    table: pd.DataFrame,
    damping: float | None = None,
    methods: Sequence[str] | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """γ/γ_SGD over training stages for iEF and variants of KFAC, in the manner of Wu et al.

    On the left each method at its best λ for every checkpoint, on the right all at one λ.
    Geometric means over batches with 95 % bootstrap intervals. Source of the comparison: Wu et al.
    (arXiv 2406.06420), the experiments on KFAC.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval compare``'s output).
        damping: λ of the right panel as the table has it; None takes the smallest positive one.
        methods: their names; None takes ``ief, kfac-ief, kfac, kfac-sf, kfac-ef``.
        width: of the figure in inches; None takes a page for two panels, a column for one.

    Raises:
        InputError: the table lacks a column, the methods, or rows at that λ.
    """
    table = usable(table, "checkpoint")
    names = list(KFAC_METHODS) if methods is None else list(methods)
    rows = table[table["method"].isin(names)]
    if rows.empty:
        raise InputError(f"the table has none of the methods {', '.join(names)}")
    at_one, value = at_damping(rows, damping)
    styles = styles_of(table)
    parts = [(f"all at λ = {number_text(value)} ({scale_of(table)})", at_one)]
    if rows["damping"].nunique() > 1:
        parts.insert(0, ("each at its best λ", at_best_damping(rows)))
    with panels(len(parts), width, 2.3, least=2.4) as (figure, grid):
        for axes, (title, part) in zip(grid, parts, strict=True):
            draw_stages(part, axes, styles, KFAC_METHODS)
            axes.set_title(title)
    return figure


def plot_ranking(
    table: pd.DataFrame, checkpoints: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """γ/γ_min of every method at an early, a middle and a late checkpoint; 1 is the least possible.

    Each method at its best λ of those in the table; geometric means over batches with 95 %
    bootstrap intervals; the best at the last checkpoint on top.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval compare``'s output).
        checkpoints: their names; None takes the first, the middle and the last.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, or γ_min.
    """
    ranked = ranking(usable(table, "checkpoint"), checkpoints)
    labels = checkpoint_labels(table)
    if ranked["gamma_over_ng"].isna().all():
        raise InputError("the table has no γ_min (--no-natural or another metric), so no γ/γ_min")
    stages = list(dict.fromkeys(ranked["checkpoint"]))
    last = ranked[ranked["checkpoint"] == stages[-1]]
    methods = list(last["method"])
    with own_axes(ax, (COLUMN, ranking_height(len(methods)) + 0.4)) as axes:
        for index, name in enumerate(stages):
            rows = ranked[ranked["checkpoint"] == name].set_index("method").reindex(methods)
            style = _STAGE_STYLES[(index - len(stages)) % len(_STAGE_STYLES)]
            label = f"{rows['stage_name'].dropna().iloc[0]}: {name_text(labels[str(name)])}"
            offset = 0.22 * (index - (len(stages) - 1) / 2)
            values = rows[[f"gamma_over_ng{end}" for end in ("", "_low", "_high")]]
            draw_points(axes, values, np.arange(len(methods)) + offset, style, label)
        axes.axvline(1, color="#CC79A7", linewidth=1)
        method_axis(axes, methods)
        axes.set_xlabel("γ/γ_min at the best λ (1: exact NG)")
        legend_under(axes, 2)
    return axes


def method_axis(axes: Axes, methods: Sequence[str]) -> None:
    """A line for each method, the first one at the top, and a logarithmic axis of values."""
    axes.set_yticks(np.arange(len(methods)), [name_text(method, SIDE) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    log_scale(axes, "x")


def draw_points(
    axes: Axes,
    values: pd.DataFrame,
    places: Sequence[float] | np.ndarray,
    style: tuple[str, str],
    label: str = "",
) -> None:
    """A point with its interval in each line: columns of the value and of the interval's ends.

    The style is colour and marker.
    """
    value, low, high = values.to_numpy(dtype=float).T
    ends = [np.nan_to_num(np.abs(end - value)) for end in (low, high)]
    colour, marker = style
    axes.errorbar(
        value,
        places,
        xerr=ends,
        color=colour,
        marker=marker,
        markersize=3,
        linestyle="none",
        elinewidth=0.8,
        label=label,
    )


def ranking_figure(
    table: pd.DataFrame, checkpoints: Sequence[str] | None = None, *, width: float | None = None
) -> Figure:
    """`plot_ranking` as a whole figure, as wide as a column or as given in inches."""
    count = table["method"].nunique() if "method" in table else 1
    with panels(1, width, ranking_height(count)) as (figure, grid):
        plot_ranking(table, checkpoints, *grid)
    return figure


def ranking_height(methods: int) -> float:
    """Of a panel, in inches."""
    return 0.5 + 0.19 * methods
