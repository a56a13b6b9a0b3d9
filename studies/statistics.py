"""Numbers with 95 % intervals: means, slopes and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A number with the ends of its 95 % interval, which are NaN where they cannot be estimated."""

    value: float
    low: float
    high: float

    def is_below(self, value: float) -> bool:
        """Whether the whole interval is; False where its end is NaN."""
        return self.high < value

    def is_above(self, value: float) -> bool:
        """Whether the whole interval is; False where its end is NaN."""
        return self.low > value

    def exp(self) -> Interval:
        """The interval of the number, from that of its logarithm."""
        return Interval(*np.exp(self))

    def holds(self, value: float) -> bool:
        """Whether a value is in the interval."""
        return self.low <= value <= self.high

    def text(self, form: str = ".3g") -> str:
        """``1.2 [1.1, 1.3]``."""
        if math.isnan(self.low):
            return f"{self.value:{form}} (no interval)"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def t_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of independent values, with Student's t-interval for it.

    mean ± t_{n−1} · s/√n, with s the standard deviation (n − 1 in its denominator).

    Args:
        values: n of them; NaN are left out.
        confidence: that the interval holds the mean, were the values normally distributed.

    Returns:
        Mean, low and high end; the interval of fewer than two values is NaN.
    """
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return (float(known[0]) if len(known) else math.nan), math.nan, math.nan
    mean, error = float(known.mean()), float(known.std(ddof=1)) / math.sqrt(len(known))
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, len(known) - 1)) * error
    return mean, mean - half, mean + half


def mean_interval(values: ArrayLike) -> Interval:
    """Mean with Student's t interval; without ends for fewer than two values."""
    return Interval(*t_interval(np.asarray(values, dtype=float), CONFIDENCE))


def geometric_interval(values: ArrayLike) -> Interval:
    """Geometric mean, with the t interval of the logarithms."""
    return mean_interval(np.log(np.asarray(values, dtype=float))).exp()


def at_best_damping(rows: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """The rows at the λ with the least geometric mean of a column, for all values of ``keys``.

    Rows with a status other than ``ok`` are left out.
    """
    keys = [*keys, "method"]
    rows = rows[rows["status"] == "ok"]
    rows = rows.assign(log=np.log(rows[column]))
    means = rows.groupby([*keys, "damping"], as_index=False)["log"].mean()
    best = means.loc[means.groupby(keys)["log"].idxmin()]
    return rows.merge(best[[*keys, "damping"]], on=[*keys, "damping"])


def geometric_intervals(rows: pd.DataFrame, by: str, column: str) -> dict[float, Interval]:
    """The geometric mean of a column with its interval, for every value of ``by`` in order.

    Values that are missing or not finite are left out.
    """
    finite = rows[np.isfinite(rows[column].to_numpy(dtype=float))]
    keys = np.sort(finite[by].to_numpy(dtype=float))
    return {
        float(key): geometric_interval(finite.loc[finite[by] == key, column])
        for key in dict.fromkeys(keys)
    }


def slope_interval(x: ArrayLike, y: ArrayLike) -> Interval:
    """The slope of a straight line through points, by least squares, with its t interval."""
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(across) < 3 or np.ptp(across) == 0:
        return Interval(math.nan, math.nan, math.nan)
    # Through the package, so that scipy.stats (a second to import) is loaded when needed.
    line: Any = scipy.stats.linregress(across, up)
    half = _quantile(len(across) - 2) * float(line.stderr)
    return Interval(float(line.slope), float(line.slope) - half, float(line.slope) + half)


def rank_correlation(
    x: ArrayLike, y: ArrayLike, groups: Sequence[Any], seed: int = 0, resamples: int = 1000
) -> Interval:
    """Spearman's ρ with a percentile bootstrap interval that draws whole groups of points.

    Points of one group (the batches of a checkpoint) are correlated, and drawing them one by one
    would make the interval too narrow. NaN where ``x`` or ``y`` is constant; without ends for fewer
    than three groups.
    """
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    indices: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        indices.setdefault(group, []).append(index)
    members = [np.array(index) for index in indices.values()]
    value = float(_spearman(across, up))
    if len(members) < 3 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    by_length: dict[int, list[np.ndarray]] = {}  # samples of one length are one array
    for draw in generator.integers(len(members), size=(resamples, len(members))):
        sample = np.concatenate([members[i] for i in draw])
        by_length.setdefault(len(sample), []).append(sample)
    correlations = np.concatenate(
        [_spearman(across[rows], up[rows]) for rows in map(np.stack, by_length.values())]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(correlations, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis, NaN where ``x`` or ``y`` is constant."""
    ranks = [scipy.stats.rankdata(values, axis=-1) for values in (x, y)]
    first, second = (values - values.mean(-1, keepdims=True) for values in ranks)
    lengths = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    products = (first * second).sum(-1)
    with np.errstate(invalid="ignore"):
        correlations: np.ndarray = products / lengths
    return correlations


def _quantile(freedom: float) -> float:
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
