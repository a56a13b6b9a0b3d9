"""Many methods over a training run: each at its best damping, ranked by γ/γ_min.

λ has a different meaning for every method (an eigenvalue of a sum of squares for one, a root of it
for the next), so that methods compared at one common λ differ by what that λ happens to be for
them. Here each method is compared at the best of the given λ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.best_damping import at_best_damping, without_damping
from ngeval.analysis.stages import STAGES, three_stages
from ngeval.analysis.summary import summarize
from ngeval.analysis.tables import name_in

RATIOS = ("gamma_over_ng", "gamma_over_sgd")

COLUMNS = [
    "stage_name",
    "checkpoint",
    "epoch",
    "step",
    "rank",
    "method",
    "damping",
    *(f"{ratio}{end}" for ratio in RATIOS for end in ("", "_low", "_high")),
    "damping_run",
    *(f"{ratio}_run" for ratio in RATIOS),
    "batches",
    "coverage",
    "status",
    "reason",
]
"""The columns of `ranking`, in order."""


def ranking(table: pd.DataFrame, checkpoints: Sequence[str] | None = None) -> pd.DataFrame:
    """Methods ranked at single checkpoints, each at its best damping.

    Args:
        table: rows of `ngeval.evaluate` for several batches and checkpoints (``ngeval gamma``'s
            or ``ngeval compare``'s output).
        checkpoints: which; None takes the first, the middle and the last.

    Returns:
        One row per (checkpoint, method), by rank: ``stage_name`` (early, middle, late),
        ``checkpoint, epoch, step, rank, method``; ``damping``, the best λ at this checkpoint (NaN
        for a method that λ does not enter); the geometric means over batches ``gamma_over_ng``
        (γ/γ_min) and ``gamma_over_sgd`` there, with 95 % bootstrap intervals ``…_low`` and
        ``…_high``; ``damping_run`` and ``gamma_over_ng_run``: with the one λ that is best over all
        checkpoints; ``batches``; ``coverage``, the percentage of the parameters that the method
        treats itself, where the table has it; ``status, reason``. The rank is by γ/γ_min, or by
        γ/γ_SGD if there is no γ_min. Methods that could not be computed come last, without a rank.

    Raises:
        InputError: no such checkpoint.
    """
    table = table.assign(method=table["method"].fillna("").astype(str))
    if "checkpoint" not in table:  # a table of ngeval.evaluate
        table = table.assign(checkpoint="")
    chosen = three_stages(table) if checkpoints is None else list(checkpoints)
    for name in chosen:
        name_in(table, "checkpoint", str(name))
    run = _summary(at_best_damping(table, whole_run=True))
    free = without_damping(table)
    parts = []
    for stage, name in zip(_stage_names(len(chosen)), chosen, strict=True):
        rows = table[table["checkpoint"] == name]
        part = _ranked(rows, run[run["checkpoint"] == name])
        part.loc[part["method"].isin(free), ["damping", "damping_run"]] = math.nan
        when = {key: rows[key].iloc[0] if key in rows else math.nan for key in ("epoch", "step")}
        parts.append(part.assign(stage_name=stage, checkpoint=name, **when))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _stage_names(count: int) -> list[str]:
    if count == 2:
        return [STAGES[0], STAGES[-1]]
    return [*STAGES[:count]] if count <= 3 else [f"stage {place}" for place in range(count)]


def _ranked(rows: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """The methods of one checkpoint by rank."""
    best = _summary(at_best_damping(rows)).set_index("method")
    over_run = run.set_index("method").add_suffix("_run")
    methods = list(dict.fromkeys(rows["method"]))
    joined = best.join(over_run[["damping_run", *(f"{r}_run" for r in RATIOS)]]).reindex(methods)
    by = RATIOS[0] if joined[RATIOS[0]].notna().any() else RATIOS[1]
    joined = joined.sort_values(by, kind="stable", na_position="last")
    failed = joined["batches"].isna()
    with_reasons = rows if "reason" in rows else rows.assign(reason="")
    bad = with_reasons[with_reasons["status"] != "ok"]
    reasons = bad.groupby("method")["reason"].first()
    return joined.assign(
        rank=joined[by].rank(method="min"),
        batches=joined["batches"].fillna(0).astype(int),
        status=np.where(failed, "failed", "ok"),
        coverage=_coverage(rows),
        reason=np.where(failed, reasons.reindex(joined.index).fillna(""), ""),
    ).reset_index()


def _coverage(rows: pd.DataFrame) -> pd.Series[float] | float:
    """Of each method, over the rows that could be computed."""
    if "coverage" not in rows:
        return math.nan
    return rows[rows["status"] == "ok"].groupby("method")["coverage"].min()


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Geometric means with intervals, named as the ratios are."""
    ends = ("", "_low", "_high")
    names = {f"{ratio}_geomean{end}": f"{ratio}{end}" for ratio in RATIOS for end in ends}
    columns = ["checkpoint", "method", "damping", "batches", *names]
    return summarize(rows)[columns].rename(columns=names)
