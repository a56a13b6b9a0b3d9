"""Many methods over a training run: each at its best damping, ranked by γ/γ_min.

λ means another thing to every method (an eigenvalue of a sum of squares to one, a root of it to
the next), so that at one λ for all, methods differ by what that λ happens to be to them. What is
compared is each method at the best λ of those given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.summary import SUMMARIZED, summarize
from ngeval.errors import InputError, nearest_name

NAMES = ("early", "middle", "late")
RATIOS = ("gamma_over_ng", "gamma_over_sgd")


def graded(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a γ table that are a grade: status ok, with finite positive γ and γ/γ_SGD.

    Only these have a logarithm, a place in a ranking and one in a picture. A γ/γ_min or floor that
    is none becomes NaN; methods become text.

    Raises:
        InputError: a column is missing, or one of numbers has a text in it.
    """
    missing = [name for name in ("method", "damping", "status", *SUMMARIZED) if name not in table]
    if missing:
        raise InputError(f"the table has no column {', '.join(missing)}; is it evaluate's?")
    rows = numbers(table[table["status"] == "ok"], "damping", *SUMMARIZED)
    kept = _positive(rows["gamma"]) & _positive(rows["gamma_over_sgd"])
    found: pd.DataFrame = rows[kept & rows["damping"].between(0, math.inf, inclusive="left")]
    floor, least = found["gamma_floor"], found["gamma_over_ng"]
    return found.assign(
        method=found["method"].fillna("").astype(str),
        gamma_over_ng=least.where(_positive(least)),
        gamma_floor=floor.where(floor.between(0, math.inf, inclusive="left")),
    )


def numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A table with float columns, of those that it has.

    Raises:
        InputError: a column has a text in it, as its name where files were joined by hand.
    """
    found = {}
    for name in columns:
        if name not in table:
            continue
        values = pd.to_numeric(table[name], errors="coerce")
        lost = table[name][values.isna() & table[name].notna()]
        if len(lost):
            text = str(lost.iloc[0])
            hint = "; a header row among the rows?" if text == name else ""
            raise InputError(f"the column {name} holds {text[:40]!r}, which is no number{hint}")
        found[name] = values.astype(float)
    return table.assign(**found)


def _positive(values: pd.Series[float]) -> pd.Series[bool]:
    return values.between(0, math.inf, inclusive="neither")


def at_best_damping(table: pd.DataFrame, *, whole_run: bool = False) -> pd.DataFrame:
    """The rows of a γ table at each method's best λ.

    The best λ has the least geometric mean of γ over batches; a λ at which some batch could not be
    computed is taken only where there is no other. A method that λ does not enter keeps the first.

    Args:
        table: rows of `ngeval.evaluate` for several dampings, batches and checkpoints.
        whole_run: one λ for all checkpoints (by the geometric mean of γ/γ_SGD over them all), as
            one would set it for a training run, and not one for each.
    """
    keys = ["method"] if whole_run else ["checkpoint", "method"]
    keys = [key for key in keys if key in table]
    usable = graded(table)
    logs = usable.assign(log=np.log(usable["gamma_over_sgd"]))
    found = logs.groupby([*keys, "damping"], sort=False)["log"].agg(["mean", "size"]).reset_index()
    most = found.groupby(keys)["size"].transform("max")
    found = found[found["size"] == most]
    best = found.loc[found.groupby(keys, sort=False)["mean"].idxmin(), [*keys, "damping"]]
    return usable.merge(best, on=[*keys, "damping"], how="inner")


def three_stages(table: pd.DataFrame) -> list[str]:
    """The first, the middle and the last checkpoint of a table."""
    names = list(dict.fromkeys(table["checkpoint"]))
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


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
        treats itself, where the table tells it; ``status, reason``. The rank is by γ/γ_min, where
        there is no γ_min by γ/γ_SGD. Methods that could not be computed come last, without a rank.

    Raises:
        InputError: no such checkpoint.
    """
    table = table.assign(method=table["method"].fillna("").astype(str))
    if "checkpoint" not in table:  # ngeval.evaluate's own
        table = table.assign(checkpoint="")
    names = list(dict.fromkeys(table["checkpoint"]))
    chosen = three_stages(table) if checkpoints is None else list(checkpoints)
    for name in chosen:
        if name not in names:
            raise InputError(f"no rows for checkpoint {name!r}; {nearest_name(name, names)}")
    labels = [NAMES[0], NAMES[-1]] if len(chosen) == 2 else list(NAMES)
    labels = labels if len(chosen) <= len(labels) else [f"stage {i}" for i in range(len(chosen))]
    run = _summary(at_best_damping(table, whole_run=True))
    free = without_damping(table)
    parts = []
    for label, name in zip(labels, chosen, strict=False):
        rows = table[table["checkpoint"] == name]
        part = _ranked(rows, run[run["checkpoint"] == name])
        part[["damping", "damping_run"]] = part[["damping", "damping_run"]].mask(
            part["method"].isin(free)
        )
        told = {key: rows[key].iloc[0] if key in rows else math.nan for key in ("epoch", "step")}
        parts.append(part.assign(stage_name=label, checkpoint=name, **told))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


COLUMNS = [
    *("stage_name", "checkpoint", "epoch", "step", "rank", "method", "damping"),
    *(f"{ratio}{end}" for ratio in RATIOS for end in ("", "_low", "_high")),
    *("damping_run", "gamma_over_ng_run", "gamma_over_sgd_run", "batches", "coverage"),
    *("status", "reason"),
]
"""The columns of `ranking`, in order."""


def _ranked(rows: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """The methods of one checkpoint by rank."""
    best = _summary(at_best_damping(rows)).set_index("method")
    over_run = run.set_index("method").add_suffix("_run")
    methods = list(dict.fromkeys(rows["method"]))
    joined = best.join(over_run[["damping_run", *(f"{r}_run" for r in RATIOS)]]).reindex(methods)
    by = RATIOS[0] if joined[RATIOS[0]].notna().any() else RATIOS[1]
    joined = joined.sort_values(by, kind="stable", na_position="last")
    lost = joined["batches"].isna()
    told = rows if "reason" in rows else rows.assign(reason="")
    reasons = told[told["status"] != "ok"].groupby("method")["reason"].first()
    return joined.assign(
        rank=joined[by].rank(method="min"),
        batches=joined["batches"].fillna(0).astype(int),
        status=np.where(lost, "failed", "ok"),
        coverage=_coverage(rows),
        reason=np.where(lost, reasons.reindex(joined.index).fillna(""), ""),
    ).reset_index()


def _coverage(rows: pd.DataFrame) -> pd.Series[float] | float:
    """Of each method, over the rows that could be computed."""
    if "coverage" not in rows:
        return math.nan
    return rows[rows["status"] == "ok"].groupby("method")["coverage"].min()


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Geometric means with intervals, under the ratios' own names."""
    ends = ("", "_low", "_high")
    names = {f"{ratio}_geomean{end}": f"{ratio}{end}" for ratio in RATIOS for end in ends}
    columns = ["checkpoint", "method", "damping", "batches", *names]
    return summarize(rows)[columns].rename(columns=names)


def without_damping(table: pd.DataFrame) -> set[str]:
    """Methods whose γ is the same at every λ, if there are several."""
    if table["damping"].nunique() < 2:
        return set()
    keys = [key for key in ("checkpoint", "batch", "method") if key in table]
    usable = graded(table)
    spread = usable.groupby(keys)["gamma"].agg(lambda gammas: gammas.max() == gammas.min())
    same = spread.groupby("method").all()
    return set(same[same].index)
