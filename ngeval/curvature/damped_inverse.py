"""(AᵀA + λI)⁻¹g and Aᵀ(AAᵀ + λI)⁻¹b for every λ, by the singular values of A."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ngeval.curvature.refinement import refined
from ngeval.curvature.row_svd import RowSvd, Solution, unit_vector

ROUNDING = 30 * torch.finfo(torch.float64).eps
"""Of a sum of rows, relative to the sum of the lengths of all its terms."""


def ridge(rows: RowSvd, target: Tensor, damping: float) -> Solution:
    """Aᵀ(AAᵀ + λI)⁻¹b, whose ``slope`` is with the sum of the rows.

    Args:
        rows: A, factored.
        target: b, shape ``(n,)``.
        damping: λ ≥ 0; 0 is the pseudo-inverse, of `at_zero`.
    """
    svd = rows.at(damping)
    unit, size = svd.divided(svd.singular * (svd.left.T @ target), damping, 1.0)
    image = svd.image(unit)
    solution = Solution(svd.right @ unit, size, float(image.sum()), image)
    corrected = refined(svd, solution, target, damping)
    return replace(corrected, slope=float(corrected.image.sum()))


@dataclass(frozen=True)
class RowSum:
    """A gradient g, in the coordinates of a matrix A of which it is Aᵀr.

    Attributes:
        total: g, shape ``(r,)``.
        length: the sum of the lengths of all terms that g is the sum of.
        right: r, one entry for each row of A; None if it is not known.
    """

    total: Tensor
    length: float
    right: Tensor | None = None

    @property
    def rounding(self) -> float:
        """A part of g no longer than this is the rounding of the sum."""
        return ROUNDING * self.length


class DampedInverse:
    """(AᵀA + λI)⁻¹g for every λ: V(Σ² + λ)⁻¹Vᵀg in the range of Aᵀ, and g/λ outside of it.

    No difference of large numbers is formed, however small λ is. A gradient lies in the range, but
    for directions of which AᵀA has nothing left in float64.
    """

    def __init__(self, rows: RowSvd, gradient: RowSum) -> None:
        self.rows = rows
        self.gradient = gradient

    @cached_property
    def outside(self) -> Tensor | None:
        """The part g − VVᵀg; None where that is the rounding of g, or the correction's."""
        outside = self.gradient.total
        if self.rows.change is not None and self.gradient.right is not None:
            return None
        for _ in range(2):  # the second projection removes the rounding of the first
            outside = outside - self.rows.right @ (self.rows.right.T @ outside)
        return outside if float(outside.norm()) > self.gradient.rounding else None

    @cached_property
    def _coefficients(self) -> Tensor:
        return _gradient_coefficients(self.rows, self.gradient)

    @cached_property
    def _coefficients_at_zero(self) -> Tensor:
        return _gradient_coefficients(self.rows.at_zero, self.gradient)

    def solve(self, damping: float) -> Solution:
        """The solution of a λ ≥ 0; 0 is the pseudo-inverse, of `RowSvd.at_zero`."""
        svd = self.rows.at(damping)
        coefficients = self._coefficients if damping > 0 else self._coefficients_at_zero
        unit, size = svd.divided(coefficients, damping, 1 / svd.scale)
        vector, slope, image = svd.right @ unit, float(coefficients @ unit), svd.image(unit)
        solution = Solution(vector, size, slope, image)
        if damping > 0 and self.outside is not None:
            # λd, whose parts are at most as long as g.
            inside = size * damping
            whole, length = unit_vector(vector * inside + self.outside)
            slope = (slope * inside + float(self.outside @ self.outside)) / length
            solution = Solution(whole, length / damping, slope, image * (inside / length))
        return self._moved(svd, solution, damping)

    def _moved(self, svd: RowSvd, solution: Solution, damping: float) -> Solution:
        """Of rows A + E with g = (A + E)ᵀr, or g as it is where r is not known."""
        if svd.change is None:
            return solution
        right, base = self.gradient.right, solution.vector
        lost = self.outside if damping == 0 else None
        corrected = refined(svd, solution, right, damping, lost)
        slope = solution.slope + float(self.gradient.total @ (corrected.vector - base))
        if right is not None:
            slope += svd.scale * float(right @ (svd.change @ base))
        return replace(corrected, slope=slope)

    def least_gamma(self) -> float:
        """(gᵀ(AᵀA)⁺g)^(−1/2), ∞ where g = 0."""
        svd = self.rows.at_zero
        parts = self._coefficients_at_zero / svd.singular / svd.scale
        return 1 / unit_vector(parts)[1] if bool(parts.any()) else math.inf


def _gradient_coefficients(svd: RowSvd, gradient: RowSum) -> Tensor:
    """C = Vᵀg of a gradient g = Aᵀr, as ΣUᵀr.

    Without r, what may be the rounding of g is left out.
    """
    if gradient.right is None:
        direct = svd.right.T @ gradient.total
        return torch.where(direct.abs() > gradient.rounding, direct, 0.0)
    coefficients: Tensor = svd.scale * (svd.singular * (svd.left.T @ gradient.right))
    return coefficients
