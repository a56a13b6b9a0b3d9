"""Tuned optimizers against each other: test performance and final training loss over seeds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.analysis.tables import name_in
from ngeval.errors import InputError, nearest_name
from ngeval.plots.names import SIDE, name_text
from ngeval.plots.style import COLUMN, PAGE, in_style, own_axes, styles_of
from ngeval.plots.ticks import log_scale
from studies.training_results import FIGURES, outcomes, performance


def performance_figure(rows: pd.DataFrame, *, width: float | None = None) -> Figure:
    """Two panels for each task: test performance, and training loss after the last epoch.

    Each panel is `plot_performance`.

    Args:
        rows: of trainings, one for each epoch, of one task or several.
        width: of the figure in inches; None takes a page's.

    Raises:
        InputError: the table lacks a column, or no final training in it finished.
    """
    table, ended = _results(rows)
    counts = table.groupby("task", sort=False).size()
    heights = [0.65 + 0.17 * count for count in counts]
    with in_style():
        figure, grid = plt.subplots(
            len(counts),
            2,
            figsize=(width or PAGE, 0.1 + sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for task, (left, right) in zip(counts.index, grid, strict=True):
            _panel(table, ended, str(task), None, left)
            left.set_title(name_text(task, 60), loc="left")
            _panel(table, ended, str(task), "train_loss", right)
            right.tick_params(labelleft=False)
    return figure


def plot_performance(
    rows: pd.DataFrame, task: str | None = None, what: str | None = None, ax: Axes | None = None
) -> Axes:
    """How well tuned optimizers did on a task, in the order of the rows.

    Means over seeds with 95 % t-intervals, each seed a small point below its mean. An optimizer
    whose trainings all diverged is named, without a point. Training losses, if all are positive,
    have a logarithmic axis; an interval that reaches 0 or below, as one of two seeds may, ends in
    an arrow at the edge.

    Args:
        rows: of trainings, one for each epoch.
        task: its name; None takes the first.
        what: ``train_loss``, ``test_loss`` or ``test_accuracy``; None takes the task's metric.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table lacks a column, the task or these numbers, or no final training in it
            finished.
    """
    table, ended = _results(rows)
    task = name_in(table, "task", task)
    count = int((table["task"] == task).sum())
    with own_axes(ax, (COLUMN, 0.6 + 0.2 * count)) as axes:
        _panel(table, ended, task, what, axes)
    return axes


def _results(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of `performance`, and the trainings that it is computed from."""
    table, ended = performance(rows), outcomes(rows)
    if ended.empty:
        raise InputError(
            "the table has no final training that finished, so there is nothing to draw"
        )
    return table, ended


def _panel(
    table: pd.DataFrame, ended: pd.DataFrame, task: str, what: str | None, axes: Axes
) -> None:
    """One task's results in one number."""
    part, seeds = table[table["task"] == task], ended[ended["task"] == task]
    metric, data = part["metric"].iloc[0], name_text(part["data"].iloc[0] or "test")
    what = metric if what is None else what
    if what not in FIGURES:
        raise InputError(f"unknown figure {what!r}; {nearest_name(what, FIGURES)}")
    labels = {
        "test_accuracy": f"{data} accuracy (%)",
        "test_loss": f"{data} loss (nats)",
        "train_loss": "training loss after the last epoch (nats)",
    }
    styles = styles_of(table.rename(columns={"optimizer": "method"}))
    # The loss of a Gaussian without its constant may be negative.
    if what == "train_loss" and bool((seeds[what] > 0).all()):
        log_scale(axes, "x")
    _draw(axes, part, seeds, what, styles, 100.0 if what == "test_accuracy" else 1.0)
    axes.set_xlabel(labels[what])


def _draw(
    axes: Axes,
    table: pd.DataFrame,
    seeds: pd.DataFrame,
    name: str,
    styles: dict[str, tuple[str, str, str]],
    scale: float,
) -> None:
    """A mean with its interval and the seeds for each optimizer, the first on top."""
    optimizers = [str(optimizer) for optimizer in table["optimizer"]]
    ends = scale * table[[f"{name}_{end}" for end in ("mean", "low", "high")]].to_numpy(dtype=float)
    ends = np.where(np.isnan(ends), ends[:, :1], ends)  # one seed has no interval
    is_log = axes.get_xscale() == "log"
    for place, (optimizer, (mean, low, high)) in enumerate(zip(optimizers, ends, strict=True)):
        colour, marker, _ = styles[optimizer]
        single = scale * seeds.loc[seeds["optimizer"] == optimizer, name].to_numpy(dtype=float)
        below = np.full(len(single), place + 0.28)
        axes.plot(single, below, ".", color=colour, markersize=2.5, alpha=0.5)
        is_cut = is_log and low <= 0
        if is_cut:  # an arrow to the edge, whatever the limits will be
            across = axes.get_yaxis_transform()
            axes.plot([mean, high], [place, place], color=colour, linewidth=0.8)
            axes.annotate(
                "",
                (0.0, place),
                (mean, place),
                xycoords=across,
                textcoords="data",
                arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.8, "shrinkA": 0},
            )
        axes.errorbar(
            [mean],
            [place],
            xerr=[[0.0 if is_cut else mean - low], [high - mean]],
            color=colour,
            marker=marker or "o",
            elinewidth=0.8,
        )
    axes.set_yticks(np.arange(len(optimizers)), [name_text(name, SIDE) for name in optimizers])
    axes.set_ylim(len(optimizers) - 0.4, -0.6)
