"""Means with their intervals, for many groups of batches at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy

BLOCK = 500
"""Groups that are resampled at once: 40 MB where a group has five batches."""


def geometric_means(
    table: pd.DataFrame,
    keys: Sequence[str],
    column: str,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Geometric mean of a positive column in every group, with its bootstrap interval.

    Args:
        table: the rows; those without a finite positive value do not count.
        keys: the columns that define the groups.
        column: what is averaged, in the logarithm.
        confidence: of the percentile interval.
        resamples: of the bootstrap; 0 leaves the intervals out.
        seed: of its draws.

    Returns:
        The keys, in order of appearance, and ``count, mean, low, high``; the interval of a group
        with one row is NaN.
    """
    rows = table[table[column].astype(float).between(0, math.inf, inclusive="neither")]
    grouped = rows.groupby(list(keys), sort=False, dropna=False)
    counts = grouped.size().rename("count").reset_index()
    order = np.argsort(grouped.ngroup().to_numpy(), kind="stable")
    logs = np.log(rows[column].to_numpy(dtype=float)[order])
    groups = np.split(logs, counts["count"].cumsum().to_numpy()[:-1]) if len(counts) else []
    mean, low, high = np.exp(
        group_means(groups, confidence=confidence, resamples=resamples, seed=seed)
    )
    return counts.assign(mean=mean, low=low, high=high)


def group_means(
    groups: Sequence[np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Mean of each group, with its percentile bootstrap interval.

    Returns:
        Means, low and high ends, shape ``(3, groups)``; NaN for the mean of an empty group, and
        for the interval of a group with fewer than two values.
    """
    result = np.full((3, len(groups)), math.nan)
    sizes = np.array([len(group) for group in groups], dtype=int)
    for size in np.unique(sizes[sizes > 0]):
        places = np.flatnonzero(sizes == size)
        values = np.stack([group for group in groups if len(group) == size])
        result[0, places] = values.mean(axis=1)
        if size > 1 and resamples:
            result[1:, places] = mean_intervals(
                values, confidence=confidence, resamples=resamples, seed=seed
            )
    return result


def mean_intervals(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of the means of rows, with the same draws for every row.

    Args:
        values: shape ``(groups, n)``.
        confidence: of the interval.
        resamples: number of times that n of the n values are drawn.
        seed: of the draws.

    Returns:
        Low and high ends, shape ``(groups,)``.
    """
    intervals = [
        scipy.stats.bootstrap(  # through the package: scipy.stats takes a second to import
            (values[start : start + BLOCK],),
            np.mean,
            axis=-1,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            rng=seed,
        ).confidence_interval
        for start in range(0, len(values), BLOCK)
    ]
    low, high = (np.concatenate([interval[end] for interval in intervals]) for end in (0, 1))
    return low, high
