"""The picture of a training run: γ over its stages, ratios of methods, imbalance of the norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval.analysis.intervals import geometric_means
from ngeval.analysis.tables import name_in
from ngeval.errors import InputError
from ngeval.plots.gamma import at_damping, plot_stages, scale_of, usable
from ngeval.plots.imbalance import plot_imbalance
from ngeval.plots.names import name_text
from ngeval.plots.style import (
    COLUMN,
    PAGE,
    in_style,
    legend_below,
    line_with_band,
    own_axes,
    stage_axis,
    styles_of,
    with_stage,
)
from ngeval.plots.ticks import log_scale, number_text

RELATIVE = (("sf", "ief"), ("ef", "ief"))
"""The ratios that are drawn if the table has their methods."""

HEIGHTS = {"stages": 1.9, "relative": 1.3, "imbalance": 1.3}
"""Of each line of panels, in inches."""


def plot_relative(
    table: pd.DataFrame,
    method: str = "sf",
    reference: str = "ief",
    damping: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """γ of one method over that of another against the training stage; below 1 it is closer to NG.

    The line is the geometric mean of the ratio within each batch, the band its 95 % bootstrap
    interval. Differences between batches cancel, so that the interval is narrower than the two of
    the methods' ratios to SGD.

    Args:
        table: rows of `ngeval.evaluate` for several checkpoints (``ngeval gamma``'s output).
        method: the numerator.
        reference: the denominator.
        damping: λ as the table has it; None takes the smallest positive one in the table.
        ax: where to draw, for example a second ratio; None makes a figure.

    Raises:
        InputError: the table lacks a column, one of the methods, or that damping.
    """
    table = usable(table, "checkpoint")
    rows, value = at_damping(table, damping)
    ratios = with_stage(_ratios(rows, method, reference))
    means = geometric_means(ratios, ["x"], "ratio")
    colour, marker, _ = styles_of(pd.DataFrame({"method": [method]}))[method]
    upper, lower = name_text(method), name_text(reference)
    with own_axes(ax, (COLUMN, 2.2)) as axes:
        line_with_band(axes, means, "x", (colour, marker, "--"), f"{upper}/{lower}")
        axes.axhline(1, color="black", linewidth=0.8)
        log_scale(axes, "y")
        stage_axis(axes, ratios)
        axes.set_ylabel(f"γ of {upper}\nover {lower}'s")
        axes.set_title(f"λ = {number_text(value)} ({scale_of(table)})")
    return axes


def _ratios(rows: pd.DataFrame, method: str, reference: str) -> pd.DataFrame:
    """One row for each checkpoint and batch in which both could be computed."""
    method, reference = (name_in(rows, "method", name) for name in (method, reference))
    keys = [key for key in ("checkpoint", "batch") if key in rows]
    stages = [key for key in ("epoch", "step") if key in rows]
    upper = rows.loc[rows["method"] == method, [*keys, *stages, "gamma"]]
    lower = rows.loc[rows["method"] == reference, [*keys, "gamma"]]
    both = upper.merge(lower, on=keys, suffixes=("", "_reference"))
    if both.empty:
        raise InputError(f"no batch in which both {method!r} and {reference!r} could be computed")
    return both.assign(ratio=both["gamma"] / both["gamma_reference"])


def stages_figure(
    gammas: pd.DataFrame | Mapping[str, pd.DataFrame],
    dampings: Sequence[float] | None = None,
    samples: pd.DataFrame | None = None,
    *,
    relative: Sequence[tuple[str, str]] | None = None,
    width: float | None = None,
) -> Figure:
    """γ/γ_SGD over training, and what explains it below; a column for each task.

    The lines of panels are: `plot_stages`; `plot_relative` of the pairs in ``relative``; and
    `plot_imbalance`, where there are samples. In the manner of the figures of Wu et al.
    (arXiv 2406.06420) on γ at training stages.

    Args:
        gammas: rows of `ngeval.evaluate` for several checkpoints, of one task or several; or
            tables by the titles of their columns.
        dampings: a column of every task for each of these λ; None takes the smallest positive one.
        samples: rows of ``ngeval imbalance`` for the same tasks and checkpoints.
        relative: pairs of methods whose γ are compared; None takes SF and EF over iEF if there are
            several tasks or samples, else none.
        width: of the figure in inches; None takes a column for one task, else a page.

    Raises:
        InputError: a table lacks a column or rows at a damping, a method of ``relative`` is not in
            any table, or no sample is of a task in ``gammas``.
    """
    if isinstance(gammas, pd.DataFrame):
        gammas = by_task({"": gammas})
    if not gammas:
        raise InputError("no tables were given, so there is nothing to draw")
    tables = {title: usable(part, "checkpoint") for title, part in gammas.items()}
    chosen: Sequence[float | None] = dampings or [None]
    columns = [(*item, damping) for item in tables.items() for damping in chosen]
    if relative is None:
        present = [set(table["method"]) for table in tables.values()]
        usual = [pair for pair in RELATIVE if any(set(pair) <= methods for methods in present)]
        relative = usual if len(tables) > 1 or samples is not None else ()
    lines = ["stages", *(["relative"] if relative else [])]
    norms = {} if samples is None else _norms(samples, tables)
    lines += ["imbalance"] if norms else []
    width = width or (COLUMN if len(columns) == 1 else PAGE)
    heights = [HEIGHTS[line] for line in lines]
    with in_style():
        figure, grid = plt.subplots(
            len(lines),
            len(columns),
            figsize=(width, sum(heights) + 0.9),
            height_ratios=heights,
            sharex="col",
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for index, (title, table, damping) in enumerate(columns):
            panel = dict(zip(lines, grid[:, index], strict=True))
            plot_stages(table, damping, panel["stages"])
            if title:
                where = panel["stages"].get_title().removeprefix("damping ")
                panel["stages"].set_title(f"{name_text(title, 60)}\n{where}")
            if relative:
                _draw_relative(table, damping, relative, panel["relative"])
            if norms:
                _draw_imbalance(norms[title], panel["imbalance"])
        for axes in grid.flat:
            axes.label_outer()
        figure.align_ylabels()
        legend_below(*grid.flat)
    return figure


def _norms(samples: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The samples of each γ table: of its task, and if tables share it, of its checkpoints."""
    norms = {}
    for title, table in tables.items():
        part, of_task = samples, list(tables.values())
        if "task" in samples and "task" in table:
            tasks = set(table["task"])
            part = samples[samples["task"].isin(tasks)]
            of_task = [t for t in of_task if "task" not in t or tasks & set(t["task"])]
        if len(of_task) > 1:
            part = part[part["checkpoint"].isin(table["checkpoint"])]
        norms[title] = part
    if all(part.empty for part in norms.values()):
        raise InputError("the samples are of other tasks or checkpoints than the γ table's")
    return norms


def tasks_of(table: pd.DataFrame) -> pd.Series[str]:
    """The task of each row; "" where none is known."""
    tasks = table["task"] if "task" in table else pd.Series("", table.index)
    return tasks.fillna("").astype(str)


def by_task(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """γ tables by title: the task, with the file's name if files share the task.

    A single table of a single task needs no title.
    """
    parts = [
        (str(task), name, part)
        for name, table in tables.items()
        for task, part in table.groupby(tasks_of(table), sort=False)
    ]
    if len(parts) == 1:
        return {"": parts[0][2]}
    tasks = [task for task, _, _ in parts]
    return {
        (f"{task} ({name})" if task and tasks.count(task) > 1 else task or name): part
        for task, name, part in parts
    }


def _draw_relative(
    table: pd.DataFrame, damping: float | None, pairs: Sequence[tuple[str, str]], axes: Axes
) -> None:
    for method, reference in pairs:
        plot_relative(table, method, reference, damping, axes)
    axes.set_title("")  # it is that of the panel above
    references = list(dict.fromkeys(reference for _, reference in pairs))
    axes.set_ylabel(
        f"γ relative\nto {name_text(references[0])}" if len(references) == 1 else "ratio of γ"
    )


def _draw_imbalance(samples: pd.DataFrame, axes: Axes) -> None:
    if samples.empty:
        axes.text(0.5, 0.5, "no samples", transform=axes.transAxes, ha="center", va="center")
        return
    plot_imbalance(samples, axes)
