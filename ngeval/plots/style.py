"""What pictures share: settings, colours, lines, the axis of stages, panels, legends, files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ngeval.analysis.stages import stage_column
from ngeval.analysis.tables import numbers
from ngeval.errors import OutputError
from ngeval.utils.text import whole_or_short

STYLE: dict[Any, Any] = dict(
    mpl.rc_params_from_file(Path(__file__).with_name("ngeval.mplstyle"), use_default_template=False)
)
"""matplotlib settings that every picture of ngeval is drawn with: those of ``ngeval.mplstyle``,
which ``plt.style.use("ngeval.plots.ngeval")`` sets for other pictures."""

COLUMN, PAGE = 3.4, 7.0
"""Widths in inches of a column and of a page of a paper."""

LEGEND = 0.6
"""Height in inches that figures have for their legends without growing: four lines of names."""

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
"""What `save_figure` writes."""

_BLACK, _GREY, _BLUE, _RED = "#000000", "#777777", "#0072B2", "#D55E00"
_GREEN, _PURPLE, _ORANGE, _SKY = "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

_FAMILIES = {  # colour, marker and first dash; there are more families than colours
    # Colour by where the labels come from, marker and dash by the structure.
    "sgd": (_BLACK, "", 0),
    "ef": (_RED, "o", 0),
    "ief": (_BLUE, "s", 0),
    "sf": (_GREEN, "^", 0),
    "ng": (_PURPLE, "D", 0),
    "block-ng": (_PURPLE, "d", 2),
    "diag": (_ORANGE, "v", 0),
    "diag-ef": (_SKY, "P", 0),
    "diag-ief": (_BLUE, "P", 2),
    "diag-sf": (_GREEN, "P", 2),
    "diag-ema": (_ORANGE, "P", 2),
    "kfac": (_PURPLE, "*", 1),
    "kfac-ef": (_RED, "*", 1),
    "kfac-ief": (_BLUE, "*", 1),
    "kfac-sf": (_GREEN, "*", 1),
    "ekfac": (_PURPLE, "p", 3),
    "ekfac-ef": (_RED, "p", 2),
    "ekfac-ief": (_BLUE, "p", 2),
    "ekfac-sf": (_GREEN, "p", 2),
    # Optimizers: variants of SGD black and grey, of Adam orange, the others the rest.
    "momentum": (_BLACK, "X", 1),
    "nesterov": (_BLACK, "h", 2),
    "asgd": (_BLACK, "<", 3),
    "rprop": (_GREY, "<", 2),
    "adam": (_ORANGE, "<", 1),
    "adamw": (_ORANGE, "X", 0),
    "nadam": (_ORANGE, "h", 2),
    "radam": (_ORANGE, "d", 3),
    "adamax": (_ORANGE, "H", 1),
    "fadam": (_PURPLE, ">", 0),
    "adafactor": (_SKY, "h", 0),
    "muon": (_GREY, "H", 0),
    "adagrad": (_GREY, "d", 1),
    "adadelta": (_SKY, ">", 2),
    "rmsprop": (_SKY, "<", 1),
}
_SYNONYMS = {"sgd+momentum": "momentum"}
_OTHERS = tuple(  # of users' methods, which the marker distinguishes from the families
    (colour, "8", dash) for dash in (1, 3) for colour in (_GREY, _SKY, _ORANGE, _GREEN, _PURPLE)
)
_DASHES = ("-", "--", ":", "-.")


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


@contextmanager
def in_style(settings: Mapping[Any, Any] | None = None) -> Iterator[None]:
    """Draw in ngeval's style, with some other settings on top.

    A notebook's backend is loaded with the first figure, and then turns on interactive mode, in
    which figures are shown. ``rc_context`` alone would turn it off again.
    """
    with mpl.rc_context(STYLE | dict(settings or {})):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)


@contextmanager
def own_axes(ax: Axes | None, size: tuple[float, float] = (COLUMN, 2.6)) -> Iterator[Axes]:
    """The given axes, in the style that the caller has set; or new ones, in ngeval's style."""
    if ax is not None:
        yield ax
        return
    with in_style():
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        yield axes
        if (legend := axes.get_legend()) is not None:
            _make_room(figure, legend)


