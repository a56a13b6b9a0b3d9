"""Rows of a result table as a report needs them: columns of one kind each, none twice, by run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.summary import SUMMARIZED
from ngeval.analysis.training_results import checked_rows
from ngeval.errors import InputError
from ngeval.report.wording import listed

GAMMAS, SAMPLES, LAYERS, TRAINING = "gammas", "samples", "layers", "training"
"""Kinds of tables."""

NUMERIC = (
    *("gradient_norm", "damping", "decrease_share", "curvature_share", "excess"),
    *("num_parameters", "gamma_ng_lower", "gamma_ng_upper", "gamma_min", "epoch", "step"),
    *("loss", *SUMMARIZED),
)
"""Columns of numbers, where a table has them."""

TEXTS = ("method", "status", "layer", "damping_scale", "likelihood", "dtype", "engine")
"""Columns of text."""

LABELS = ("batch", "sample", "seed", "num_samples", "metric_samples")
"""Columns that are numbers as a rule, and are shown as text where they are not."""

IDENTITY: dict[str, tuple[str, ...]] = {
    GAMMAS: ("checkpoint", "batch", "method", "damping"),
    SAMPLES: ("checkpoint", "batch", "sample"),
    LAYERS: ("checkpoint", "batch", "method", "damping", "layer"),
    TRAINING: ("optimizer", "phase", "trial", "seed", "epoch"),
}
"""What tells one row of a kind from the next, within a task."""

COUNTS = {"num_samples", "metric_samples", "num_parameters"}
"""Columns that are 0 in rows of a unit that could not be had."""

SETTINGS = ("damping_scale", "likelihood", "dtype", "num_parameters")
"""What rows must share to be means of one run; a layer has its own number of parameters."""

OF_BATCHES = ("num_samples", "metric_samples", "seed")
"""Likewise, but that one batch may have other than the next."""

LEFT_OUT = "left out"
"""The status of rows that are ok in the file, and whose numbers cannot be used."""


def checked(table: pd.DataFrame, kind: str, name: str, task: str) -> pd.DataFrame:
    """A table whose columns are what they are taken for; what a single table has not is filled.

    Args:
        table: as it was read.
        kind: of it.
        name: of the file, for messages.
        task: where the table does not tell it.

    Raises:
        InputError: a column of numbers holds something else, or a row does not tell its λ or batch.
    """
    if kind == TRAINING:
        return checked_rows(table, name)
    columns: dict[str, Any] = {
        column: _numbers(table[column], column, name) for column in NUMERIC if column in table
    }
    columns |= {column: _texts(table[column]) for column in TEXTS if column in table}
    columns |= {column: _labels(table[column]) for column in LABELS if column in table}
    for column, default in (("task", task), ("checkpoint", ""), ("reason", ""), ("status", "ok")):
        if column not in table:
            columns[column] = default
        elif column != "status":
            columns[column] = _texts(table[column], default)
    columns["batch"] = _batches(columns.get("batch"), name)
    if "num_samples" in columns:  # of a unit that could not be had nothing is known
        lost = (table["status"] == "failed") & (columns["num_samples"] == 0)
        for column in COUNTS & columns.keys():
            columns[column] = np.where(lost, np.nan, columns[column])
    return _judged(table.assign(**columns), kind, name)


def _numbers(column: pd.Series, label: str, name: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce")
    wrong = column[values.isna() & column.notna()]
    if not wrong.empty:
        raise InputError(
            f"{name}: column {label} holds {wrong.iloc[0]!r} in row {wrong.index[0]}, which is no "
            "number"
        )
    return values.to_numpy(dtype=float, na_value=np.nan)


def _texts(column: pd.Series, missing: str = "") -> pd.Series:
    if not isinstance(column.dtype, pd.StringDtype):
        column = _as_text(column)
    return column.fillna(missing)


def _as_text(column: pd.Series) -> pd.Series:
    """Also of lists and mappings, which JSON may hold; what is missing stays so."""
    plain = column.astype(object)
    return plain.where(plain.notna(), None).map(str, na_action="ignore").astype("str")


def _labels(column: pd.Series) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce")
    if values.isna().equals(column.isna()):
        return values if values.dtype.kind in "iu" else values.astype(float)
    return _as_text(column)


def _batches(given: pd.Series | None, name: str) -> pd.Series | int:
    if given is None or given.isna().all():
        return 0
    if given.isna().any():
        row = given.index[given.isna()][0]
        raise InputError(f"{name}: column batch is empty in row {row}; number the batches there")
    return given


def _judged(table: pd.DataFrame, kind: str, name: str) -> pd.DataFrame:
    """Rows that are ok, and whose numbers cannot be used, get a status and a reason of their own.

    Raises:
        InputError: a row that could be computed does not tell its λ.
    """
    ok = table["status"] == "ok" if kind == GAMMAS else table["status"] != "failed"
    if kind == LAYERS:
        finite = np.isfinite(table[["decrease_share", "curvature_share", "excess"]]).all(axis=1)
        wrong = {"a share is NaN or infinite": pd.Series(~finite)}
    else:
        told, column = ("γ/γ_SGD", "gamma_over_sgd")
        if kind == SAMPLES:
            told, column = ("the gradient's norm", "gradient_norm")
        values = table[column]
        wrong = {f"{told} is NaN": values.isna(), f"{told} is infinite": values.abs() == np.inf}
        if kind == SAMPLES:
            wrong[f"{told} is negative"] = (values < 0) & (values > -np.inf)
        else:
            wrong[f"{told} is not positive"] = (values <= 0) & (values > -np.inf)
    status, reason = table["status"].copy(), table["reason"].copy()
    for why, mask in wrong.items():
        lost = ok & mask
        if lost.any():
            more = reason[lost].map(lambda text, why=why: f"{why} ({text})" if text else why)
            status[lost], reason[lost] = LEFT_OUT, more
    table = table.assign(status=status, reason=reason)
    if kind != SAMPLES:
        lost = ok & (status != LEFT_OUT) & table["damping"].isna()
        if lost.any():
            raise InputError(
                f"{name}: column damping is empty in row {table.index[lost][0]}; write the λ there "
                "(for a method that λ does not enter, one of the others' or 0)"
            )
    return table


def single(table: pd.DataFrame, kind: str) -> tuple[pd.DataFrame, int]:
    """A checked table with each row once, and how many were repetitions."""
    keys = [key for key in ("task", *IDENTITY[kind]) if key in table]
    again = table.duplicated(keys, keep=False)
    if not again.any():
        return table, 0
    part = table[again]
    plain = [name for name in part if part[name].dtype == object]  # may hold lists
    twice = part.assign(**{str(name): part[name].map(repr) for name in plain}).duplicated()
    return table.drop(index=twice.index[twice]), int(twice.sum())


def runs(rows: pd.DataFrame, kind: str, name: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of a task in one table: rows with other settings are not means of one.

    Yields:
        The settings, where there are several, and the rows.

    Raises:
        InputError: rows of one run agree in all that tells rows apart, and differ in numbers.
    """
    by: dict[str, pd.Series] = {}
    settings = () if kind == TRAINING else SETTINGS if kind != LAYERS else SETTINGS[:-1]
    for column in (column for column in settings if column in rows):
        known = rows[column].where(rows[column] != "")
        if known.nunique() > 1:  # rows of what could not be had are of the run beside them
            by[column] = known.ffill().bfill()
    # Without numbers, batches with a seed each look like runs: then no row is told from the next.
    numbered = kind != TRAINING and rows["batch"].nunique() > 1
    for column in OF_BATCHES if kind != TRAINING else ():
        if column == "seed" and not numbered:
            continue
        if column in rows and differs_within_batches(rows, column):
            by[column] = _first_seeds(rows) if column == "seed" else rows[column]
    for key, part in rows.groupby(list(by.values()), sort=False) if by else [((), rows)]:
        _refuse_repeats(part, kind, name)
        yield ", ".join(f"{n} {_shown(v)}" for n, v in zip(by, key, strict=True)), part


