"""The figure of *fadam*: six panels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.plots.style import PAGE, in_style, legend_under
from ngeval.plots.ticks import log_scale
from studies.drawing import draw_line, keep_to_lines, style_of
from studies.fadam_findings import (
    CLAIMS,
    FORMS,
    ROOT,
    TEXT,
    empirical_ratios,
    final,
    power_ratios,
    powers,
    ratio,
    subjects,
)
from studies.statistics import Interval, geometric_interval, mean_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00")
MARKERS = ("o", "s", "^", "D")
"""Styles of models and forms; those of methods are `style_of`'s."""

SHORT = {"continuous regression": "continuous", "discrete regression": "discrete"}
NAMES = {"momentum": "SGD with momentum", "adamw": "AdamW", "fadam": "FAdam"}


def figure(rows: pd.DataFrame) -> Figure:
    """Losses, ablations and exponents; γ over exponents, the two forms of a regression."""
    with in_style():
        drawn, grid = plt.subplots(3, 2, figsize=(PAGE, 7.4), layout="constrained")
        _plot_better(rows, grid[0, 0])
        _plot_ablation(rows, grid[0, 1])
        _plot_powers(rows, grid[1, 0])
        _plot_power_graded(rows, grid[1, 1])
        _plot_forms(rows, grid[2, 0])
        _plot_empirical(rows, grid[2, 1])
    return drawn


def _plot_better(rows: pd.DataFrame, axes: Axes) -> None:
    """FAdam's loss over AdamW's."""
    names = subjects(rows, "fadam")
    ratios = [ratio(final(rows, name, "fadam"), final(rows, name, "adamw")) for name in names]
    _points(axes, ratios, list(range(len(names))), *style_of("fadam")[:2])
    axes.set_yticks(range(len(names)), [SHORT.get(name, name) for name in names])
    axes.invert_yaxis()
    _against_one(axes, "test loss of FAdam over AdamW's")
    axes.set_title("left of 1: FAdam is better")


def _plot_ablation(rows: pd.DataFrame, axes: Axes) -> None:
    """The loss without each correction over that with all."""
    names = [name for name in CLAIMS if name in set(rows["without"])]
    for index, subject in enumerate(subjects(rows, "fadam", names[0])):
        whole = final(rows, subject, "fadam")
        ratios = [ratio(final(rows, subject, "fadam", name), whole) for name in names]
        ratios.append(ratio(final(rows, subject, "adamw"), whole))
        heights = [place + 0.22 * index - 0.11 for place in range(len(ratios))]
        _points(axes, ratios, heights, COLOURS[index], MARKERS[index], subject)
    axes.set_yticks(range(len(names) + 1), [*(f"no {name}" for name in names), "none (AdamW)"])
    axes.invert_yaxis()
    _against_one(axes, "test loss over FAdam's")
    legend_under(axes, 2)
    axes.set_title("less one correction (right of 1: it helps)")


def _plot_powers(rows: pd.DataFrame, axes: Axes) -> None:
    """The text's loss for every ρ, and AdamW's."""
    by_power = {rho: mean_interval(losses) for rho, losses in powers(rows).items()}
    colour, marker, _ = style_of("fadam")
    draw_line(axes, by_power, colour, marker=marker, label="FAdam")
    adam = mean_interval(final(rows, TEXT, "adamw"))
    colour, _, _ = style_of("adamw")
    axes.axhline(adam.value, color=colour, linestyle="--", label="AdamW")
    axes.axhspan(adam.low, adam.high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(ROOT, color="black", linewidth=0.7)
    axes.set_xlabel("exponent ρ of the Fisher")
    axes.set_ylabel("test loss (nats per character)")
    legend_under(axes, 2)
    axes.set_title(f"{TEXT}, tuned for each ρ")


def _plot_power_graded(rows: pd.DataFrame, axes: Axes) -> None:
    """γ for every ρ over that at ½."""
    for family, method, label in (
        ("fisher", "fadam", "f of FAdam's state"),
        ("diag-ef", "diag-ef", "f = Σₙ gₙ² of the batch"),
    ):
        colour, marker, _ = style_of(method)
        draw_line(axes, power_ratios(rows, family), colour, marker=marker, label=label)
    axes.axvline(ROOT, color="black", linewidth=0.7)
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xlabel("exponent ρ of the diagonal")
    axes.set_ylabel("γ of g/f^ρ\nover that at ρ = ½")
    legend_under(axes, 2)
    axes.set_title(f"{TEXT}, along training (less is better)")


def _plot_forms(rows: pd.DataFrame, axes: Axes) -> None:
    """The KL divergence that each optimizer leaves, in either form."""
    for index, (optimizer, label) in enumerate(NAMES.items()):
        losses = [geometric_interval(final(rows, form, optimizer)) for form in FORMS]
        colour, marker, _ = style_of(optimizer)
        values, low, high = np.array(losses).T
        axes.errorbar(
            [place + 0.12 * (index - 1) for place in range(len(FORMS))],
            values,
            yerr=np.abs([values - low, high - values]),
            color=colour,
            marker=marker,
            linestyle="none",
            label=label,
        )
    axes.set_xticks(range(len(FORMS)), [SHORT[form] for form in FORMS])
    axes.set_xlim(-0.5, len(FORMS) - 0.5)
    log_scale(axes, "y")
    axes.set_xlabel("outputs of one regression")
    axes.set_ylabel("test KL from the truth (nats)")
    legend_under(axes, 2)
    axes.set_title("all tuned")


def _plot_empirical(rows: pd.DataFrame, axes: Axes) -> None:
    """γ of the empirical diagonal over the exact one's, along training."""
    for index, form in enumerate(FORMS):
        for power, label, dash in ((":0.5", "ρ = ½", "-"), ("", "ρ = 1", "--")):
            table = empirical_ratios(rows, form, power)
            by_step = {float(step): mean_interval(table[step]).exp() for step in table.columns}
            draw_line(
                axes,
                by_step,
                COLOURS[index],
                marker=MARKERS[index],
                dash=dash,
                label=f"{SHORT[form]}, {label}",
            )
    axes.axhline(1, color="black", linewidth=0.7)
    log_scale(axes, "y")
    keep_to_lines(axes)
    axes.set_xlabel("training step of Adam")
    axes.set_ylabel("γ, empirical over exact diagonal")
    legend_under(axes, 2)
    axes.set_title("what taking the data's labels costs")


def _points(
    axes: Axes,
    ratios: list[Interval],
    heights: list[float],
    colour: str,
    marker: str,
    label: str | None = None,
) -> None:
    """Ratios as points with their intervals, one below the other."""
    points = np.array(ratios)
    finite = np.isfinite(points[:, 0])  # an optimizer that diverged has no point
    values, low, high = points[finite].T
    axes.errorbar(
        values,
        np.array(heights)[finite],
        xerr=np.nan_to_num(np.abs([values - low, high - values])),
        color=colour,
        marker=marker,
        linestyle="none",
        label=label,
    )


def _against_one(axes: Axes, label: str) -> None:
    axes.axvline(1, color="black", linewidth=0.7)
    axes.set_xlabel(label)