def with_stage(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``x``: the epoch or step if every checkpoint has one, else its place in the list.

    Raises:
        InputError: an epoch or a step is text.
    """
    table = numbers(table, "epoch", "step")
    if (column := stage_column(table)) is not None:
        return table.assign(x=table[column])
    return table.assign(x=pd.factorize(table["checkpoint"], use_na_sentinel=False)[0])


def stage_label(rows: pd.DataFrame) -> str:
    """The label of the axis of ``x``."""
    column = stage_column(rows)
    return "checkpoint (in order)" if column is None else f"training {column}"


def stage_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Label the axis of ``x``, and put whole numbers on it, only one for a single stage."""
    axes.set_xlabel(stage_label(rows))
    if rows["x"].nunique() == 1:
        where = float(rows["x"].iloc[0])
        axes.set_xlim(where - 1, where + 1)
        axes.set_xticks([where], [whole_or_short(where)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def styles_of(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each method; variants of a family share its colour and marker.

    They are the same in every picture. A user's method gets them by its name; if two of a table
    would get the same, the second gets the next.
    """
    seen: dict[str, int] = {}
    taken: dict[str, int] = {}
    styles = {}
    for method in dict.fromkeys(table["method"].astype(str)):
        family = method.partition(":")[0]
        family = _SYNONYMS.get(family, family)
        if family not in _FAMILIES and family not in taken:
            place = zlib.crc32(family.encode()) % len(_OTHERS)
            while place in taken.values() and len(taken) < len(_OTHERS):
                place = (place + 1) % len(_OTHERS)
            taken[family] = place
        colour, marker, first = _FAMILIES.get(family) or _OTHERS[taken[family]]
        styles[method] = (colour, marker, _DASHES[(first + seen.get(family, 0)) % len(_DASHES)])
        seen[family] = seen.get(family, 0) + 1
    return styles


@contextmanager
def panels(
    count: int, width: float | None, height: float, *, least: float = 1.6, shared: bool = True
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels of one picture in ngeval's style, in lines as long as panels are wide enough.

    Args:
        count: of panels.
        width: of the figure in inches; None takes a column for one panel, else a page.
        height: of a panel in inches.
        least: width that a panel needs, in inches.
        shared: whether the panels have the same limits and one legend.
    """
    width = width or (COLUMN if count == 1 else PAGE)
    columns = min(count, max(1, int(width / least)))
    lines = -(-count // columns)
    columns = -(-count // lines)  # no line with one panel where two could have two
    with in_style():
        figure, grid = plt.subplots(
            lines,
            columns,
            figsize=(width, height * lines + 0.4),
            sharex=shared,
            sharey=shared,
            squeeze=False,
            layout="constrained",
        )
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        drawn = list(grid.flat[:count])
        yield figure, drawn
        if shared:
            label_outer(drawn)
            legend_below(*drawn)


def label_outer(grid: Sequence[Axes]) -> None:
    """Numbers and labels of axes only where no panel of `panels` is below or to the left."""
    for index, axes in enumerate(grid):
        spec, name = axes.get_subplotspec(), axes.get_xlabel()
        axes.label_outer()
        if spec is not None and index + spec.get_gridspec().ncols >= len(grid):
            axes.set_xlabel(name)
            axes.tick_params(labelbottom=True)


def legend_below(*axes: Axes) -> None:
    """One legend below the figure in place of those of its panels; a repeated label is shown once.

    It has as many columns as the figure is wide enough for; for many lines, the figure grows.
    """
    entries: dict[tuple[str, Any], Any] = {}
    for ax in axes:
        if (legend := ax.get_legend()) is not None:
            legend.remove()
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            # Two long names may have the same end; the same method has the same look.
            look = to_hex(handle.get_color()) if isinstance(handle, Line2D) else None
            entries.setdefault((label, look), handle)
    if not entries:
        return
    figure: Any = axes[0].figure
    labels, handles = [label for label, _ in entries], list(entries.values())
    count = len(entries)
    for columns in dict.fromkeys(-(-count // lines) for lines in range(1, count + 1)):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            _make_room(figure, legend)
            return
        legend.remove()


def _make_room(figure: Figure, legend: Legend) -> None:
    """Let a figure grow by the height of its legend beyond `LEGEND`, so that panels keep theirs."""
    more = legend.get_window_extent().height / figure.dpi - LEGEND
    if more > 0:
        figure.set_figheight(figure.get_figheight() + more)


def legend_under(axes: Axes, columns: int = 4) -> None:
    """The legend of one panel, below the name of its horizontal axis, where it hides nothing."""
    size = mpl.rcParams["font.size"]
    down = ScaledTranslation(0, -4.3 * size / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=axes.transAxes + down,
        ncols=columns,
        borderaxespad=0,
    )


def draw_hollow(axes: Axes, means: pd.DataFrame, x: str, style: tuple[str, str, str]) -> None:
    """Mark points that rounding may have moved; the legend names them once."""
    if means.empty:
        return
    colour, marker, _ = style
    label = "uncertain (rounding)"
    first = label not in axes.get_legend_handles_labels()[1]
    axes.scatter(
        means[x],
        means["mean"],
        marker=marker,
        facecolors="white",
        edgecolors=colour,
        zorder=3,
        label=label if first else None,
    )


def line_with_band(
    axes: Axes,
    means: pd.DataFrame,
    x: str,
    style: tuple[str, str, str],
    label: str,
    *,
    markers: bool = True,
    band: bool = True,
) -> None:
    """Draw `ngeval.analysis.intervals.geometric_means` against the column ``x``.

    The style is colour, marker and dash. A line of many points is easier to follow without markers.
    """
    means = means.sort_values(x)
    colour, marker, dash = style
    axes.plot(
        means[x],
        means["mean"],
        color=colour,
        linestyle=dash,
        marker=marker if markers else "",
        label=label,
    )
    if band:
        x_values, low, high = means[[x, "low", "high"]].to_numpy(dtype=float).T
        axes.fill_between(x_values, low, high, color=colour, alpha=0.18, linewidth=0)