def differs_within_batches(rows: pd.DataFrame, column: str) -> bool:
    """Whether one batch of one checkpoint has two values."""
    keys = ["checkpoint", "batch"]
    pairs = rows[[*keys, column]].dropna().drop_duplicates()
    return bool(pairs.duplicated(keys).any())


def _first_seeds(rows: pd.DataFrame) -> pd.Series:
    """The seed of each row's run: batch b of a run has its first seed + b, or all have one."""
    seeds, batches = rows["seed"], rows["batch"]
    if not (pd.api.types.is_numeric_dtype(seeds) and pd.api.types.is_numeric_dtype(batches)):
        return seeds
    first = (seeds - batches).rename("seed")
    return first if first.nunique() <= seeds.nunique() else seeds


def _shown(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refuse_repeats(rows: pd.DataFrame, kind: str, name: str) -> None:
    keys = list(IDENTITY[kind])
    if kind != TRAINING:
        rows = rows[rows["status"] != "failed"]
    again = rows[rows.duplicated(keys)]
    if again.empty:
        return
    told = listed(keys)
    row = {key: again[key].iloc[0] for key in keys}
    shown = ", ".join(f"{key} {_shown(value)!r}" for key, value in row.items() if value != "")
    mend = "keep one of them, or put each run into a file of its own"
    if kind != TRAINING:
        mend = f"if they are of several batches, number these in column batch; else {mend}"
    raise InputError(
        f"{name}: {len(again)} rows stand for one that is there already ({told} agree, the numbers "
        f"do not; the first is row {again.index[0]}: {shown}), and would count as batches; {mend}"
    )
