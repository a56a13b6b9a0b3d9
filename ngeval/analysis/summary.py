"""Means of γ ratios over batches, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.intervals import mean_intervals
from ngeval.errors import InputError

SUMMARIZED = ("gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_floor")
"""The columns that `summarize` needs besides ``status``."""


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
        by: the columns that define a group; those absent from the table are left out.
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
    missing = [name for name in ("status", *SUMMARIZED) if name not in table.columns]
    if missing:
        raise InputError(f"the table has no column {', '.join(missing)}; is it evaluate's?")
    usable = table[table["status"] == "ok"]
    usable = usable.assign(**{name: _numbers(usable[name], name) for name in SUMMARIZED})
    grouped = usable.groupby(keys, sort=False, dropna=False)
    summary = grouped.size().rename("batches").reset_index()
    floors = usable["gamma_floor"] * usable["gamma_over_sgd"] / usable["gamma"]
    with np.errstate(divide="ignore"):  # a floor of 0 (an overflowing uᵀH⁺u) has log −∞
        usable = usable.assign(log_floor=np.log(floors))
    floor_groups = usable.groupby(keys, sort=False, dropna=False)
    summary["floor_over_sgd"] = np.exp(floor_groups["log_floor"].mean().to_numpy())
    for ratio in ("gamma_over_sgd", "gamma_over_ng"):
        values = [group.dropna().to_numpy(dtype=float) for _, group in grouped[ratio]]
        for suffix, transform, back in (
            ("mean", np.asarray, np.asarray),
            ("geomean", np.log, np.exp),
        ):
            means, low, high = _intervals(
                [transform(v) for v in values], confidence, resamples, seed
            )
            name = f"{ratio}_{suffix}"
            summary[name] = back(means)
            summary[f"{name}_low"], summary[f"{name}_high"] = back(low), back(high)
    return summary


def _intervals(
    groups: list[np.ndarray], confidence: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and percentile bootstrap interval of every group; groups of one length together."""
    means = np.array([group.mean() if len(group) else math.nan for group in groups])
    low, high = np.full((2, len(groups)), math.nan)
    for length in sorted({len(group) for group in groups} - {0, 1}):
        chosen = [i for i, group in enumerate(groups) if len(group) == length]
        low[chosen], high[chosen] = mean_intervals(
            np.stack([groups[i] for i in chosen]),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    return means, low, high


def _numbers(column: pd.Series, name: str) -> np.ndarray:
    try:
        return pd.to_numeric(column).to_numpy(dtype=float, na_value=np.nan)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"column {name} of the table holds no numbers: {error!s:.200}") from error
