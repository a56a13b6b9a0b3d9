"""The damping at which a method does best, and the methods that damping does not enter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.tables import graded


def at_best_damping(table: pd.DataFrame, *, whole_run: bool = False) -> pd.DataFrame:
    """The rows of a γ table at each method's best λ.

    The best λ has the least geometric mean of γ over batches. A λ at which some batch could not be
    computed is chosen only if there is no other. For a method that λ does not enter, it is the
    first one.

    Args:
        table: rows of `ngeval.evaluate` for several dampings, batches and checkpoints.
        whole_run: one λ for all checkpoints (by the geometric mean of γ/γ_SGD over all of them), as
            one would set it for a training run, instead of one for each.
    """
    keys = ["method"] if whole_run else ["checkpoint", "method"]
    keys = [key for key in keys if key in table]
    usable = graded(table)
    logs = usable.assign(log=np.log(usable["gamma_over_sgd"]))
    means = logs.groupby([*keys, "damping"], sort=False)["log"].agg(["mean", "size"]).reset_index()
    best = best_rows(means, keys, value="mean", count="size")[[*keys, "damping"]]
    return usable.merge(best, on=[*keys, "damping"], how="inner")


def best_rows(
    summary: pd.DataFrame,
    keys: Sequence[str] = ("checkpoint", "method"),
    *,
    value: str,
    count: str = "batches",
) -> pd.DataFrame:
    """Of a summary with one row per λ, the row with the least value for each method.

    Args:
        summary: means over batches.
        keys: the columns that define a group, of which one row is taken.
        value: the column that should be small.
        count: the column with the number of batches; only rows with the most batches of their
            group can be chosen.
    """
    groups = summary.groupby(list(keys))[count]
    complete = summary[summary[count] == groups.transform("max")]
    return complete.loc[complete.groupby(list(keys), sort=False)[value].idxmin()]


def without_damping(table: pd.DataFrame) -> set[str]:
    """The methods whose γ is the same at every λ; empty if the table has only one λ."""
    if table["damping"].nunique() < 2:
        return set()
    keys = [key for key in ("checkpoint", "batch", "method") if key in table]
    ends = graded(table).groupby(keys)["gamma_over_sgd"].agg(["min", "max"])
    same = (ends["min"] == ends["max"]).groupby("method").all()
    return {str(name) for name in same.index[same]}


def smallest_positive(dampings: Iterable[float]) -> float:
    """The smallest positive λ, or 0 if that is the only one."""
    values = sorted(map(float, dampings))
    return next((value for value in values if value > 0), values[-1])
