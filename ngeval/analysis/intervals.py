"""Means with their intervals, for many groups of batches at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy

MAX_VALUES = 5_000_000
"""The number of values that are resampled at once: 40 MB."""


def geometric_means(
    table: pd.DataFrame, keys: Sequence[str], column: str, *, resamples: int = 2000
) -> pd.DataFrame:
    """Geometric mean of a positive column in every group, with its 95 % bootstrap interval.

    Args:
        table: the rows; those without a finite positive value do not count.
        keys: the columns that define the groups.
        column: what is averaged, in the logarithm.
        resamples: of the bootstrap; 0 leaves the intervals out.

    Returns:
        The keys, in order of appearance, and ``count, mean, low, high``; the interval of a group
        with one row is NaN.
    """
    rows = table[table[column].astype(float).between(0, math.inf, inclusive="neither")]
    grouped = rows.groupby(list(keys), sort=False, dropna=False)
    counts = grouped.size().rename("count").reset_index()
    groups = [np.log(values.to_numpy(dtype=float)) for _, values in grouped[column]]
    mean, low, high = np.exp(group_means(groups, resamples=resamples))
    return counts.assign(mean=mean, low=low, high=high)


def group_means(
    groups: Sequence[np.ndarray], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Mean of each group, with its percentile bootstrap interval.

    Groups of the same size are resampled with the same draws.

    Args:
        groups: the values of each.
        confidence: of the interval.
        resamples: number of times that n of the n values are drawn; 0: no interval.
        seed: of the draws.

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
            interval = scipy.stats.bootstrap(  # scipy.stats takes a second to import
                (values,),
                np.mean,
                axis=-1,
                n_resamples=resamples,
                batch=max(1, MAX_VALUES // values.size),
                confidence_level=confidence,
                method="percentile",
                rng=seed,
            ).confidence_interval
            result[1:, places] = interval.low, interval.high
    return result
