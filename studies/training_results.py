"""How well optimizers train: their tuned settings' results over seeds, with intervals and ranks.

Made from the rows of tuned trainings, one for each epoch, in the manner of the tables of Wu et al.
(arXiv 2406.06420): test performance at the best validation epoch, and the final training loss.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ngeval.analysis.tables import NUMBER, Column, Conversion, checked
from ngeval.errors import InputError
from studies.statistics import t_interval

FIGURES = ("test_accuracy", "test_loss", "train_loss")
"""The numbers that have a mean and an interval: two at the best validation epoch, and the last at
the end."""


def _finite(column: pd.Series) -> Conversion:
    values, fits = NUMBER.convert(column)
    return values, fits & ~np.isinf(values)


def _whole(column: pd.Series) -> Conversion:
    values, _ = NUMBER.convert(column)
    fits = (values == np.round(values)) & (values.abs() < 2**53)
    return values.where(fits, 0).astype("int64"), fits


def _text(column: pd.Series) -> Conversion:
    # A task may be called 1, which a CSV file gives back as a number.
    fits = column.map(lambda value: isinstance(value, str | int | float)) & column.notna()
    return column.astype(str), fits


def one_of(*choices: str) -> Column:
    """A column of a few words."""

    def convert(column: pd.Series) -> Conversion:
        values, fits = _text(column)
        return values, fits & values.isin(choices)

    return Column(convert, " or ".join(choices))


FINITE = Column(_finite, "finite numbers, or nothing")
WHOLE = Column(_whole, "whole numbers")
TEXT = Column(_text, "text")

COLUMNS: dict[str, Column] = {
    "task": TEXT,
    "optimizer": TEXT,
    "phase": one_of("search", "final"),
    "monitor": one_of("train_loss", "validation_loss", "validation_accuracy"),
    "status": one_of("ok", "diverged", "failed"),
    **dict.fromkeys(("trial", "seed", "epoch"), WHOLE),
    **dict.fromkeys(("learning_rate", "damping", "train_loss"), FINITE),
    **{
        f"{part}_{what}": FINITE for part in ("validation", "test") for what in ("loss", "accuracy")
    },
}
"""The columns that are needed, and what they may hold."""


def checked_rows(rows: pd.DataFrame, source: str = "the table") -> pd.DataFrame:
    """The rows of trainings with one type for each column.

    Args:
        rows: as they were read, also those that somebody edited.
        source: what they were read from, for messages.

    Raises:
        InputError: a column is missing, or holds a value that it may not.
    """
    missing = [column for column in COLUMNS if column not in rows]
    if missing:
        raise InputError(
            f"{source} has no column {', '.join(missing)}; tuned trainings, with a row for each "
            "epoch (training.parquet), come from studies.tuning.Tuning"
        )
    # Where no data are held out, the performance is that on the training data.
    return checked(rows, COLUMNS | {"train_accuracy": FINITE}, source)


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
    # Without validation data no epoch is better than the next, and the last one counts.
    best = len(rows) - 1
    if monitor != "train_loss" and not np.isnan(judged).all():
        best = int(np.nanargmax(judged) if monitor.endswith("accuracy") else np.nanargmin(judged))
    row = rows.to_dict("records")[best]
    data = next((p for p in ("test", "validation") if not pd.isna(row[f"{p}_loss"])), "train")
    return {
        "task": row["task"],
        "optimizer": row["optimizer"],
        "seed": row["seed"],
        "data": data,
        "best_epoch": row["epoch"],
        "test_loss": row[f"{data}_loss"],
        "test_accuracy": row.get(f"{data}_accuracy", math.nan),
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
    """Which of the tuned settings is the smallest or the largest of those that were tried."""
    edges = []
    for name in ("learning_rate", "damping") if len(final) else ():
        tried = search[name].dropna()
        if tried.nunique() > 1 and final[name].iloc[0] in (tried.min(), tried.max()):
            edges.append(name)
    return edges


def _ranks(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Ranks on a task: fewer diverged trainings first, then the better mean; equals share one."""
    sign = -1.0 if metric == "test_accuracy" else 1.0
    value = (sign * rows[f"{metric}_mean"]).fillna(math.inf)
    diverged = rows["diverged"].where(rows["seeds"] > 0, math.inf)
    order = pd.MultiIndex.from_arrays([diverged, value])
    return pd.Series(order.factorize(sort=True)[0], index=rows.index).rank(method="min")


def average_ranks(table: pd.DataFrame) -> pd.Series:
    """Each optimizer's mean rank over the tasks; NaN unless it was trained on all of them.

    Args:
        table: of `performance`.
    """
    ranks = table.pivot(index="task", columns="optimizer", values="rank")
    return ranks.mean(skipna=False).reindex(list(dict.fromkeys(table["optimizer"])))
