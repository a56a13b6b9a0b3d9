"""The picture of *diagonal*: heat maps over depth and width."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ngeval.plots.style import STYLE
from ngeval.studies.diagonal_findings import NAMES, at_best, cells

SHOWN = ("diag", "diag-ef", "diag-ef:0.5", "kfac")


def figure(rows: pd.DataFrame) -> Figure:
    """A row of maps for each stage, a column for each method; geometric means over networks."""
    best = at_best(rows)
    thresholds = sorted(best["threshold"].unique(), reverse=True)
    tables = {method: cells(best, method) for method in SHOWN}
    values = np.concatenate([table["value"] for table in tables.values()])
    norm = LogNorm(1.0, max(2.0, float(np.nanmax(values))))
    size = (2.6 * len(SHOWN) + 0.8, 2.3 * len(thresholds) + 0.6)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        made, grid = plt.subplots(
            len(thresholds), len(SHOWN), figsize=size, squeeze=False, layout="constrained"
        )
        for line, threshold in zip(grid, thresholds, strict=True):
            for axes, (method, table) in zip(line, tables.items(), strict=True):
                part = table[table["threshold"] == threshold]
                map_of = part.pivot(index="depth", columns="width", values="value")
                image = axes.imshow(map_of, norm=norm, cmap="viridis", aspect="auto")
                _write(axes, part, map_of, norm)
                axes.set_title(f"{NAMES[method]}\ntraining loss {threshold:g}")
                axes.set_xticks(range(map_of.shape[1]), [f"{w:g}" for w in map_of.columns])
                axes.set_yticks(range(map_of.shape[0]), [f"{d:g}" for d in map_of.index])
                axes.set_xlabel("width (units in a hidden layer)")
                axes.set_ylabel("depth (hidden layers)")
        bar = made.colorbar(image, ax=grid, shrink=0.8)
        bar.set_label("γ/γ_min at the best λ (1: the natural gradient itself)")
    return made


def _write(axes: Axes, part: pd.DataFrame, map_of: pd.DataFrame, norm: LogNorm) -> None:
    """The numbers, with the 95 % interval's ends below."""
    for _, cell in part.iterrows():
        x = list(map_of.columns).index(cell["width"])
        y = list(map_of.index).index(cell["depth"])
        text = f"{cell['value']:.2f}"
        if np.isfinite(cell["low"]):
            text += f"\n{cell['low']:.2f}–{cell['high']:.2f}"
        colour = "white" if norm(cell["value"]) < 0.6 else "black"
        axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=5.5)
