"""Tuned optimizers against each other: test performance and final training loss over seeds."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.errors import InputError
from ngeval.performance import outcomes, performance
from ngeval.plots.style import STYLE, plain_ticks, styles_of


def performance_figure(rows: pd.DataFrame) -> Figure:
    """A line of two panels for each task: test performance, and training loss after the last epoch.

    Means over seeds with 95 % t-intervals, each seed a small point beside its mean. An optimizer
    whose trainings all diverged is named, without a point.

    Args:
        rows: of `ngeval.training.Search`, of one task or several.

    Raises:
        InputError: the table is of another kind, or no final training in it came to its end.
    """
    table, ended = performance(rows), outcomes(rows)
    if ended.empty:
        raise InputError("the table has no final training that came to its end: nothing to draw")
    styles = styles_of(table.rename(columns={"optimizer": "method"}))
    tasks = list(dict.fromkeys(table["task"]))
    heights = [0.7 + 0.24 * int((table["task"] == task).sum()) for task in tasks]
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(tasks),
            2,
            figsize=(7.2, 0.3 + sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for task, (left, right) in zip(tasks, grid, strict=True):
            part = table[table["task"] == task]
            seeds = ended[ended["task"] == task]
            metric, data = part["metric"].iloc[0], part["data"].iloc[0] or "test"
            percent = metric == "test_accuracy"
            _draw(left, part, seeds, metric, styles, 100.0 if percent else 1.0)
            left.set_xlabel(f"{data} {'accuracy (%)' if percent else 'loss (nats)'}")
            left.set_title(str(task), loc="left")
            _draw(right, part, seeds, "train_loss", styles, 1.0)
            right.set_xlabel("training loss after the last epoch (nats)")
            right.tick_params(labelleft=False)
            if bool((seeds["train_loss"] > 0).all()):  # a Gaussian's constant may be left out
                right.set_xscale("log")
                plain_ticks(right.xaxis)
    return figure


def _draw(
    axes: Axes,
    table: pd.DataFrame,
    seeds: pd.DataFrame,
    name: str,
    styles: dict[str, tuple[str, str, str]],
    scale: float,
) -> None:
    """A mean with its interval and the seeds, a line for each optimizer, the first on top."""
    optimizers = [str(optimizer) for optimizer in table["optimizer"]]
    for place, (optimizer, (_, row)) in enumerate(zip(optimizers, table.iterrows(), strict=True)):
        colour, marker, _ = styles[optimizer]
        mean, low, high = (scale * float(row[f"{name}_{end}"]) for end in ("mean", "low", "high"))
        single = scale * seeds.loc[seeds["optimizer"] == optimizer, name].to_numpy(dtype=float)
        axes.plot(single, np.full(len(single), place + 0.22), ".", color=colour, alpha=0.5)
        ends = np.nan_to_num([[mean - low], [high - mean]])
        axes.errorbar([mean], [place], xerr=ends, color=colour, marker=marker or "o", capsize=2)
    axes.set_yticks(np.arange(len(optimizers)), optimizers)
    axes.set_ylim(len(optimizers) - 0.4, -0.6)
