"""What pictures share: settings, colours, stages of training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ngeval.errors import InputError, OutputError

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

_FAMILIES = {  # colour by where the labels come from, marker and first dash by the structure
    "sgd": ("#000000", "", 0),
    "ef": ("#D55E00", "o", 0),
    "ief": ("#0072B2", "s", 0),
    "sf": ("#009E73", "^", 0),
    "ng": ("#CC79A7", "D", 0),
    "diag": ("#E69F00", "v", 0),
    "diag-ef": ("#56B4E9", "P", 0),
    "block-ng": ("#CC79A7", "d", 2),
    "kfac": ("#CC79A7", "*", 1),
    "kfac-ef": ("#D55E00", "*", 1),
    "kfac-ief": ("#0072B2", "*", 1),
    "kfac-sf": ("#009E73", "*", 1),
    "ekfac": ("#CC79A7", "p", 3),
    "ekfac-ef": ("#D55E00", "p", 2),
    "ekfac-ief": ("#0072B2", "p", 2),
    "ekfac-sf": ("#009E73", "p", 2),
}
_OTHERS = ("#7F7F7F", "#8C564B", "#17BECF", "#BCBD22", "#9467BD")
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


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure."""
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def number_text(value: float) -> str:
    """A number for a title: a power of ten where it is one, as text that can be searched."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    if value and float(mantissa) == 1 and abs(int(exponent)) > 2:
        return "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}"


def plain_ticks(axis: Axis) -> None:
    """Numbers in place of powers of ten on a logarithmic axis of under a decade and a half."""
    low, high = axis.get_view_interval()
    if high / low >= 30:
        return
    close = high / low < 12
    axis.set_major_locator(
        LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if close else (1.0, 2.0, 5.0))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
    """Add ``x``: the epoch or step, where every checkpoint tells it, else its place in the list."""
    if (told := _told(table)) is not None:
        return table.assign(x=table[told])
    order = {name: i for i, name in enumerate(dict.fromkeys(table["checkpoint"]))}
    return table.assign(x=table["checkpoint"].map(order))


def stage_label(rows: pd.DataFrame) -> str:
    """What the axis of ``x`` is called."""
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


def checkpoint_title(table: pd.DataFrame, name: str) -> str:
    """A checkpoint's epoch or step, or else its name."""
    rows = table[table["checkpoint"] == name]
    told = _told(rows)
    return str(name) if told is None or rows.empty else f"{told} {rows[told].iloc[0]:g}"


def styles_of(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash of each method; variants of a family share its colour."""
    seen: dict[str, int] = {}
    styles = {}
    for method in dict.fromkeys(table["method"].astype(str)):
        family = method.partition(":")[0]
        others = (_OTHERS[len(seen) % len(_OTHERS)], "X", 0)
        colour, marker, first = _FAMILIES.get(family, others)
        styles[method] = (colour, marker, _DASHES[(first + seen.get(family, 0)) % len(_DASHES)])
        seen[family] = seen.get(family, 0) + 1
    return styles


def legend_below(*axes: Axes) -> None:
    """One legend for several axes, below the figure; a label that comes twice is shown once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    axes[0].figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=3
    )
