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
