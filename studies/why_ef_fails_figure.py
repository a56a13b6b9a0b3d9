"""The figure of *why EF fails*: six panels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ngeval.plots.style import PAGE, in_style, legend_below
from ngeval.plots.ticks import log_scale, number_text
from studies.drawing import draw_line, keep_to_lines, style_of
from studies.statistics import geometric_intervals
from studies.toy.least_squares import LeastSquares
from studies.toy.picture import plot_paths
from studies.why_ef_fails_findings import SMALL, near_zero, usable

SHOWN = ("ef", "sf", "ief", "sgd")


def figure(rows: pd.DataFrame) -> Figure:
    """The toy; what updates do to samples; γ against the imbalance, the stage and λ."""
    parts = {name: rows[rows["part"] == name] for name in ("toy", "gamma", "samples")}
    with in_style():
        drawn, grid = plt.subplots(2, 3, figsize=(PAGE, 5.3), layout="constrained")
        plot_paths(LeastSquares(), parts["toy"], ax=grid[0, 0])
        last = parts["samples"]["epoch"].max()
        samples = parts["samples"][parts["samples"]["epoch"] == last]
        _plot_falls(samples, grid[0, 1])
        _plot_projections(samples, grid[0, 2])
        _plot_imbalance(near_zero(parts["gamma"]), grid[1, 0])
        _plot_stages(near_zero(parts["gamma"]), grid[1, 1])
        _plot_dampings(parts["gamma"], grid[1, 2])
        legend_below(*grid.flat)
    return drawn


def _plot_falls(samples: pd.DataFrame, axes: Axes) -> None:
    """How much each sample's loss falls, over the mean, against s_n."""
    for method, rows in _by_method(samples):
        fall = -rows["loss_change"] / -rows["loss_change"].mean()
        _points(axes, method, rows["residual_square"], fall.where(fall > 0))
    low, high = samples["residual_square"].min(), samples["residual_square"].max()
    mean = samples.drop_duplicates("sample")["residual_square"].mean()
    axes.plot([low, high], [low / mean, high / mean], color="black", linewidth=0.7, zorder=0)
    _logarithmic(axes)
    axes.set_ylim(bottom=max(low / mean / 10, 1e-12))
    axes.set_xlabel("sₙ = ‖uₙ‖² (small: learnt)")
    axes.set_ylabel("first-order fall of ℓₙ\nover its mean")
    axes.set_title(f"epoch {samples['epoch'].iloc[0]:g}\nline: in proportion to sₙ")


def _plot_projections(samples: pd.DataFrame, axes: Axes) -> None:
    """How far each update goes along a sample's gradient, over the median, against ‖g_n‖."""
    for method, rows in _by_method(samples):
        length = rows["projection"].abs()
        _points(axes, method, rows["gradient_norm"], length / length.median())
    single = samples.drop_duplicates("sample")["gradient_norm"]
    ends = np.array([single.min(), single.max()])
    axes.plot(ends, single.median() / ends, color="black", linewidth=0.7, zorder=0)
    _logarithmic(axes)
    axes.set_xlabel("gradient norm ‖gₙ‖ (nats)")
    axes.set_ylabel("projection of d on gₙ\nover its median")
    axes.set_title(f"epoch {samples['epoch'].iloc[0]:g}\nline: 1/‖gₙ‖")


def _plot_imbalance(near: pd.DataFrame, axes: Axes) -> None:
    for method, rows in _by_method(near):
        if method != "sgd":
            _points(axes, method, rows["imbalance"], rows["gamma_over_sgd"])
    axes.axhline(1, color="black", linewidth=1, label="sgd")
    _logarithmic(axes)
    axes.set_xlabel("imbalance max‖gₙ‖ / min‖gₙ‖")
    axes.set_ylabel("γ relative to SGD")
    axes.set_title(f"λ = {number_text(SMALL)}\nevery checkpoint and batch")


def _plot_stages(near: pd.DataFrame, axes: Axes) -> None:
    for method, rows in _by_method(near):
        if method != "sgd":
            _line(axes, method, rows, "epoch")
    axes.axhline(1, color="black", linewidth=1)
    log_scale(axes, "y")
    keep_to_lines(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training epoch")
    axes.set_ylabel("γ relative to SGD")
    axes.set_title(f"λ = {number_text(SMALL)}\nbands: 95 %")


def _plot_dampings(gammas: pd.DataFrame, axes: Axes) -> None:
    last = gammas["epoch"].max()
    for method, rows in _by_method(usable(gammas[gammas["epoch"] == last])):
        if method != "sgd":
            _line(axes, method, rows, "damping")
    axes.axhline(1, color="black", linewidth=1)
    _logarithmic(axes)
    keep_to_lines(axes)
    axes.set_xlabel("damping λ (absolute)")
    axes.set_ylabel("γ relative to SGD")
    axes.set_title(f"epoch {last:g}\nbands: 95 %")


def _by_method(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, rows[rows["method"] == name]) for name in SHOWN]


def _points(axes: Axes, method: str, x: pd.Series[float], y: pd.Series[float]) -> None:
    colour, marker, _ = style_of(method)
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker or ".",
        markersize=2.5,
        linestyle="none",
        alpha=0.6,
        label=method if method != "sgd" else None,
    )


def _line(axes: Axes, method: str, rows: pd.DataFrame, x: str) -> None:
    """Geometric means over trainings and batches with their interval."""
    colour, marker, dash = style_of(method)
    intervals = geometric_intervals(rows, x, "gamma_over_sgd")
    draw_line(axes, intervals, colour, marker=marker, dash=dash, label=method)


def _logarithmic(axes: Axes) -> None:
    log_scale(axes, "x", "y")
