"""Per-sample gradient norms: how unequal they are in a batch."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ngeval.analysis.intervals import geometric_means


def imbalance(norms: pd.Series[float]) -> float:
    """Largest over smallest norm; ∞ where the smallest is zero, NaN where all are."""
    smallest, largest = float(norms.min()), float(norms.max())
    if largest == 0:
        return math.nan
    return largest / smallest if smallest > 0 else math.inf


def imbalances(samples: pd.DataFrame, stage: str = "checkpoint") -> pd.DataFrame:
    """Largest over smallest gradient norm of every batch.

    Args:
        samples: one row per sample (``ngeval imbalance``'s output).
        stage: the column that distinguishes the stages of training.

    Returns:
        One row per (stage, batch) with ``imbalance``: ∞ where the smallest norm is 0; NaN where all
        are 0 or one is not a norm (NaN, infinite, negative); ``size`` of the batch, and ``count``
        of its norms.
    """
    keys = [key for key in (stage, "batch") if key in samples]
    norms = samples["gradient_norm"]
    rows = samples[keys].assign(norm=norms.where(norms.between(0, np.inf, inclusive="left")))
    batches = rows.groupby(keys, sort=False, dropna=False)["norm"]
    ends = batches.agg(["min", "max", "size", "count"]).reset_index()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = (ends["max"] / ends["min"]).where(ends["count"] == ends["size"])
    return ends[[*keys, "size", "count"]].assign(imbalance=ratios)


def imbalance_means(samples: pd.DataFrame, stage: str = "checkpoint") -> pd.DataFrame:
    """For every stage the geometric mean over batches ``mean, low, high`` of ``count`` imbalances.

    Batches whose imbalance is not a finite number do not count.
    """
    return geometric_means(imbalances(samples, stage), [stage], "imbalance")
