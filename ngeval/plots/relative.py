"""γ of one method over that of another, batch by batch."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from ngeval.analysis.intervals import geometric_means
from ngeval.analysis.tables import name_in
from ngeval.errors import InputError
from ngeval.plots.gamma import at_damping, scale_of, usable
from ngeval.plots.names import name_text
from ngeval.plots.style import COLUMN, line_with_band, own_axes, stage_axis, styles_of, with_stage
from ngeval.plots.ticks import log_scale, number_text


def plot_relative(
    table: pd.DataFrame,
    method: str = "sf",
    reference: str = "ief",
    damping: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """γ of one method over that of another against the training stage; below 1 it is closer to NG.

    The line is the geometric mean of the ratio within each batch, the band its 95 % bootstrap
    interval. Differences between batches cancel, so that the interval is narrower than the two of
    the methods' ratios to SGD.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval gamma``'s output).
        method: the numerator.
        reference: the denominator.
        damping: λ as the table has it; None takes the smallest positive one in the table.
        ax: where to draw, for example a second ratio; None makes a figure.

    Raises:
        InputError: the table lacks a column, one of the methods, or that damping.
    """
    table = usable(table, "checkpoint")
    rows, value = at_damping(table, damping)
    ratios = with_stage(_ratios(rows, method, reference))
    means = geometric_means(ratios, ["x"], "ratio")
    colour, marker, _ = styles_of(pd.DataFrame({"method": [method]}))[method]
    upper, lower = name_text(method), name_text(reference)
    with own_axes(ax, (COLUMN, 2.2)) as axes:
        line_with_band(axes, means, "x", (colour, marker, "--"), f"{upper}/{lower}")
        axes.axhline(1, color="black", linewidth=0.8)
        log_scale(axes, "y")
        stage_axis(axes, ratios)
        axes.set_ylabel(f"γ of {upper}\nover {lower}'s")
        axes.set_title(f"λ = {number_text(value)} ({scale_of(table)})")
    return axes


def _ratios(rows: pd.DataFrame, method: str, reference: str) -> pd.DataFrame:
    """One row for each checkpoint and batch in which both could be computed."""
    method, reference = (name_in(rows, "method", name) for name in (method, reference))
    keys = [key for key in ("checkpoint", "batch") if key in rows]
    stages = [key for key in ("epoch", "step") if key in rows]
    upper = rows.loc[rows["method"] == method, [*keys, *stages, "gamma"]]
    lower = rows.loc[rows["method"] == reference, [*keys, "gamma"]]
    both = upper.merge(lower, on=keys, suffixes=("", "_reference"))
    if both.empty:
        raise InputError(f"no batch in which both {method!r} and {reference!r} could be computed")
    return both.assign(ratio=both["gamma"] / both["gamma_reference"])
