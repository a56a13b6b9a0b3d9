"""The kinds of result tables, recognised by their columns, and what each column may hold.

Tables come from files that people edit, join and filter. Everything that reads one checks the
columns that it uses here, so that a wrong value is reported by column and row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ngeval.errors import InputError, nearest_name

GAMMAS, SAMPLES, LAYERS = "gammas", "samples", "layers"
"""Kinds of tables: γ of updates, gradient norms of samples, layers of updates."""

SUMMARIZED = ("gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_floor")
"""The numbers of a γ table, the first two of which make a row a grade."""

KINDS: dict[str, tuple[str, ...]] = {
    LAYERS: ("layer", "method", "decrease_share"),
    GAMMAS: ("method", "damping", "gamma"),
    SAMPLES: ("gradient_norm",),
}
"""The columns by which a kind of table is recognised; the first kind that fits is taken."""

TUNING_COLUMNS = {"optimizer", "phase", "train_loss"}
"""The columns by which rows of tuned trainings are recognised, which a study tabulates."""

MADE_BY = (
    "γ tables come from ngeval.evaluate and ngeval gamma, sweep or compare; tables of layers from "
    "ngeval.layer_table or ngeval layers; and gradient norms from ngeval imbalance"
)

Conversion = tuple[pd.Series, pd.Series]
"""The values of a column in one type, and which of them it may hold."""


@dataclass(frozen=True)
class Column:
    """What a column may hold: a conversion to one type, and a name of it for messages."""

    convert: Callable[[pd.Series], Conversion]
    expected: str


def kind_of(table: pd.DataFrame, source: str = "the table") -> str:
    """The kind of a table by its columns, a key of `KINDS`.

    Raises:
        InputError: it is not a result table of ngeval, or holds the rows of a study.
    """
    _refuse_studies(table, source)
    kind = next((kind for kind, columns in KINDS.items() if {*columns} <= {*table}), None)
    if kind is None:
        names = ", ".join(map(str, table.columns[:8])) + (", …" if len(table.columns) > 8 else "")
        raise InputError(
            f"{source} has the columns {names} and is not a result table of ngeval; {MADE_BY}"
        )
    return kind


def _refuse_studies(table: pd.DataFrame, source: str) -> None:
    if "study" in table:
        name = table["study"].iloc[0] if len(table) else ""
        raise InputError(
            f"{source} holds the rows of a study; `python -m studies {name} --from FILE`, in a "
            f"clone, draws them. {MADE_BY}"
        )
    if {*table} >= TUNING_COLUMNS:
        raise InputError(
            f"{source} holds the rows of tuned trainings, a row for each epoch; `python -m studies "
            "trained FILE`, in a clone, tabulates and draws them"
        )


def require(table: pd.DataFrame, *columns: str, source: str = "the table") -> None:
    """Check that a table has some columns.

    Raises:
        InputError: a column is missing.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        _refuse_studies(table, source)
        raise InputError(f"{source} has no column {', '.join(missing)}; {MADE_BY}")


def name_in(table: pd.DataFrame, column: str, name: str | None = None, default: int = 0) -> str:
    """A name that a column holds; for None the one in place ``default``, in order of appearance.

    Raises:
        InputError: the column does not hold the name.
    """
    if table[column].isna().any():
        raise InputError(f"the column {column} has empty cells; name every row's {column}")
    names = list(dict.fromkeys(table[column].astype(str)))
    if name is None:
        return names[default]
    if name not in names:
        raise InputError(f"no rows for {column} {name!r}; {nearest_name(name, names)}")
    return name


def checked(
    table: pd.DataFrame, columns: Mapping[str, Column], source: str = "the table"
) -> pd.DataFrame:
    """A table in which the given columns, where it has them, have one type each.

    Args:
        table: as it was read; other columns stay as they are.
        columns: what each column may hold.
        source: where the table comes from, for messages.

    Raises:
        InputError: a column holds a value that it may not.
    """
    converted = {}
    for name, column in columns.items():
        if name in table:
            values, fits = column.convert(table[name])
            _refuse(table[name], fits, column.expected, source)
            converted[name] = values
    return table.assign(**converted)


def numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """`checked` for columns of numbers."""
    return checked(table, dict.fromkeys(columns, NUMBER))


def graded(table: pd.DataFrame, status: str = "ok") -> pd.DataFrame:
    """The rows of a γ table with a status, and with finite positive γ and γ/γ_SGD.

    Only these have a logarithm, a rank and a place in a picture. Values of γ/γ_min and of the floor
    that are not possible become NaN; methods become text.

    Raises:
        InputError: a column is missing, or a column of numbers holds text.
    """
    require(table, "method", "damping", "status", *SUMMARIZED)
    rows = numbers(table[table["status"] == status], "damping", *SUMMARIZED)
    usable = _is_positive(rows["gamma"]) & _is_positive(rows["gamma_over_sgd"])
    rows = rows[usable & rows["damping"].between(0, math.inf, inclusive="left")]
    floor, least = rows["gamma_floor"], rows["gamma_over_ng"]
    return rows.assign(
        method=rows["method"].fillna("").astype(str),
        gamma_over_ng=least.where(_is_positive(least)),
        gamma_floor=floor.where(floor.between(0, math.inf, inclusive="left")),
    )


def _is_positive(values: pd.Series[float]) -> pd.Series[bool]:
    return values.between(0, math.inf, inclusive="neither")


def _number(column: pd.Series) -> Conversion:
    values = pd.to_numeric(column, errors="coerce")
    fits = values.notna() | column.isna()
    return pd.Series(values.to_numpy(float, na_value=math.nan), index=column.index), fits


def _any(column: pd.Series) -> Conversion:
    text = column if isinstance(column.dtype, pd.StringDtype) else _as_text(column)
    return text.fillna(""), pd.Series(True, index=column.index)


def _label(column: pd.Series) -> Conversion:
    fits = pd.Series(True, index=column.index)
    values = pd.to_numeric(column, errors="coerce")
    if not values.isna().equals(column.isna()):
        return _as_text(column), fits
    return values if values.dtype.kind in "iu" else values.astype(float), fits


def _as_text(column: pd.Series) -> pd.Series:
    """Also of lists and mappings, which JSON may hold; a missing value stays missing."""
    plain = column.astype(object)
    return plain.where(plain.notna(), None).map(str, na_action="ignore").astype("str")


NUMBER = Column(_number, "numbers")
"""Numbers with NaN and ∞; an empty cell becomes NaN."""

ANY = Column(_any, "text")
"""Anything, which becomes text; an empty cell becomes ""."""

LABEL = Column(_label, "text")
"""Numbers if all are numbers, else text."""


def row_number(index: pd.Index, place: int) -> int:
    """The row of a file that a row of its table was read from, counted from 1."""
    label = index[place]
    return 1 + (int(label) if isinstance(label, int | np.integer) else place)


def _refuse(column: pd.Series, fits: pd.Series[bool], expected: str, source: str) -> None:
    if fits.all():
        return
    place = int(np.flatnonzero(~fits)[0])
    value = column.tolist()[place]
    hint = " (is it a header row among the rows?)" if value == column.name else ""
    raise InputError(
        f"{source}: column {column.name} has {value!r:.60} in row "
        f"{row_number(column.index, place)}; it should hold {expected}{hint}"
    )
