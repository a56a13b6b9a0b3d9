"""Methods against each other over a training run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.comparison import at_best_damping, ranking
from ngeval.errors import InputError
from ngeval.plots.gamma import chosen_damping, draw_stages, scale_of, usable
from ngeval.plots.style import (
    STYLE,
    checkpoint_title,
    legend_below,
    new_axes,
    number_text,
    plain_ticks,
    styles_of,
)

KFAC_METHODS = {
    "ief": "ief",
    "kfac-ief": "kfac-ief (ieKFAC)",
    "kfac": "kfac (KFAC)",
    "kfac-sf": "kfac-sf (KFAC, sampled label)",
    "kfac-ef": "kfac-ef (eKFAC)",
}
"""The methods of Wu et al.'s comparison, with their names for them; KFAC's output factors by the
expectation over labels, and by one drawn label, as it is trained with."""

_STAGE_STYLES = (("#56B4E9", "o"), ("#E69F00", "s"), ("#000000", "D"))


def kfac_figure(
    table: pd.DataFrame, damping: float | None = None, methods: Sequence[str] | None = None
) -> Figure:
    """γ/γ_SGD over training stages for iEF and KFAC's kinds, in the manner of Wu et al.

    On the left each method at its own best λ for every checkpoint, on the right all at one λ.
    Geometric means over batches with 95 % bootstrap intervals. Source of the comparison: Wu et al.
    (arXiv 2406.06420), the experiments on KFAC.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval compare``'s output).
        damping: λ of the right panel, as given; None takes the smallest positive one.
        methods: others than ``ief, kfac-ief, kfac, kfac-sf, kfac-ef``.

    Raises:
        InputError: the table has not the columns, none of the methods, or nothing at that λ.
    """
    table = usable(table, "checkpoint")
    wanted = list(KFAC_METHODS) if methods is None else list(methods)
    rows = table[table["method"].isin(wanted)]
    if rows.empty:
        raise InputError(f"the table has none of the methods {', '.join(wanted)}")
    value = chosen_damping(rows, damping)
    styles = styles_of(table)
    at_one = rows[np.isclose(rows["damping"], value, rtol=1e-6, atol=0)]
    panels = [(f"all at λ = {number_text(value)} ({scale_of(table)})", at_one)]
    if rows["damping"].nunique() > 1:
        panels.insert(0, ("each at its best λ", at_best_damping(rows)))
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            1,
            len(panels),
            figsize=(1.2 + 3.2 * len(panels), 3.6),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for index, (axes, (title, part)) in enumerate(zip(grid[0], panels, strict=True)):
            draw_stages(part, axes, styles, KFAC_METHODS)
            axes.set_title(title)
            if index:
                axes.set_ylabel("")
        legend_below(*grid[0])
    return figure


def plot_ranking(
    table: pd.DataFrame, checkpoints: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """γ/γ_min of every method at an early, a middle and a late checkpoint; 1 is the least there is.

    Each method at its best λ of those in the table; geometric means over batches with 95 %
    bootstrap intervals; the best at the last checkpoint on top.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval compare``'s output).
        checkpoints: which; None takes the first, the middle and the last.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns, or no γ_min.
    """
    ranked = ranking(usable(table, "checkpoint"), checkpoints)
    if ranked["gamma_over_ng"].isna().all():
        raise InputError("the table has no γ_min (--no-natural or another metric), so no γ/γ_min")
    stages = list(dict.fromkeys(ranked["checkpoint"]))
    last = ranked[ranked["checkpoint"] == stages[-1]]
    methods = list(last["method"])
    axes = new_axes(ax, (5.0, 0.9 + 0.24 * len(methods)))
    for index, name in enumerate(stages):
        rows = ranked[ranked["checkpoint"] == name].set_index("method").reindex(methods)
        colour, marker = _STAGE_STYLES[index - len(stages)]
        places = np.arange(len(methods)) + 0.22 * (index - (len(stages) - 1) / 2)
        value = rows["gamma_over_ng"].to_numpy(dtype=float)
        ends = [
            np.nan_to_num(np.abs(rows[f"gamma_over_ng{end}"].to_numpy(dtype=float) - value))
            for end in ("_low", "_high")
        ]
        label = f"{rows['stage_name'].dropna().iloc[0]}: {checkpoint_title(table, name)}"
        axes.errorbar(
            value, places, xerr=ends, color=colour, marker=marker, linestyle="none", label=label
        )
    axes.set_yticks(np.arange(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.axvline(1, color="#CC79A7", linewidth=1)
    plain_ticks(axes.xaxis)
    axes.set_xlabel("γ/γ_min at the best λ (1: the natural gradient itself)")
    axes.legend(loc="best")
    return axes


def ranking_figure(table: pd.DataFrame, checkpoints: Sequence[str] | None = None) -> Figure:
    """`plot_ranking` in a figure of its own."""
    count = table["method"].nunique() if "method" in table else 1
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 1.2 + 0.26 * count), layout="constrained")
        plot_ranking(table, checkpoints, axes)
    return figure
