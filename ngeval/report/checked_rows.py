"""Rows of a result table as a report needs them: one type a column, each row once, run by run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.tables import (
    ANY,
    GAMMAS,
    LABEL,
    LAYERS,
    NUMBER,
    SAMPLES,
    SUMMARIZED,
    checked,
    require,
    row_number,
)
from ngeval.errors import InputError
from ngeval.report.wording import listed, plain

SHARES = ("decrease_share", "curvature_share", "excess")

REQUIRED: dict[str, tuple[str, ...]] = {
    GAMMAS: ("method", "damping", "status", *SUMMARIZED),
    SAMPLES: ("sample", "gradient_norm"),
    LAYERS: ("method", "damping", "layer", "num_parameters", *SHARES, "status"),
}
"""The columns that a table of each kind must have."""

COLUMNS = {
    **dict.fromkeys(("gradient_norm", "loss", "damping", "num_parameters", "gamma_min"), NUMBER),
    **dict.fromkeys(("gamma_ng_lower", "gamma_ng_upper", "epoch", "step"), NUMBER),
    **dict.fromkeys((*SHARES, *SUMMARIZED), NUMBER),
    **dict.fromkeys(("task", "checkpoint", "method", "layer", "status"), ANY),
    **dict.fromkeys(("reason", "note"), ANY),
    **dict.fromkeys(("damping_scale", "likelihood", "dtype", "engine"), ANY),
    **dict.fromkeys(("batch", "sample", "seed", "num_samples", "metric_samples"), LABEL),
}
"""What the columns may hold."""

IDENTITY: dict[str, tuple[str, ...]] = {
    GAMMAS: ("checkpoint", "batch", "method", "damping"),
    SAMPLES: ("checkpoint", "batch", "sample"),
    LAYERS: ("checkpoint", "batch", "method", "damping", "layer"),
}
"""The columns that distinguish the rows of a kind within a task."""

SETTINGS = {
    GAMMAS: ("damping_scale", "likelihood", "dtype", "num_parameters"),
    SAMPLES: ("damping_scale", "likelihood", "dtype", "num_parameters"),
    LAYERS: ("damping_scale", "likelihood", "dtype"),  # a layer has its own number of parameters
}
"""The columns that rows must share to be of one run."""

OF_BATCHES = ("num_samples", "metric_samples", "seed")
"""Likewise, except that they may differ from one batch to the next."""

LEFT_OUT = "left out"
"""The status of rows that are ok in the file, but whose numbers cannot be used."""


def clean(table: pd.DataFrame, kind: str, source: str, task: str) -> pd.DataFrame:
    """A table with one type for each column, in which missing columns are filled.

    Messages name the source; the task is that of rows that do not name one.
    """
    require(table, *REQUIRED[kind], source=source)
    defaults = {"task": task, "status": "ok", "reason": "", "note": "", "checkpoint": ""}
    table = table.assign(**{k: v for k, v in (defaults | {"batch": 0}).items() if k not in table})
    table = checked(table, COLUMNS, source)
    if table["batch"].isna().all():
        table["batch"] = 0
    _refuse_empty(table, "batch", table["batch"].isna(), source, "number the batches there")
    table["task"] = table["task"].where(table["task"] != "", task)
    if "num_samples" in table:  # nothing is known of a unit that could not be loaded
        unknown = (table["status"] == "failed") & (table["num_samples"] == 0)
        for column in {"num_samples", "metric_samples", "num_parameters"} & {*table}:
            table[column] = table[column].mask(unknown)
    # Files of version 0.1 have no notes: the reason of a good row is one.
    is_note = (table["status"] == "ok") & (table["note"] == "")
    table["note"] = table["note"].mask(is_note, table["reason"])
    table["reason"] = table["reason"].mask(is_note, "")
    table = _without_unusable(table, kind)
    if kind != SAMPLES:
        usable = ~table["status"].isin({"failed", LEFT_OUT})
        advice = "write the λ there (for a method that λ does not enter, 0 or one of the others')"
        _refuse_empty(table, "damping", usable & table["damping"].isna(), source, advice)
    return table


def _refuse_empty(
    table: pd.DataFrame, column: str, empty: pd.Series[bool], source: str, advice: str
) -> None:
    if empty.any():
        row = row_number(table.index, int(np.argmax(empty)))
        raise InputError(f"{source}: column {column} is empty in row {row}; {advice}")


def _without_unusable(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The table with a status and a reason for rows whose numbers cannot be used."""
    tests: dict[str, Any]
    if kind == LAYERS:
        tests = {"a share is NaN or infinite": ~np.isfinite(table[[*SHARES]]).all(axis=1)}
    else:
        is_gamma = kind == GAMMAS
        name = "γ/γ_SGD" if is_gamma else "the gradient's norm"
        values = table["gamma_over_sgd" if is_gamma else "gradient_norm"]
        tests = {f"{name} is NaN": values.isna(), f"{name} is infinite": values.abs() == np.inf}
        too_small = values <= 0 if is_gamma else values < 0
        tests[f"{name} is {'not positive' if is_gamma else 'negative'}"] = too_small
    unusable = pd.Series(np.select(list(tests.values()), list(tests), ""), index=table.index)
    ok = table["status"] == "ok" if kind == GAMMAS else table["status"] != "failed"
    lost = ok & (unusable != "")
    return table.assign(
        status=table["status"].mask(lost, LEFT_OUT), reason=table["reason"].mask(lost, unusable)
    )


