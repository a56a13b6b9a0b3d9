"""Whether two computations of a unit agree: the same rows and texts, and close numbers.

How close depends on the dtype, see `DIGITS`, and on the Krylov run, which stops when its bounds
are within a gap: its γ is compared within that gap, and its update, in which γ is stationary,
within the square root. The new rows decide which numbers come from a Krylov run: a file that could
claim so itself would be compared loosely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from ngeval.results.journal import Key

DIGITS = {
    name: math.sqrt(torch.finfo(getattr(torch, name)).eps)
    for name in ("float64", "float32", "bfloat16", "float16")
}
"""The relative difference that rounding explains, by the rows' dtype: √ε, half the digits (1.5e-8
in float64, 3.5e-4 in float32). Other processors, threads and ranks add in a different order, and a
small damping amplifies that; a wrong seed, batch or formula changes more."""

UNKNOWN_DTYPE = "float32"
"""The dtype by which tables without a column ``dtype`` (those of samples) are compared."""

MAX_GAP = 1e-2
"""The largest gap that is allowed for, whatever a manifest claims."""

NATURAL = ("gamma_min", "gamma_over_ng", "gamma_ng_lower", "gamma_ng_upper")
"""Columns that come from a Krylov run, in every row."""

GAMMAS = (*NATURAL, "gamma", "gamma_over_sgd")

NOT_RESULTS = ("engine", "reason", "note", "iterations", "rank")
"""Columns about how a row was computed, which may change with the memory of a machine; so may the
estimates of errors."""

SUMMANDS = ("decrease", "curvature", "decrease_share", "curvature_share", "excess", "loss_change_")
"""Terms of a sum, which may cancel: compared relative to the largest of the update's layers, or of
the unit's samples."""

NOISE = ("decrease", "cosine_sgd", *SUMMANDS[2:5])
"""Columns that are pure rounding in a row whose γ is undefined."""

ROW = ("method", "damping", "layer", "sample")
"""The columns that distinguish the rows of a unit."""


@dataclass(frozen=True)
class Verdict:
    """The comparison of a unit with its rows in a file.

    Attributes:
        rows: how many there are now.
        problem: what differs that is not a number; empty if nothing does.
        difference: the difference of numbers that is largest in proportion to the allowed one;
            relative, see `SUMMANDS`.
        allowed: the difference that is allowed there.
        where: its column, method, damping, …
        note: a possible reason for a difference.
    """

    key: Key
    checkpoint: str
    rows: int
    problem: str = ""
    difference: float = 0.0
    allowed: float = 0.0
    where: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the unit equals its rows in the file."""
        return not self.problem and self.difference <= self.allowed


def compare(
    key: Key,
    checkpoint: str,
    then: pd.DataFrame,
    now: pd.DataFrame,
    tolerance: float | None,
    gap: float,
) -> Verdict:
    """Compare a unit's rows in a file, in whatever order, with those of a new computation.

    The relative difference ``tolerance`` is allowed (None: see `DIGITS`, and the error of the row
    as it is now), and what the ``gap`` of a Krylov run explains.
    """
    columns = list(dict.fromkeys([*then.columns, *now.columns]))
    order = [name for name in ROW if name in columns]
    then, now = (
        part.reindex(columns=columns).sort_values(order, key=_sortable, ignore_index=True)
        for part in (then, now)
    )
    if len(then) != len(now):
        problem = f"{len(then)} rows in the file, {len(now)} now"
        return Verdict(key, checkpoint, len(now), problem, math.inf)
    if now.empty:  # the samples of a unit that failed
        return Verdict(key, checkpoint, 0)
    results = [n for n in columns if n not in NOT_RESULTS and not n.endswith("_error")]
    numbers = [name for name in results if is_number(then[name]) and is_number(now[name])]
    problem = _texts_differ(then, now, [name for name in results if name not in numbers])
    if not numbers:
        return Verdict(key, checkpoint, len(now), problem, allowed=tolerance or 0.0)
    base = _tolerances(now, tolerance)
    differences = pd.DataFrame({name: _differences(name, then, now) for name in numbers})
    krylov = {name: _krylov_limits(name, now, min(gap, MAX_GAP)) for name in numbers}
    limits = pd.DataFrame(krylov).clip(lower=base, axis=0)
    excess = (differences / limits).where(differences > 0, 0.0)
    column = str(excess.max().idxmax())
    row = int(excess[column].to_numpy().argmax())
    worst, allowed = float(differences[column][row]), float(limits[column][row])
    where = {"column": column} | {k: _plain(now[k].iloc[row]) for k in order}
    note = _less_memory(then, now) if worst <= math.sqrt(MAX_GAP) else ""
    return Verdict(key, checkpoint, len(now), problem, worst, allowed, where, note)


def _differences(name: str, then: pd.DataFrame, now: pd.DataFrame) -> np.ndarray:
    """The relative difference of a column's numbers; ∞ where only one is NaN."""
    old, new = (part[name].to_numpy(dtype=float, na_value=math.nan) for part in (then, now))
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.fmax(np.abs(old), np.abs(new))
        if name.startswith(SUMMANDS):
            update = [then[key] for key in ("method", "damping") if key in then]
            groups = pd.Series(size).groupby(update or np.zeros(len(size)))
            size = groups.transform("max").to_numpy()
        if name.startswith("cosine_"):
            size = np.ones_like(size)
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        if name in NOISE and "status" in then:
            same |= ((then["status"] == "undefined") & (now["status"] == "undefined")).to_numpy()
        difference = np.where(same, 0.0, np.abs(old - new) / size)
    return np.nan_to_num(difference, nan=math.inf)


