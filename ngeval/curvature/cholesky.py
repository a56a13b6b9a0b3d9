"""(K + λI)⁻¹b for one λ, by a Cholesky factor where that is as good as the whole spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.curvature.spectrum import MAX_CUTOFF, check_products

LEAST = 1e-9
"""The least eigenvalue, with unit diagonal, at which float64 products are still precise enough."""

LOST = 1e-4
"""The part of an update, relative to its length, that rounding of the rows may contribute."""

FINEST = 1e-9
"""Rows count as no more precise than this: their products are float64, too."""


def solve_damped(
    matrix: Tensor, right: Tensor, damping: float, row_epsilon: float
) -> Tensor | None:
    """(K + λI)⁻¹b by a Cholesky factor, None where it needs the spectrum of K.

    K + λI is scaled to unit diagonal. The solution is accepted if (Σ_n c_n²‖R_n‖²)^½, by which
    the rounding of the rows of K = RRᵀ grows, stays below `LOST`/ε_row of the length (cᵀKc)^½ of
    the update Rᵀc, or if K has full rank by the rule of `Spectrum.of_gram`, with its least
    eigenvalue also above `LEAST`.

    Args:
        matrix: K, float64, shape ``(n, n)``; a row of zeros has c = 0.
        right: b, shape ``(n,)``.
        damping: λ ≥ 0.
        row_epsilon: the rounding of rows, `ModelFunction.row_epsilon`.

    Returns:
        c, shape ``(n,)``.

    Raises:
        NumericalError: K has NaN or infinite entries.
    """
    check_products(matrix)
    diagonal = matrix.diagonal()
    factor = _factor(matrix, diagonal, damping, 0.0)
    if factor is None:
        return None
    inverse = torch.where(diagonal > 0, (diagonal + damping).rsqrt(), 0.0)
    target = torch.where(diagonal > 0, right, 0.0)
    solved = _solve(factor, inverse, target)
    image = matrix @ solved
    remainder = torch.where(diagonal > 0, target - image - damping * solved, 0.0)
    if float(remainder.abs().max()) > 1e-13 * float(target.abs().max()):
        solved = solved + _solve(factor, inverse, remainder)  # one step of iterative refinement
    grown = float((solved.square() @ diagonal).sqrt()) * max(row_epsilon, FINEST)
    if grown <= LOST * float((solved @ image).clamp_min(0).sqrt()):
        return solved
    cutoff = len(matrix) * max(100 * torch.finfo(torch.float64).eps, 10 * row_epsilon**2)
    full_rank = _factor(matrix, diagonal, 0.0, max(min(cutoff, MAX_CUTOFF), LEAST)) is not None
    return solved if full_rank else None


def _factor(matrix: Tensor, diagonal: Tensor, damping: float, less: float) -> Tensor | None:
    """The Cholesky factor of D^-½(K + λI)D^-½ − less·I, None if that is not positive definite."""
    inverse = torch.where(diagonal > 0, (diagonal + damping).rsqrt(), 0.0)
    unit = matrix * inverse * inverse.unsqueeze(1)
    unit.diagonal().fill_(1.0 - less)
    factor, info = torch.linalg.cholesky_ex(unit)
    return factor if int(info) == 0 else None


def _solve(factor: Tensor, inverse: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve((inverse * right).unsqueeze(1), factor).squeeze(1) * inverse