def single(table: pd.DataFrame, kind: str) -> tuple[pd.DataFrame, int]:
    """A clean table with each row once, and the number of repetitions that were dropped."""
    keys = [key for key in ("task", *IDENTITY[kind]) if key in table]
    again = table.duplicated(keys, keep=False)
    if not again.any():
        return table, 0
    part = table[again]
    plain = [name for name in part if part[name].dtype == object]  # may hold lists
    twice = part.assign(**{str(name): part[name].map(repr) for name in plain}).duplicated()
    return table.drop(index=twice.index[twice]), int(twice.sum())


def runs(rows: pd.DataFrame, kind: str, source: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of a task in one table, each with its settings if there are several.

    Rows with different settings are not batches of one run; rows of one run with the same identity
    and different numbers are refused.
    """
    by: dict[str, pd.Series] = {}
    for column in (column for column in SETTINGS[kind] if column in rows):
        known = rows[column].where(rows[column] != "")
        if known.nunique() > 1:  # a unit that could not be loaded is of the run beside it
            by[column] = known.ffill().bfill()
    # Without numbers, batches with a seed each would look like runs.
    numbered = rows["batch"].nunique() > 1
    for column in (name for name in OF_BATCHES if name in rows and (numbered or name != "seed")):
        if differs_within_batches(rows, column):
            by[column] = _first_seeds(rows) if column == "seed" else rows[column]
    for key, part in rows.groupby(list(by.values()), sort=False) if by else [((), rows)]:
        _refuse_repeats(part, kind, source)
        yield ", ".join(f"{n} {plain(v)}" for n, v in zip(by, key, strict=True)), part


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


def _refuse_repeats(rows: pd.DataFrame, kind: str, source: str) -> None:
    keys = list(IDENTITY[kind])
    rows = rows[rows["status"] != "failed"]
    again = rows[rows.duplicated(keys)]
    if again.empty:
        return
    row = {key: again[key].iloc[0] for key in keys}
    shown = ", ".join(f"{key} {plain(value)!r}" for key, value in row.items() if value != "")
    raise InputError(
        f"{source}: {len(again)} rows repeat an earlier one with different numbers (they agree in "
        f"{listed(keys)}; the first is row {row_number(again.index, 0)}: {shown}), and would count "
        "as batches; if they are of several batches, number these in column batch; else keep one "
        "of them, or put each run into its own file"
    )
