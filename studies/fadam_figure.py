"""The picture of *fadam*: six panels."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.plots.style import PAGE, in_style, keep_to_lines, legend_under, styles_of
from ngeval.plots.ticks import log_scale
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
"""Of what is no method: models and forms. Methods have their own; see `styles_of`."""

SHORT = {"continuous regression": "continuous", "discrete regression": "discrete"}
NAMES = {"momentum": "SGD with momentum", "adamw": "AdamW", "fadam": "FAdam"}


def figure(rows: pd.DataFrame) -> Figure:
    """Losses, ablations and exponents; γ over exponents, the two forms of a regression."""
    with in_style():
        made, grid = plt.subplots(3, 2, figsize=(PAGE, 7.4), layout="constrained")
        _plot_better(rows, grid[0, 0])
        _plot_ablation(rows, grid[0, 1])
        _plot_powers(rows, grid[1, 0])
        _plot_power_graded(rows, grid[1, 1])
        _plot_forms(rows, grid[2, 0])
        _plot_empirical(rows, grid[2, 1])
    return made


def _plot_better(rows: pd.DataFrame, axes: Axes) -> None:
    """FAdam's loss over AdamW's."""
    names = subjects(rows, "fadam")
    found = [ratio(final(rows, name, "fadam"), final(rows, name, "adamw")) for name in names]
    _points(axes, found, list(range(len(names))), _look("fadam"))
    axes.set_yticks(range(len(names)), [SHORT.get(name, name) for name in names])
    axes.invert_yaxis()
    _against_one(axes, "test loss of FAdam over AdamW's")
    axes.set_title("left of 1: FAdam is better")


def _plot_ablation(rows: pd.DataFrame, axes: Axes) -> None:
    """The loss without each correction over that with all."""
    names = [name for name in CLAIMS if name in set(rows["without"])]
    for index, subject in enumerate(subjects(rows, "fadam", names[0])):
        whole = final(rows, subject, "fadam")
        found = [ratio(final(rows, subject, "fadam", name), whole) for name in names]
        found.append(ratio(final(rows, subject, "adamw"), whole))
        places = [place + 0.22 * index - 0.11 for place in range(len(found))]
        _points(axes, found, places, (COLOURS[index], MARKERS[index]), subject)
    axes.set_yticks(range(len(names) + 1), [*(f"no {name}" for name in names), "none (AdamW)"])
    axes.invert_yaxis()
    _against_one(axes, "test loss over FAdam's")
    legend_under(axes, 2)
    axes.set_title("less one correction (right of 1: it helps)")


def _plot_powers(rows: pd.DataFrame, axes: Axes) -> None:
    """The text's loss for every ρ, and AdamW's."""
    by_power = {rho: mean_interval(losses) for rho, losses in powers(rows).items()}
    _line(axes, by_power, _look("fadam"), "FAdam")
    adam = mean_interval(final(rows, TEXT, "adamw"))
    colour, _ = _look("adamw")
    axes.axhline(adam.value, color=colour, linestyle="--", label="AdamW")
    axes.axhspan(adam.low, adam.high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(ROOT, color="black", linewidth=0.7)
    axes.set_xlabel("exponent ρ of the Fisher")
    axes.set_ylabel("test loss (nats per character)")
    legend_under(axes, 2)
    axes.set_title(f"{TEXT}, tuned for each ρ")


def _plot_power_graded(rows: pd.DataFrame, axes: Axes) -> None:
    """γ for every ρ over that at ½."""
    labels = {"fisher": "f of FAdam's state", "diag-ef": "f = Σₙ gₙ² of the batch"}
    for (family, label), look in zip(labels.items(), ("fadam", "diag-ef"), strict=True):
        _line(axes, power_ratios(rows, family), _look(look), label)
    axes.axvline(ROOT, color="black", linewidth=0.7)
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xlabel("exponent ρ of the diagonal")
    axes.set_ylabel("γ of g/f^ρ\nover that at ρ = ½")
    legend_under(axes, 2)
    axes.set_title(f"{TEXT}, along training (less is better)")


def _plot_forms(rows: pd.DataFrame, axes: Axes) -> None:
    """What each optimizer leaves of the KL, in either form."""
    for index, (optimizer, label) in enumerate(NAMES.items()):
        found = [geometric_interval(final(rows, form, optimizer)) for form in FORMS]
        places = [place + 0.12 * (index - 1) for place in range(len(FORMS))]
        colour, marker = _look(optimizer)
        ends = np.abs(np.array([[f.value - f.low, f.high - f.value] for f in found])).T
        axes.errorbar(
            places,
            [f.value for f in found],
            yerr=ends,
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
            _line(axes, by_step, (COLOURS[index], MARKERS[index]), f"{SHORT[form]}, {label}", dash)
    axes.axhline(1, color="black", linewidth=0.7)
    log_scale(axes, "y")
    keep_to_lines(axes)
    axes.set_xlabel("training step of Adam")
    axes.set_ylabel("γ, empirical over exact diagonal")
    legend_under(axes, 2)
    axes.set_title("what taking the data's labels costs")


def _look(method: str) -> tuple[str, str]:
    """Colour and marker that the method has in every picture."""
    colour, marker, _ = styles_of(pd.DataFrame({"method": [method]}))[method]
    return colour, marker


def _points(
    axes: Axes,
    found: list[Interval],
    places: list[float],
    look: tuple[str, str],
    label: str = "",
) -> None:
    """Ratios as points with their intervals, one below the other."""
    values = np.array([[f.value, f.value - f.low, f.high - f.value] for f in found])
    shown = np.isfinite(values[:, 0])
    axes.errorbar(
        values[shown, 0],
        np.array(places)[shown],
        xerr=np.nan_to_num(np.abs(values[shown, 1:])).T,
        color=look[0],
        marker=look[1],
        linestyle="none",
        label=label or None,
    )


def _against_one(axes: Axes, label: str) -> None:
    axes.axvline(1, color="black", linewidth=0.7)
    axes.set_xlabel(label)


def _line(
    axes: Axes,
    found: Mapping[float, Interval],
    look: tuple[str, str],
    label: str,
    dash: str = "-",
) -> None:
    """Values with their intervals along an axis."""
    values, low, high = np.array(list(found.values())).T
    where = list(found)
    colour, marker = look
    axes.plot(where, values, color=colour, marker=marker, linestyle=dash, label=label)
    axes.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0)
