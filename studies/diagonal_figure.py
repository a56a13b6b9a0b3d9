"""The figure of *diagonal*: heat maps over depth and width."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ngeval.plots.style import PAGE, in_style, label_outer
from ngeval.plots.ticks import plain_ticks
from studies.diagonal_findings import NAMES, at_best, cells

SHOWN = ("diag", "diag-ef", "diag-ef:0.5", "kfac")


def figure(rows: pd.DataFrame) -> Figure:
    """A row of maps for each method, a column for each stage; geometric means over networks."""
    best = at_best(rows)
    thresholds = sorted(best["threshold"].unique(), reverse=True)
    tables = {method: cells(best, method) for method in SHOWN}
    values = np.concatenate([table["value"] for table in tables.values()])
    norm = LogNorm(1.0, max(2.0, float(np.nanmax(values))))
    maps = [(method, threshold) for method in SHOWN for threshold in thresholds]
    columns = max(2, len(thresholds))
    lines = -(-len(maps) // columns)
    with in_style({"axes.grid": False}):
        drawn, grid = plt.subplots(
            lines, columns, figsize=(PAGE, 1.55 * lines + 0.6), squeeze=False, layout="constrained"
        )
        for axes, (method, threshold) in zip(grid.flat, maps, strict=False):
            part = tables[method][tables[method]["threshold"] == threshold]
            image = _draw(axes, part, norm)
            axes.set_title(f"{NAMES[method]}, training loss {threshold:g}")
        label_outer(list(grid.flat))
        bar = drawn.colorbar(image, ax=grid, location="bottom", aspect=50, pad=0.02)
        plain_ticks(bar.ax.xaxis)
        bar.set_label(
            "γ/γ_min at the best λ (1: the natural gradient itself), with its 95 % interval"
        )
    return drawn


def _draw(axes: Axes, part: pd.DataFrame, norm: LogNorm) -> AxesImage:
    """One map, with its numbers."""
    map_of = part.pivot(index="depth", columns="width", values="value")
    image = axes.imshow(map_of, norm=norm, cmap="viridis", aspect="auto")
    _write(axes, part, map_of, image)
    axes.set_xticks(range(map_of.shape[1]), [f"{w:g}" for w in map_of.columns])
    axes.set_yticks(range(map_of.shape[0]), [f"{d:g}" for d in map_of.index])
    axes.set_xlabel("width (units in a hidden layer)")
    axes.set_ylabel("depth (hidden layers)")
    return image


def _write(axes: Axes, part: pd.DataFrame, map_of: pd.DataFrame, image: AxesImage) -> None:
    """The numbers, with the 95 % interval's ends below, black on light cells and white on dark."""
    for _, cell in part.iterrows():
        if not np.isfinite(cell["value"]):
            continue
        x = list(map_of.columns).index(cell["width"])
        y = list(map_of.index).index(cell["depth"])
        text = _number(cell["value"])
        if np.isfinite(cell["low"]):
            text += f"\n{_number(cell['low'])}–{_number(cell['high'])}"
        light = np.dot(image.cmap(image.norm(cell["value"]))[:3], (0.299, 0.587, 0.114)) > 0.5
        colour = "black" if light else "white"
        axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=6.3)


def _number(value: float) -> str:
    """Short enough for a cell."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"