def _tolerances(now: pd.DataFrame, tolerance: float | None) -> np.ndarray:
    if tolerance is not None:
        return np.full(len(now), tolerance)
    kinds = now["dtype"] if "dtype" in now else pd.Series([UNKNOWN_DTYPE] * len(now))
    digits = np.array([DIGITS.get(str(kind), DIGITS[UNKNOWN_DTYPE]) for kind in kinds])
    errors = now.get("gamma_error", pd.Series(0.0, now.index)).to_numpy(dtype=float)
    allowed: np.ndarray = digits + np.nan_to_num(2 * errors).clip(0, MAX_GAP)
    return allowed


def _krylov_limits(name: str, now: pd.DataFrame, gap: float) -> np.ndarray:
    """The difference that the gap between the bounds of a Krylov run allows."""
    ran = _krylov(now)
    if name in NATURAL:
        return np.where(ran, gap, 0.0)
    natural = (now["method"] == "ng").to_numpy() if "method" in now else np.zeros_like(ran)
    return np.where(ran & natural, gap if name in GAMMAS else math.sqrt(gap), 0.0)


def _krylov(table: pd.DataFrame) -> np.ndarray:
    """The rows that come from a Krylov run."""
    if "iterations" not in table or not is_number(table["iterations"]):
        return np.zeros(len(table), dtype=bool)
    return (table["iterations"] > 0).to_numpy(dtype=bool, na_value=False)


def _less_memory(then: pd.DataFrame, now: pd.DataFrame) -> str:
    """A note where numbers that differ by a gap may have been computed with less memory."""
    if not (_krylov(then) & ~_krylov(now)).any():
        return ""
    return "of a Krylov run in the file, exact now: if it had less memory, pass a --tolerance"


def _texts_differ(then: pd.DataFrame, now: pd.DataFrame, names: Sequence[str]) -> str:
    """The first text that differs."""
    for name in names:
        old, new = (part[name].astype(object).fillna("").astype(str) for part in (then, now))
        wrong = (old != new).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            of = ", ".join(f"{key} {then[key].iloc[row]}" for key in ROW if key in then)
            return f"{name}: {old.iloc[row]!r} in the file, {new.iloc[row]!r} now ({of})"
    return ""


def _sortable(column: pd.Series[Any]) -> pd.Series[Any]:
    """A key by which any column can be sorted: a file may hold values that cannot be compared."""
    return column if is_number(column) else column.astype(str)


def is_number(column: pd.Series[Any]) -> bool:
    """Whether a column holds numbers or nothing."""
    return bool(pd.api.types.is_numeric_dtype(column) or column.isna().all())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
