"""Percentile bootstrap intervals of means, for many groups of batches at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

BLOCK = 2_000
"""Groups whose resampled means are held at once: 32 MB."""


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

    The numbers are those of `ngeval.summarize`, found by one product of matrices for all groups
    of a size: a million rows take seconds.

    Args:
        table: the rows; those without a finite positive value do not count.
        keys: columns that make the groups.
        column: what is averaged, in the logarithm.
        confidence: of the percentile interval.
        resamples: of the bootstrap.
        seed: of its draws.

    Returns:
        The keys, in order of appearance, ``count, mean, low, high``; the ends of a group of one
        are NaN.
    """
    values = table[column].to_numpy(dtype=float)
    rows = table[np.isfinite(values) & (values > 0)]
    groups = rows.groupby(list(keys), sort=False, dropna=False)
    codes = groups.ngroup().to_numpy()
    order = np.argsort(codes, kind="stable")
    logs = np.log(rows[column].to_numpy(dtype=float))[order]
    counts = np.bincount(codes) if len(codes) else np.zeros(0, dtype=int)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
    means, low, high = np.full((3, len(counts)), np.nan)
    for size in np.unique(counts):
        chosen = np.flatnonzero(counts == size)
        matrix = logs[starts[chosen][:, None] + np.arange(size)]
        means[chosen] = matrix.mean(1)
        if size > 1:
            low[chosen], high[chosen] = mean_intervals(
                matrix, confidence=confidence, resamples=resamples, seed=seed
            )
    found: pd.DataFrame = rows.iloc[order[starts]][list(keys)].reset_index(drop=True)
    return found.assign(count=counts, mean=np.exp(means), low=np.exp(low), high=np.exp(high))


def mean_intervals(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of the means of rows, with the same draws for every row.

    Args:
        values: shape ``(groups, n)``.
        confidence: of the interval.
        resamples: how many times n of the n are drawn.
        seed: of the draws.

    Returns:
        Low and high ends, shape ``(groups,)``.
    """
    size = values.shape[1]
    drawn = np.random.default_rng(seed).integers(0, size, (resamples, size))
    shares = np.zeros((resamples, size))
    np.add.at(shares, (np.arange(resamples)[:, None], drawn), 1 / size)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    blocks = [
        np.quantile(values[start : start + BLOCK] @ shares.T, ends, axis=1)
        for start in range(0, len(values), BLOCK)
    ]
    low, high = np.concatenate(blocks, axis=1)
    return low, high
