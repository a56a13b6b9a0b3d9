"""What pictures share: settings, colours, stages of training, files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ngeval.analysis.ranking import numbers
from ngeval.errors import InputError, OutputError
from ngeval.plots.names import name_text
from ngeval.utils.text import whole_or_short

STYLE: dict[Any, Any] = dict(
    mpl.rc_params_from_file(Path(__file__).with_name("ngeval.mplstyle"), use_default_template=False)
)
"""matplotlib settings that every picture of ngeval is drawn with: those of ``ngeval.mplstyle``,
which ``plt.style.use("ngeval.plots.ngeval")`` sets for pictures of one's own."""

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
    # Optimizers: SGD's kin black and grey, Adam's orange, the others what is left.
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
_NAMED_FAMILIES = {"sgd+momentum": "momentum"}  # what else a family is called
_OTHERS = tuple(  # of a user's methods; the marker tells them from the families
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
    """Ngeval's style for what is drawn within, with other settings on top where some are given.

    A notebook's backend is loaded with the first figure, and then turns on interactive mode, in
    which figures are shown; the end of ``rc_context`` alone would turn it off again.
    """
    with mpl.rc_context(STYLE | dict(settings or {})):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)


@contextmanager
def own_axes(ax: Axes | None, size: tuple[float, float] = (COLUMN, 2.6)) -> Iterator[Axes]:
    """The axes given, in the style that its owner draws in; or new ones, in ngeval's style."""
    if ax is not None:
        yield ax
        return
    with in_style():
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        yield axes
        if (legend := axes.get_legend()) is not None:
            _make_room(figure, legend)


def require(table: pd.DataFrame, *columns: str) -> None:
    """Check that a table is of the right kind.

    Raises:
        InputError: it has not the columns.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(
            f"the table has no column {', '.join(missing)}; this picture needs another result "
            "file (gamma, sweep and compare make γ tables, layers makes tables of layers, "
            "imbalance makes norms of samples)"
        )


def with_stage(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``x``: the epoch or step, where every checkpoint tells it, else its place in the list.

    Raises:
        InputError: an epoch or a step is a text.
    """
    table = numbers(table, "epoch", "step")
    if (told := _told(table)) is not None:
        return table.assign(x=table[told])
    return table.assign(x=pd.factorize(table["checkpoint"], use_na_sentinel=False)[0])


def stage_label(rows: pd.DataFrame) -> str:
    """What the axis of ``x`` is called."""
    told = _told(rows)
    return "checkpoint (in order)" if told is None else f"training {told}"


def stage_ticks(axes: Axes, x: pd.Series) -> None:
    """Whole numbers on the axis of ``x``; a single stage has one."""
    if x.nunique() == 1:
        where = float(x.iloc[0])
        axes.set_xlim(where - 1, where + 1)
        axes.set_xticks([where], [whole_or_short(where)])
        return
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _told(rows: pd.DataFrame) -> str | None:
    """Whether all checkpoints tell the epoch, or else the step, each its own (as one run's do)."""
    single = numbers(rows.drop_duplicates("checkpoint"), "epoch", "step")
    columns = (name for name in ("epoch", "step") if name in rows)
    return next(
        (name for name in columns if np.isfinite(single[name]).all() and single[name].is_unique),
        None,
    )


def checkpoint_title(table: pd.DataFrame, name: str) -> str:
    """A checkpoint's epoch or step, or else its name."""
    rows = table[table["checkpoint"] == name]
    told = _told(rows)
    if told is None or rows.empty:
        return name_text(name)
    return f"{told} {whole_or_short(rows[told].iloc[0])}"


def styles_of(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each method; variants of a family share its colour and marker.

    They are the same in every picture, also those of a user's methods, which go by their names
    (two of a table that would get the same ones are told apart by order).
    """
    seen: dict[str, int] = {}
    taken: dict[str, int] = {}
    styles = {}
    for method in dict.fromkeys(table["method"].astype(str)):
        family = method.partition(":")[0]
        family = _NAMED_FAMILIES.get(family, family)
        if family not in _FAMILIES and family not in taken:
            place = zlib.crc32(family.encode()) % len(_OTHERS)
            while place in taken.values() and len(taken) < len(_OTHERS):
                place = (place + 1) % len(_OTHERS)
            taken[family] = place
        colour, marker, first = _FAMILIES.get(family) or _OTHERS[taken[family]]
        styles[method] = (colour, marker, _DASHES[(first + seen.get(family, 0)) % len(_DASHES)])
        seen[family] = seen.get(family, 0) + 1
    return styles


def panels(
    count: int, width: float | None, height: float, *, least: float = 1.6, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Panels of one picture, side by side as far as they are wide enough, the rest below.

    Args:
        count: of panels.
        width: of the figure in inches; None takes a column for one panel, else a page.
        height: of a panel in inches.
        least: width that a panel needs.
        options: of ``plt.subplots``.
    """
    width = width or (COLUMN if count == 1 else PAGE)
    columns = min(count, max(1, int(width / least)))
    lines = -(-count // columns)
    columns = -(-count // lines)  # no line with one panel where two could have two
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(width, height * lines + 0.4),
        squeeze=False,
        layout="constrained",
        **options,
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def label_outer(grid: Sequence[Axes]) -> None:
    """Numbers and names of axes only where no panel of `panels` stands below or to the left."""
    for index, axes in enumerate(grid):
        spec, name = axes.get_subplotspec(), axes.get_xlabel()
        axes.label_outer()
        if spec is not None and index + spec.get_gridspec().ncols >= len(grid):
            axes.set_xlabel(name)
            axes.tick_params(labelbottom=True)


def keep_to_lines(axes: Axes) -> None:
    """Cut a logarithmic axis at ten times what its lines need: bands of few values go on forever.

    The limits still hold every line; a band that goes on leaves the panel at its edge.
    """
    low, high = axes.get_ylim()
    drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()]).astype(float)
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    axes.set_ylim(max(low, drawn.min() / 10), min(high, drawn.max() * 10))


def legend_below(*axes: Axes) -> None:
    """One legend for several axes, below the figure; a label that comes twice is shown once.

    It has as many columns as the figure is wide enough for; where it has many lines, the figure
    grows for them.
    """
    entries: dict[tuple[str, Any], Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            # Two long names may have the same end; the same method has the same look.
            look = to_hex(handle.get_color()) if isinstance(handle, Line2D) else None
            entries.setdefault((label, look), handle)
    if not entries:
        return
    figure: Any = axes[0].figure
    labels, handles = [label for label, _ in entries], list(entries.values())
    for lines in _line_counts(len(entries)):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=-(-len(entries) // lines)
        )
        if legend.get_window_extent().width <= figure.bbox.width or lines == len(entries):
            _make_room(figure, legend)
            return
        legend.remove()


def _line_counts(entries: int) -> Iterator[int]:
    """Lines of a legend, from one to one for each entry; those that make other columns."""
    columns = [-(-entries // lines) for lines in range(1, entries + 1)]
    yield from (columns.index(count) + 1 for count in dict.fromkeys(columns))


def _make_room(figure: Figure, legend: Legend) -> None:
    """Let a figure grow by what its legend takes beyond `LEGEND`: panels keep their size."""
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


def without_legend(axes: Axes) -> None:
    """Take the panel's own legend away, where the figure has one for all."""
    if (legend := axes.get_legend()) is not None:
        legend.remove()
