"""Lines with their intervals, as the figures of the studies draw them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ngeval.plots.style import styles_of
from studies.statistics import Interval


def style_of(method: str) -> tuple[str, str, str]:
    """Colour, marker and dashes of a method, the same in every figure."""
    colour, marker, dash = styles_of(pd.DataFrame({"method": [method]}))[method]
    return colour, marker, dash


def keep_to_lines(axes: Axes) -> None:
    """Cut a logarithmic axis at ten times what its lines need: bands of few values are very wide.

    The limits still hold every line; a wider band leaves the panel at its edge.
    """
    low, high = axes.get_ylim()
    drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()]).astype(float)
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    axes.set_ylim(max(low, drawn.min() / 10), min(high, drawn.max() * 10))


def draw_line(
    axes: Axes,
    intervals: Mapping[float, Interval],
    colour: str,
    *,
    marker: str | None = None,
    dash: str = "-",
    label: str | None = None,
) -> None:
    """Draw values against the keys of ``intervals``, on a band of their 95 % intervals."""
    values, low, high = np.array(list(intervals.values())).T
    x = list(intervals)
    axes.plot(x, values, color=colour, marker=marker, linestyle=dash, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
