"""Means of γ ratios over batches, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.intervals import group_means
from ngeval.analysis.tables import SUMMARIZED, numbers, require
from ngeval.errors import InputError


def summarize(
    table: pd.DataFrame,
    by: Sequence[str] = ("checkpoint", "method", "damping"),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and geometric mean of the γ ratios over batches, with bootstrap intervals.

    Args:
        table: rows of `evaluate` for several batches; only rows with ``status == "ok"`` count.
        by: the columns that define a group; those absent from the table are ignored.
        confidence: coverage of the percentile bootstrap intervals.
        resamples: number of bootstrap resamples.
        seed: for the resampling.

    Raises:
        InputError: a column is missing.

    Returns:
        One row per group in order of appearance, with ``batches`` and, for each ratio r in
        (``gamma_over_sgd``, ``gamma_over_ng``): ``r_mean, r_mean_low, r_mean_high, r_geomean,
        r_geomean_low, r_geomean_high``; and ``floor_over_sgd``, the geometric mean of the floor
        over γ_SGD. Intervals of fewer than two batches are NaN.

    Example:
        >>> import pandas as pd, torch, ngeval
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3) * size, torch.tensor([0, 1, 1])) for size in (1.0, 2.0)]
        >>> tables = [
        ...     ngeval.evaluate(ngeval.Problem(model, *batch, "categorical"), ["ief"], [1e-6])
        ...     for batch in batches
        ... ]
        >>> summary = ngeval.summarize(pd.concat(tables))
        >>> summary[["method", "damping", "batches"]].values.tolist()
        [['ief', 1e-06, 2]]
    """
    if not (0 < confidence < 1) or resamples < 1:
        raise InputError("confidence must lie between 0 and 1, and resamples be at least 1")
    by = [by] if isinstance(by, str) else list(dict.fromkeys(by))
    keys = [key for key in by if key in table.columns]
    if not keys:
        raise InputError(f"none of the columns {list(by)} is in the table")
    require(table, "status", *SUMMARIZED)
    usable = numbers(table[table["status"] == "ok"], *SUMMARIZED)
    floors = usable["gamma_floor"] * usable["gamma_over_sgd"] / usable["gamma"]
    with np.errstate(divide="ignore"):  # a floor of 0 (an overflowing uᵀH⁺u) has log −∞
        usable = usable.assign(log_floor=np.log(floors))
    grouped = usable.groupby(keys, sort=False, dropna=False)
    summary = grouped.size().rename("batches").reset_index()
    summary["floor_over_sgd"] = np.exp(grouped["log_floor"].mean().to_numpy())
    for ratio in ("gamma_over_sgd", "gamma_over_ng"):
        values = [group.dropna().to_numpy(dtype=float) for _, group in grouped[ratio]]
        for mean, transform, back in (
            (f"{ratio}_mean", np.asarray, np.asarray),
            (f"{ratio}_geomean", np.log, np.exp),
        ):
            groups = [transform(group) for group in values]
            summary[[mean, f"{mean}_low", f"{mean}_high"]] = back(
                group_means(groups, confidence=confidence, resamples=resamples, seed=seed)
            ).T
    return summary


def with_natural(rows: pd.DataFrame) -> pd.DataFrame:
    """Add rows of the method ``ng`` if there are none, from the bounds on γ_NG(λ).

    Both bounds agree to a relative ``gap`` of 10⁻⁴ as a rule; their geometric mean is taken. A
    table without them (``--no-natural``) stays as it is.
    """
    if "ng" in set(rows["method"]) or not {"gamma_ng_lower", "gamma_ng_upper"} <= set(rows):
        return rows
    keys = [key for key in ("checkpoint", "batch", "damping") if key in rows]
    single = rows.drop_duplicates(keys)
    lower, upper = single["gamma_ng_lower"], single["gamma_ng_upper"]
    gamma = np.sqrt(lower.where(lower > 0) * upper.where(upper > 0))
    over_sgd = gamma * single["gamma_over_sgd"] / single["gamma"]
    least = single.get("gamma_min", np.nan)
    natural = single.assign(
        method="ng", gamma=gamma, gamma_over_sgd=over_sgd, gamma_over_ng=gamma / least
    )
    return pd.concat([rows, natural[np.isfinite(gamma)]], ignore_index=True)
