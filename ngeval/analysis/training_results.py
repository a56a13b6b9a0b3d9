"""How well optimizers train: their tuned settings' results over seeds, with intervals and ranks.

Made from the rows of tuned trainings, one for each epoch, in the manner of the tables of Wu et al.
(arXiv 2406.06420): test performance at the best validation epoch, and the final training loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy

from ngeval.errors import InputError

FIGURES = ("test_accuracy", "test_loss", "train_loss")
"""What has a mean and an interval, the first two at the best validation epoch, the third after
the last one."""

TEXTS: dict[str, tuple[str, ...]] = {
    "task": (),
    "optimizer": (),
    "phase": ("search", "final"),
    "monitor": ("train_loss", "validation_loss", "validation_accuracy"),
    "status": ("ok", "diverged", "failed"),
}
"""The columns of text that are needed, with what may stand there (anything, where nothing is
listed)."""

WHOLE = ("trial", "seed", "epoch")
"""The columns of whole numbers that are needed; no row lacks one."""

NUMBERS = (
    "learning_rate",
    "damping",
    "train_loss",
    *(f"{part}_{what}" for part in ("validation", "test") for what in ("loss", "accuracy")),
)
"""The columns of finite numbers that are needed, where some may be missing; ``train_accuracy`` is
one more where nothing is held out."""


def t_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of independent values, with Student's t-interval for it.

    mean ± t_{n−1} · s/√n, with s the standard deviation (n − 1 in its denominator).

    Args:
        values: n of them; NaN are left out.
        confidence: that the interval holds the mean, were the values normally distributed.

    Returns:
        Mean, low and high end; the ends of fewer than two values are NaN.
    """
    kept = np.asarray(values, dtype=float)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return math.nan, math.nan, math.nan
    mean = float(kept.mean())
    if len(kept) == 1:
        return mean, math.nan, math.nan
    # Through the package, so that scipy.stats (a second to import) is loaded when needed.
    quantile = float(scipy.stats.t.ppf(0.5 + confidence / 2, len(kept) - 1))
    half = quantile * float(kept.std(ddof=1)) / math.sqrt(len(kept))
    return mean, mean - half, mean + half


def checked_rows(rows: pd.DataFrame, source: str = "the table") -> pd.DataFrame:
    """A table's rows, once it is known that performance can be made from them.

    Args:
        rows: as they were read, also those that somebody edited.
        source: what they were read from, for messages.

    Returns:
        The rows, with columns of one kind each: texts, whole numbers, numbers with NaN where there
        are none. Columns that are not needed stay as they are.

    Raises:
        InputError: a column is missing, or holds what it cannot.
    """
    missing = [name for name in (*TEXTS, *WHOLE, *NUMBERS) if name not in rows]
    if missing:
        raise InputError(
            f"{source} has no column {', '.join(missing)}; performance is computed from the "
            "rows of tuned trainings, one for each epoch (training.parquet)"
        )
    columns = {name: _text(rows[name], allowed, source) for name, allowed in TEXTS.items()}
    columns |= {name: _whole(rows[name], source) for name in WHOLE}
    numbers = (*NUMBERS, "train_accuracy") if "train_accuracy" in rows else NUMBERS
    columns |= {name: _numbers(rows[name], source) for name in numbers}
    return rows.assign(**columns)


def _text(column: pd.Series, allowed: Sequence[str], source: str) -> pd.Series:
    # A task may be called 1, which a CSV file gives back as a number.
    fits = [
        isinstance(value, str | int | float)
        and not _is_nan(value)
        and (not allowed or value in allowed)
        for value in column
    ]
    _refuse(column, fits, " or ".join(allowed) or "text", source)
    return column.astype(str)


def _whole(column: pd.Series, source: str) -> pd.Series:
    values = _as_numbers(column)
    _refuse(column, np.isfinite(values) & (values == np.round(values)), "whole numbers", source)
    return values.astype("int64")


def _numbers(column: pd.Series, source: str) -> pd.Series:
    values = _as_numbers(column)
    fits = [
        math.isfinite(number) or told is None or told is pd.NA or _is_nan(told)
        for told, number in zip(column, values, strict=True)
    ]
    _refuse(column, fits, "finite numbers, or nothing", source)
    return values


def _as_numbers(column: pd.Series) -> pd.Series:
    """The numbers of a column, NaN where there is something else."""
    plain = [value if isinstance(value, int | float | np.number) else math.nan for value in column]
    return pd.Series(plain, index=column.index, dtype=float)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _refuse(column: pd.Series, fits: Sequence[bool] | pd.Series, wanted: str, source: str) -> None:
    wrong = np.flatnonzero(~np.asarray(fits, dtype=bool))
    if len(wrong):
        raise InputError(
            f"{source}: column {column.name} has {column.tolist()[wrong[0]]!r} in row "
            f"{wrong[0] + 1}; it should hold {wanted}"
        )


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each final training that ended well: its figures, over the seeds of a table.

    Args:
        rows: of trainings, one for each epoch, of one task or several.

    Returns:
        ``task, optimizer, seed``; ``data``, what the figures were measured on (``test``; where a
        task has no such data ``validation``, else ``train``); ``best_epoch``, by the rows'
        ``monitor``; ``test_loss, test_accuracy`` there, on ``data``; ``train_loss``, after the last
        epoch.

    Raises:
        InputError: the table is of another kind.
    """
    rows = checked_rows(rows)
    ended = rows[(rows["phase"] == "final") & (rows["status"] == "ok")]
    records = [
        _outcome(part.sort_values("epoch"))
        for _, part in ended.groupby(["task", "optimizer", "seed"], sort=False)
    ]
    columns = ["task", "optimizer", "seed", "data", "best_epoch", *FIGURES]
    return pd.DataFrame.from_records(records, columns=columns)


def _outcome(rows: pd.DataFrame) -> dict[str, object]:
    """A training's figures."""
    if not rows["epoch"].is_unique:
        raise InputError(
            f"the table has {rows['optimizer'].iloc[0]} on {rows['task'].iloc[0]} with seed "
            f"{rows['seed'].iloc[0]} twice; give each training once"
        )
    monitor = str(rows["monitor"].iloc[0])
    judged = rows[monitor].to_numpy(dtype=float)
    # Without validation data nothing tells an epoch from the next: the last one counts.
    best = len(rows) - 1
    if monitor != "train_loss" and not np.isnan(judged).all():
        best = int(np.nanargmax(judged) if monitor.endswith("accuracy") else np.nanargmin(judged))
    told = rows.to_dict("records")[best]
    data = next((p for p in ("test", "validation") if not pd.isna(told[f"{p}_loss"])), "train")
    return {
        "task": told["task"],
        "optimizer": told["optimizer"],
        "seed": told["seed"],
        "data": data,
        "best_epoch": told["epoch"],
        "test_loss": told[f"{data}_loss"],
        "test_accuracy": told.get(f"{data}_accuracy", math.nan),
        "train_loss": rows["train_loss"].iloc[-1],
    }


