"""Two-sided bounds on γ, as far apart as what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bounds:
    """Bounds on the natural gradient's γ(λ).

    Attributes:
        lower: γ of (F + λI)⁻¹g is at least this, shape ``(L,)``.
        upper: and at most this.
    """

    lower: np.ndarray
    upper: np.ndarray

    def widened(self, error: float | np.ndarray) -> Bounds:
        """Wider on both sides by twice a relative error; none where that is not small."""
        factor = np.where(np.asarray(error) < 0.1, 1 + 2 * np.asarray(error), math.inf)
        return Bounds(self.lower / factor, self.upper * factor)

    def distances(self, gammas: np.ndarray) -> np.ndarray:
        """How far γ are outside of the bounds, relative; 0 inside of them."""
        with np.errstate(invalid="ignore", divide="ignore"):
            outside = np.maximum(self.lower / gammas, gammas / self.upper) - 1
        distances: np.ndarray = np.fmax(outside, 0.0)
        return distances

    @property
    def gaps(self) -> np.ndarray:
        """upper/lower − 1, shape ``(L,)``."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(np.isinf(self.lower), 1.0, self.upper / self.lower)
        gaps: np.ndarray = np.nan_to_num(ratio - 1, nan=np.inf)
        return gaps

    @property
    def gap(self) -> float:
        """The largest gap."""
        return float(self.gaps.max(initial=0.0))
