"""Pictures of result tables: every function draws on an ``ax`` that is given, or makes one.

Colours are Okabe and Ito's, which colour-blind readers tell apart; each method keeps its colour
and marker in every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ngeval.errors import InputError, OutputError, nearest_name
from ngeval.evaluate import check_dampings
from ngeval.summary import SUMMARIZED, summarize

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
"""matplotlib settings that every picture of ngeval is drawn with."""

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
"""What `save_figure` writes."""

_FAMILIES = {  # colour, marker
    "sgd": ("#000000", ""),
    "ef": ("#D55E00", "o"),
    "ief": ("#0072B2", "s"),
    "sf": ("#009E73", "^"),
    "ng": ("#CC79A7", "D"),
    "diag": ("#E69F00", "v"),
    "diag-ef": ("#56B4E9", "P"),
}
_OTHERS = ("#7F7F7F", "#8C564B", "#17BECF", "#BCBD22", "#9467BD")
_DASHES = ("-", "--", ":", "-.")


def plot_stages(table: pd.DataFrame, damping: float | None = None, ax: Axes | None = None) -> Axes:
    """γ/γ_SGD of every method against the training stage.

    The line is the geometric mean over batches, the band its 95 % bootstrap interval; below 1 is
    closer to the natural gradient than SGD.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval gamma``'s output).
        damping: which λ, as given; None takes the smallest positive one in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns, or nothing at that damping.
    """
    table = _usable(table, "checkpoint")
    damping = _chosen_damping(table, damping)
    rows = _with_stage(table[np.isclose(table["damping"], damping, rtol=1e-6, atol=0)])
    axes = _axes(ax, (4.2, 3.2))
    summary = summarize(rows, ("x", "method"))
    styles = _styles(table)
    for method in _drawn_methods(summary):
        part = summary[summary["method"] == method].sort_values("x")
        _line_with_band(axes, part, "x", styles[method], method)
    _ratio_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(_stage_label(rows))
    axes.set_title(f"damping λ = {_number(damping)} ({_scale_of(table)})")
    axes.legend(ncols=2)
    return axes


def plot_damping(
    table: pd.DataFrame, checkpoint: str | None = None, ax: Axes | None = None
) -> Axes:
    """γ/γ_SGD of every method against λ at one checkpoint, with the floor as a dashed line.

    λ = 0 has no place on a logarithmic axis and is left out.

    Args:
        table: rows of `ngeval.evaluate` at many dampings (``ngeval sweep``'s output).
        checkpoint: which one; None takes the first in the table.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns, or no such checkpoint.
    """
    table = _usable(table)
    if "checkpoint" in table:
        names = list(dict.fromkeys(table["checkpoint"].astype(str)))
        checkpoint = names[0] if checkpoint is None else checkpoint
        table = table[table["checkpoint"] == checkpoint]
        if table.empty:
            raise InputError(
                f"no rows for checkpoint {checkpoint!r}; {nearest_name(checkpoint, names)}"
            )
    rows = table[table["damping"] > 0]
    if rows.empty:
        raise InputError("the only damping is 0, which has no place on a logarithmic axis")
    axes = _axes(ax, (4.2, 3.2))
    summary = summarize(rows, ("method", "damping"))
    styles = _styles(table)
    for method in _drawn_methods(summary):
        part = summary[summary["method"] == method].sort_values("damping")
        single = len(part) == 1  # a line through one point would not be seen
        _line_with_band(axes, part, "damping", styles[method], method, markers=single)
    floor = float(summary["floor_over_sgd"].median())
    axes.axhline(floor, color="#555555", linestyle="--", linewidth=1, label="floor")
    axes.set_xscale("log")
    _ratio_axis(axes)
    axes.set_xlabel(f"damping λ ({_scale_of(table)})")
    axes.legend(ncols=2)
    return axes


def plot_imbalance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Per-sample gradient norms against the training stage: quantiles, and max/min on the right.

    Args:
        table: ``ngeval imbalance``'s output, one row for each sample.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the table has not the columns.
    """
    _require(table, "checkpoint", "gradient_norm")
    rows = _with_stage(table)
    axes = _axes(ax, (4.6, 3.2))
    quantiles = rows.groupby("x")["gradient_norm"].quantile(
        np.array([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    )
    by_stage = quantiles.unstack()
    x = by_stage.index.to_numpy(dtype=float)
    blue, orange = "#0072B2", "#D55E00"
    for low, high, alpha, label in ((0.05, 0.95, 0.2, "5–95 %"), (0.25, 0.75, 0.35, "25–75 %")):
        axes.fill_between(
            x, by_stage[low], by_stage[high], color=blue, alpha=alpha, linewidth=0, label=label
        )
    axes.plot(x, by_stage[0.5], color=blue, label="median")
    for edge in (0.0, 1.0):
        text = "min, max" if edge == 0 else None
        axes.plot(x, by_stage[edge], color=blue, linewidth=0.8, linestyle=":", label=text)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(_stage_label(rows))
    axes.set_ylabel("per-sample gradient norm ‖gₙ‖ (nats)")
    right = axes.twinx()
    keys = [key for key in ("x", "batch") if key in rows]
    extremes = rows.groupby(keys)["gradient_norm"].agg(["min", "max"])
    ratio = (extremes["max"] / extremes["min"].where(extremes["min"] > 0)).groupby("x").median()
    right.plot(ratio.index, ratio, color=orange, marker="o", label="max/min")
    right.set_yscale("log")
    right.set_ylabel("imbalance max‖gₙ‖ / min‖gₙ‖", color=orange)
    right.tick_params(axis="y", colors=orange)
    right.spines["right"].set(visible=True, color=orange)
    right.grid(visible=False)
    _legend_below(axes, right)
    return axes


def stages_figure(table: pd.DataFrame, dampings: Sequence[float] | None = None) -> Figure:
    """One panel of `plot_stages` for each damping (default: the smallest positive one)."""
    chosen = [None] if dampings is None else list(dampings)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(chosen), figsize=(4.2 * len(chosen), 3.4), squeeze=False, layout="constrained"
        )
        for ax, damping in zip(axes[0], chosen, strict=True):
            plot_stages(table, damping, ax)
    return figure


def damping_figure(table: pd.DataFrame, checkpoints: Sequence[str] | None = None) -> Figure:
    """One panel of `plot_damping` for each checkpoint; more than four are thinned out evenly."""
    names = list(dict.fromkeys(table["checkpoint"])) if "checkpoint" in table else [None]
    if checkpoints is not None:
        names = list(checkpoints)
    if len(names) > 4:
        names = [names[round(i * (len(names) - 1) / 3)] for i in range(4)]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(names),
            figsize=(3.6 * len(names), 3.4),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for index, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
            plot_damping(table, name, ax)
            if name is not None:
                ax.set_title(_checkpoint_title(table, name))
            if index:
                ax.set_ylabel("")
            ax.get_legend().remove()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def imbalance_figure(table: pd.DataFrame) -> Figure:
    """`plot_imbalance` in a figure of its own."""
    with mpl.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
        plot_imbalance(table, ax)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure with ngeval's style and close it.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with mpl.rc_context(STYLE):
            figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def _number(value: float) -> str:
    """A number for a title: a power of ten where it is one, as text that can be searched."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    if value and float(mantissa) == 1 and abs(int(exponent)) > 2:
        return "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}"


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(
            f"the table has no column {', '.join(missing)}; this picture needs another result "
            "file (gamma and sweep make γ tables, imbalance makes norms of samples)"
        )


def _usable(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows of a γ table that could be computed."""
    _require(table, *columns, "method", "damping", "status", *SUMMARIZED)
    usable = table[table["status"] == "ok"]
    if usable.empty:
        raise InputError("no row of the table has status 'ok', so there is nothing to draw")
    return usable


def _chosen_damping(table: pd.DataFrame, damping: float | None) -> float:
    present = np.sort(table["damping"].unique())
    if damping is None:
        positive = present[present > 0]
        return float(positive[0] if len(positive) else present[0])
    check_dampings([damping])
    nearest = float(present[np.argmin(np.abs(np.log((present + 1e-300) / (damping + 1e-300))))])
    if not np.isclose(nearest, damping, rtol=0.5, atol=0):
        raise InputError(f"no rows near damping {damping:g}; the nearest is {nearest:g}")
    return nearest


def _with_stage(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``x``: the epoch or step, where every checkpoint tells it, else its place in the list."""
    if (told := _told(table)) is not None:
        return table.assign(x=table[told])
    order = {name: i for i, name in enumerate(dict.fromkeys(table["checkpoint"]))}
    return table.assign(x=table["checkpoint"].map(order))


def _stage_label(rows: pd.DataFrame) -> str:
    told = _told(rows)
    return "checkpoint (in order)" if told is None else f"training {told}"


def _told(rows: pd.DataFrame) -> str | None:
    """Whether all checkpoints tell the epoch, or else the step, each its own (as one run's do)."""
    single = rows.drop_duplicates("checkpoint")
    columns = (name for name in ("epoch", "step") if name in rows)
    return next(
        (name for name in columns if bool(single[name].notna().all() and single[name].is_unique)),
        None,
    )


def _checkpoint_title(table: pd.DataFrame, name: str) -> str:
    rows = table[table["checkpoint"] == name]
    told = _told(rows)
    return str(name) if told is None or rows.empty else f"{told} {rows[told].iloc[0]:g}"


def _scale_of(table: pd.DataFrame) -> str:
    return str(table["damping_scale"].iloc[0]) if "damping_scale" in table else "absolute"


def _drawn_methods(summary: pd.DataFrame) -> list[str]:
    """The methods in the order of the table; SGD is the line at 1."""
    return [method for method in dict.fromkeys(summary["method"]) if method != "sgd"]


def _styles(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each method; variants of a family share its colour."""
    seen: dict[str, int] = {}
    styles = {}
    for method in dict.fromkeys(table["method"].astype(str)):
        family = method.partition(":")[0]
        colour, marker = _FAMILIES.get(family, (_OTHERS[len(seen) % len(_OTHERS)], "X"))
        styles[method] = (colour, marker, _DASHES[seen.get(family, 0) % len(_DASHES)])
        seen[family] = seen.get(family, 0) + 1
    return styles


def _line_with_band(
    axes: Axes,
    part: pd.DataFrame,
    x: str,
    style: tuple[str, str, str],
    label: str,
    markers: bool = True,
) -> None:
    colour, marker, dash = style
    axes.plot(
        part[x],
        part["gamma_over_sgd_geomean"],
        color=colour,
        linestyle=dash,
        marker=marker if markers else "",
        label=label,
    )
    axes.fill_between(
        part[x].to_numpy(dtype=float),
        part["gamma_over_sgd_geomean_low"].to_numpy(dtype=float),
        part["gamma_over_sgd_geomean_high"].to_numpy(dtype=float),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )


def _ratio_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=1, label="sgd")
    low, high = axes.get_ylim()
    if high / low < 30:  # under a decade and a half, plain numbers read better than powers
        close = high / low < 5
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if close else (1.0, 2.0, 5.0))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("γ relative to SGD (lower: closer to NG)")


def _legend_below(*axes: Axes) -> None:
    handles, labels = [], []
    for ax in axes:
        more_handles, more_labels = ax.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3)