def performance(rows: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """The optimizers' results on each task, tuned, as means over seeds with t-intervals.

    Args:
        rows: of trainings, one for each epoch, of one task or several.
        confidence: of the intervals.

    Returns:
        One row per (task, optimizer), in order of appearance: ``rank`` on the task (1 is best);
        ``metric``, what it is by: ``test_accuracy`` where the targets are classes, else
        ``test_loss``; ``data``, what that was measured on (``test``; ``validation`` or ``train``
        where a task has no other data); for each of `FIGURES` (as `outcomes` has them)
        ``…_mean, …_low, …_high``, NaN ends where there are fewer than two seeds; ``seeds``, of
        how many trainings; ``diverged``, how many more did not end well; ``trials`` and
        ``trials_diverged``, of the search; the tuned ``learning_rate`` and ``damping``; ``edge``,
        which of the two lies at an end of the values that were tried, where a better one may lie
        beyond. An optimizer with trainings that diverged ranks behind those with fewer.

    Raises:
        InputError: the table is of another kind.
    """
    rows = checked_rows(rows)
    ended = outcomes(rows)
    records = [
        _performance(
            part, ended[(ended["task"] == task) & (ended["optimizer"] == optimizer)], confidence
        )
        for (task, optimizer), part in rows.groupby(["task", "optimizer"], sort=False)
    ]
    table = pd.DataFrame.from_records(records)
    for _, part in table.groupby("task", sort=False):
        classes = bool(part["test_accuracy_mean"].notna().any())
        metric = "test_accuracy" if classes else "test_loss"
        table.loc[part.index, "metric"] = metric
        table.loc[part.index, "rank"] = _ranks(part, metric)
    return table[[*_FIRST, *(name for name in table.columns if name not in _FIRST)]]


_FIRST = ["task", "optimizer", "rank", "metric", "data"]


def _performance(rows: pd.DataFrame, ended: pd.DataFrame, confidence: float) -> dict[str, object]:
    """An optimizer on a task."""
    single = rows.drop_duplicates(["phase", "trial", "seed"])
    search, final = (single[single["phase"] == phase] for phase in ("search", "final"))
    record: dict[str, object] = {
        "task": rows["task"].iloc[0],
        "optimizer": rows["optimizer"].iloc[0],
        "data": "" if ended.empty else ended["data"].iloc[0],
    }
    for name in FIGURES:
        ends = t_interval(ended[name].to_numpy(dtype=float), confidence)
        record |= dict(zip((f"{name}_mean", f"{name}_low", f"{name}_high"), ends, strict=True))
    return record | {
        "seeds": len(ended),
        "diverged": len(final) - len(ended),
        "trials": len(search),
        "trials_diverged": int((search["status"] != "ok").sum()),
        "learning_rate": math.nan if final.empty else final["learning_rate"].iloc[0],
        "damping": math.nan if final.empty else final["damping"].iloc[0],
        "edge": ", ".join(_edges(search, final)),
    }


def _edges(search: pd.DataFrame, final: pd.DataFrame) -> list[str]:
    """Which of the tuned settings is the least or the largest of those that were tried."""
    found = []
    for name in ("learning_rate", "damping") if len(final) else ():
        tried = search[name].dropna()
        if tried.nunique() > 1 and final[name].iloc[0] in (tried.min(), tried.max()):
            found.append(name)
    return found


def _ranks(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Ranks on a task: fewer diverged trainings first, then the better mean; equals share one."""
    sign = -1.0 if metric == "test_accuracy" else 1.0
    value = (sign * rows[f"{metric}_mean"]).fillna(math.inf)
    lost = rows["diverged"].where(rows["seeds"] > 0, math.inf)
    keys = list(zip(lost, value, strict=True))
    order = sorted(set(keys))
    first = {
        key: 1 + sum(keys.count(other) for other in order[:place])
        for place, key in enumerate(order)
    }
    return pd.Series([float(first[key]) for key in keys], index=rows.index)


def average_ranks(table: pd.DataFrame) -> pd.Series:
    """Each optimizer's mean rank over the tasks; NaN unless it was trained on all of them.

    Args:
        table: of `performance`.
    """
    ranks = table.pivot(index="task", columns="optimizer", values="rank")
    return ranks.mean(skipna=False).reindex(list(dict.fromkeys(table["optimizer"])))
