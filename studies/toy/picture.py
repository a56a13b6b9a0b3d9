"""Figures of least squares with two parameters: the landscape, updates and paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ngeval.analysis.tables import require
from ngeval.errors import InputError
from ngeval.plots.names import name_text
from ngeval.plots.style import (
    COLUMN,
    PAGE,
    legend_below,
    own_axes,
    panels,
    styles_of,
)
from ngeval.plots.ticks import log_scale, number_text
from studies.toy.least_squares import LeastSquares, trajectories

LANDSCAPE = LinearSegmentedColormap.from_list("landscape", ["#F8FAFC", "#BCCCDA"])
"""Light colours, so that arrows and paths stand out."""

SCALED = 0.35
"""Length of the shortest arrow in a field relative to the longest."""

MAGNIFIED = 8
"""Magnification of the panel on EF's field around the minimum."""

SAME = 1e-6
"""Two methods' updates count as the same up to this relative difference."""


@dataclass(frozen=True)
class Window:
    """A square of the (θ₁, θ₂) plane.

    Attributes:
        centre: its middle.
        radius: half of its side.
    """

    centre: tuple[float, float]
    radius: float

    @classmethod
    def around(cls, toy: LeastSquares, paths: pd.DataFrame) -> Window:
        """The window of the minimum and all starts; EF's paths may leave it."""
        starts = paths.loc[paths["step"] == 0, ["theta_1", "theta_2"]].to_numpy()
        points = np.vstack([starts, toy.minimum])
        low, high = points.min(0), points.max(0)
        first, second = ((low + high) / 2).tolist()
        if all(map(toy.is_minimum, starts)):
            return cls((first, second), 1.0)
        return cls((first, second), 0.65 * float((high - low).max()))

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The limits of θ₁ and of θ₂."""
        (first, second), radius = self.centre, self.radius
        return (first - radius, first + radius), (second - radius, second + radius)

    def magnified(self, toy: LeastSquares) -> Window:
        """The small window around the minimum, where the lines of per-sample optima cross."""
        first, second = toy.minimum.tolist()
        return Window((first, second), self.radius / MAGNIFIED)

    def grid(self, count: int) -> NDArray[np.float64]:
        """The centres of ``count × count`` cells, shape ``(count, count, 2)``."""
        half = self.radius / count
        axes = (np.linspace(low + half, high - half, count) for low, high in self.limits)
        return np.stack(np.meshgrid(*axes), -1)

    def holds(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """A mask of the points ``(M, 2)`` inside the window."""
        return np.asarray((np.abs(points - np.array(self.centre)) <= self.radius).all(1))


@dataclass(frozen=True)
class Field:
    """Updates of a method on a grid of points.

    Attributes:
        points: shape ``(M, 2)``.
        updates: d at each, shape ``(M, 2)``; a step is −η d.
        cell: distance between neighbouring points.
    """

    points: NDArray[np.float64]
    updates: NDArray[np.float64]
    cell: float

    @classmethod
    def of(
        cls,
        toy: LeastSquares,
        methods: Sequence[str],
        window: Window,
        arrows: int,
        damping: float,
        seed: int,
    ) -> dict[str, Field]:
        """Fields by method at ``arrows × arrows`` points, except where a sample is fitted.

        There EF has a pole, and the pseudo-inverse of EF and iEF at λ = 0 is discontinuous.
        """
        points = window.grid(arrows).reshape(-1, 2)
        residuals = np.abs(toy.residuals(points))
        points = points[residuals.min(1) > 1e-9 * residuals.max()]
        cell = 2 * window.radius / arrows
        fields = toy.all_updates(methods, points, damping, seed)
        return {
            name: cls(points, updates, cell) for name, updates in zip(methods, fields, strict=True)
        }

    def is_like(self, other: Field) -> bool:
        """Whether the updates are the same up to rounding."""
        return self.updates.shape == other.updates.shape and bool(
            np.abs(self.updates - other.updates).max() <= SAME * np.abs(other.updates).max()
        )


def plot_toy(
    toy: LeastSquares,
    method: str,
    *,
    paths: pd.DataFrame | None = None,
    damping: float = 0.0,
    window: Window | None = None,
    arrows: int = 13,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """One method on the loss landscape: its steps at every point, and its paths.

    Arrows point along −d; their lengths increase with log‖d‖. A sample is fitted on each of the
    lines, and the star is the minimum.

    Args:
        toy: the problem.
        method: the name of a method of ngeval.
        paths: table of `trajectories` with rows of the method; default: with the learning rate and
            the starts of ``toy``.
        damping: λ of the arrows, and of the default paths.
        window: the limits of the axes; default: around the minimum and the starts.
        arrows: number of arrows in a row and in a column.
        seed: for a method that draws labels.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: the method is unknown, or not in the paths.

    Example:
        >>> from studies.toy.least_squares import LeastSquares
        >>> plot_toy(LeastSquares(), "ief", arrows=3).get_xlabel()
        'θ₁'
    """
    if paths is None:
        rates = {method: toy.rate(method)}
        paths = pd.concat(trajectories(toy, rates, damping=damping, seed=seed), ignore_index=True)
    require(paths, "method", "start", "step", "theta_1", "theta_2", "learning_rate")
    paths = paths[paths["method"] == method]
    if paths.empty:
        raise InputError(f"the paths have no rows of {method!r}")
    window = window or Window.around(toy, paths)
    field = Field.of(toy, [method], window, arrows, damping, seed)[method]
    with own_axes(ax, (COLUMN, COLUMN)) as axes:
        _draw(axes, toy, field, paths, window)
        axes.set_title(_title([method], paths, window))
        if ax is None:
            legend_below(axes)
    return axes


def plot_paths(
    toy: LeastSquares, paths: pd.DataFrame, *, window: Window | None = None, ax: Axes | None = None
) -> Axes:
    """The paths of several methods on one landscape.

    Args:
        toy: the problem.
        paths: table of `trajectories`.
        window: the limits of the axes; default: around the minimum and the starts.
        ax: where to draw; None makes a figure.
    """
    require(paths, "method", "start", "step", "theta_1", "theta_2")
    window = window or Window.around(toy, paths)
    with own_axes(ax, (COLUMN, COLUMN)) as axes:
        _ground(axes, toy, window)
        _paths(axes, paths, several=True)
        axes.set_title("two parameters, two data")
        if ax is None:
            legend_below(axes)
    return axes


def toy_figure(
    toy: LeastSquares | None = None,
    paths: pd.DataFrame | None = None,
    *,
    damping: float = 0.0,
    arrows: int = 13,
    seed: int = 0,
) -> Figure:
    """A panel for each method, EF's field enlarged around the minimum, and losses along the paths.

    Titles name the methods whose updates are the same, such as iEF and the natural gradient at
    λ = 0.

    Args:
        toy: the problem; default: the example of `LeastSquares`.
        paths: table of `trajectories`; default: of its default methods.
        damping: λ of the arrows, and of the default paths.
        arrows: number of arrows in a row and in a column of each field.
        seed: for methods that draw labels.
    """
    toy = toy or LeastSquares()
    if paths is None:
        paths = pd.concat(trajectories(toy, damping=damping, seed=seed), ignore_index=True)
    methods = list(dict.fromkeys(paths["method"]))
    window = Window.around(toy, paths)
    fields = Field.of(toy, methods, window, arrows, damping, seed)
    enlarged = "ef" in fields
    count = len(methods) + 1 + enlarged
    with panels(count, PAGE, 2.25, least=2.2, shared=False) as (figure, axes):
        rest = iter(axes)
        for name, ax in zip(methods, rest, strict=False):
            rows = paths[paths["method"] == name]
            _draw(ax, toy, fields[name], rows, window)
            ax.set_title(_title(_same_updates(name, fields), rows, window))
        if enlarged:
            small = window.magnified(toy)
            _mark(axes[methods.index("ef")], small)
            ax = next(rest)
            field = Field.of(toy, ["ef"], small, arrows, damping, seed)["ef"]
            _draw(ax, toy, field, paths[paths["method"] == "ef"], small)
            ax.set_title(f"ef, {MAGNIFIED} times enlarged")
        _losses(axes[-1], paths)
        legend_below(*axes[:-1])
    return figure


def _same_updates(method: str, fields: Mapping[str, Field]) -> list[str]:
    """The method, and those with the same updates."""
    others = [n for n, field in fields.items() if n != method and field.is_like(fields[method])]
    return [method, *others]


def _title(methods: list[str], paths: pd.DataFrame, window: Window) -> str:
    """Methods, learning rate, and the number of points of the paths outside the window."""
    rate = float(f"{paths['learning_rate'].iloc[0]:.2g}")
    outside = int((~window.holds(paths[["theta_1", "theta_2"]].to_numpy())).sum())
    steps = f"; {outside} steps outside" if outside else ""
    return f"{' = '.join(map(name_text, methods))}, η = {number_text(rate)}{steps}"


def _draw(axes: Axes, toy: LeastSquares, field: Field, paths: pd.DataFrame, window: Window) -> None:
    _ground(axes, toy, window)
    _arrows(axes, field)
    _paths(axes, paths)


def _ground(axes: Axes, toy: LeastSquares, window: Window) -> None:
    """The loss as filled contours, the two lines of per-sample optima, and the minimum."""
    first, second = np.meshgrid(*(np.linspace(*ends, 150) for ends in window.limits))
    loss = toy.loss(np.stack([first, second], -1))
    levels = np.concatenate([[0.0], np.geomspace(loss.max() / 1e3, loss.max() * 1.001, 10)])
    colours = LANDSCAPE(np.linspace(0, 1, len(levels) - 1))
    axes.contourf(first, second, loss, levels=levels, colors=colours)
    for number, (along, dash) in enumerate(zip(toy.optima, ("--", ":"), strict=True), 1):
        axes.axline(
            tuple(toy.minimum),
            tuple(toy.minimum + along),
            color="black",
            linestyle=dash,
            linewidth=1,
            label=f"datum {number} is fitted",
        )
    axes.plot(
        *toy.minimum,
        marker="*",
        color="#F0E442",
        markeredgecolor="black",
        markeredgewidth=0.6,
        markersize=9,
        linestyle="none",
        label="minimum",
        zorder=6,
    )
    axes.set_xlim(*window.limits[0])
    axes.set_ylim(*window.limits[1])
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_xlabel("θ₁")
    axes.set_ylabel("θ₂")


def _arrows(axes: Axes, field: Field) -> None:
    """Along −d, of lengths between `SCALED` and 1 in units of a cell, in proportion to log‖d‖."""
    sizes = np.linalg.norm(field.updates, axis=1)
    moving = sizes > 0
    points, sizes = field.points[moving], sizes[moving]
    if not len(points):
        return
    logs = np.log(sizes)
    spread = logs.max() - logs.min()
    share = (logs - logs.min()) / spread if spread > 0 else np.ones_like(logs)
    length = 0.9 * field.cell * (SCALED + (1 - SCALED) * share)
    along = -field.updates[moving] * (length / sizes)[:, None]
    axes.quiver(
        *points.T,
        *along.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        pivot="mid",
        color="#5F6B76",
        width=0.005,
        headwidth=4,
        headlength=4.5,
        headaxislength=4,
        zorder=3,
    )


def _paths(axes: Axes, paths: pd.DataFrame, *, several: bool = False) -> None:
    """The paths in the methods' colours, with a ring at each start.

    Paths that oscillate are thin, with a marker at every point. Among several methods the natural
    gradient's path is a broad band, which does not hide that of iEF.
    """
    styles = styles_of(paths)
    for method, rows in paths.groupby("method", sort=False):
        colour, marker, _ = styles[str(method)]
        lines = [
            path.sort_values("step")[["theta_1", "theta_2"]].to_numpy()
            for _, path in rows.groupby("start")
        ]
        oscillates = any(map(_oscillates, lines))
        band = several and method == "ng"
        for number, theta in enumerate(lines):
            axes.plot(
                *theta.T,
                color=colour,
                marker=(marker or ".") if oscillates else "",
                markersize=1.8,
                linewidth=0.6 if oscillates else 3.5 if band else 1.4,
                alpha=0.45 if band else 1,
                label=name_text(method) if number == 0 else None,
                zorder=4,
            )
            axes.plot(
                *theta[0], "o", color="white", markeredgecolor=colour, markersize=4.5, zorder=5
            )


def _oscillates(theta: NDArray[np.float64]) -> bool:
    """Whether a path reverses at more than a tenth of its steps."""
    steps = np.diff(theta, axis=0)
    return bool(((steps[1:] * steps[:-1]).sum(1) < 0).mean() > 0.1) if len(steps) > 1 else False


def _mark(axes: Axes, window: Window) -> None:
    """The outline of the window that another panel enlarges."""
    (left, right), (bottom, top) = window.limits
    axes.add_patch(
        Rectangle((left, bottom), right - left, top - bottom, fill=False, linewidth=1.1, zorder=6)
    )


def _losses(axes: Axes, paths: pd.DataFrame) -> None:
    """L at every step: the geometric mean over the starts."""
    styles = styles_of(paths)
    for method, rows in paths.groupby("method", sort=False):
        colour, _, dash = styles[str(method)]
        losses = rows.pivot_table(index="step", columns="start", values="loss")
        band = method == "ng"  # does not hide the line of iEF
        axes.plot(
            losses.index,
            np.exp(np.log(losses.where(losses > 0)).mean(axis=1)),
            color=colour,
            linestyle=dash,
            linewidth=3.5 if band else 1.4,
            alpha=0.45 if band else 1,
        )
    log_scale(axes, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("L (nats)")
    axes.set_title("loss, geometric mean over starts")
