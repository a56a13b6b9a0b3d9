"""Numbers with 95 % intervals: means, differences, slopes and rank correlations."""

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
    """A number between the ends of its 95 % interval; ends are NaN where it cannot be known."""

    value: float
    low: float
    high: float

    def is_below(self, value: float) -> bool:
        """Whether all of it is; not where its end is unknown."""
        return self.high < value

    def is_above(self, value: float) -> bool:
        """Whether all of it is; not where its end is unknown."""
        return self.low > value

    def exp(self) -> Interval:
        """Of a logarithm, the number."""
        return Interval(*np.exp(self))

    def holds(self, value: float) -> bool:
        """Whether a value is in it."""
        return self.low <= value <= self.high

    def text(self, form: str = ".3g") -> str:
        """``1.2 [1.1, 1.3]``."""
        if math.isnan(self.low):
            return f"{self.value:{form}} (no interval)"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean_interval(values: ArrayLike) -> Interval:
    """Mean with Student's t interval; without ends for fewer than two values."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return Interval(float(sample.mean()) if len(sample) else math.nan, math.nan, math.nan)
    half = _quantile(len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return Interval(float(sample.mean()), float(sample.mean() - half), float(sample.mean() + half))


def geometric_interval(values: ArrayLike) -> Interval:
    """Geometric mean, with the t interval of the logarithms."""
    return mean_interval(np.log(np.asarray(values, dtype=float))).exp()


def difference_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Mean of ``first`` less mean of ``second``, by Welch's t for unequal variances."""
    samples = [np.asarray(values, dtype=float) for values in (first, second)]
    if min(map(len, samples)) == 0:
        return Interval(math.nan, math.nan, math.nan)
    value = float(samples[0].mean() - samples[1].mean())
    if min(map(len, samples)) < 2:
        return Interval(value, math.nan, math.nan)
    parts = [sample.var(ddof=1) / len(sample) for sample in samples]
    total = sum(parts)
    if total == 0:
        return Interval(value, value, value)
    # Welch and Satterthwaite's degrees of freedom.
    freedom = total**2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, samples, strict=True))
    half = _quantile(freedom) * math.sqrt(total)
    return Interval(value, value - half, value + half)


def geometric_intervals(rows: pd.DataFrame, by: str, column: str) -> dict[float, Interval]:
    """The geometric mean of a column with its interval, for every value of another one, in order.

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

    Points of one group (the batches of a checkpoint) are alike; drawn one by one they would make
    the interval too narrow. NaN where one of both is constant; without ends for fewer than three
    groups.
    """
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    places: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    members = [np.array(found) for found in places.values()]
    value = float(_spearman(across, up))
    if len(members) < 3 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    by_length: dict[int, list[np.ndarray]] = {}
    for chosen in generator.integers(len(members), size=(resamples, len(members))):
        index = np.concatenate([members[i] for i in chosen])
        by_length.setdefault(len(index), []).append(index)
    found = [_spearman(across[rows], up[rows]) for rows in map(np.stack, by_length.values())]
    drawn = np.concatenate(found)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis, NaN where one of both is constant."""
    ranks = [scipy.stats.rankdata(values, axis=-1) for values in (x, y)]
    first, second = (values - values.mean(-1, keepdims=True) for values in ranks)
    lengths = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    products = (first * second).sum(-1)
    with np.errstate(invalid="ignore"):
        correlations: np.ndarray = products / lengths
    return correlations


def _quantile(freedom: float) -> float:
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
