"""(K + λI)⁻¹b for one λ, by a Cholesky factor where that is as good as the whole spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.spectrum import MOST_CUT, _check_finite

LEAST = 1e-9
"""Least eigenvalue, with unit diagonal, of a matrix that float64 products are still good for."""

LOST = 1e-4
"""What part of an update, relative to its length, rounding of the rows may make up."""


def solve_damped(
    matrix: Tensor, right: Tensor, damping: float, row_epsilon: float
) -> Tensor | None:
    """(K + λI)⁻¹b by a Cholesky factor, None where only the spectrum of K tells.

    K = RRᵀ is scaled to unit diagonal. Its factor serves if K has full rank by the rule of
    `Spectrum.of_gram` (with its least eigenvalue also above `LEAST`), or if λ makes up for what it
    lacks: (Σ_n c_n²‖R_n‖²)^½, by which the rounding of rows grows, stays below `LOST`/ε_row of
    the length (cᵀKc)^½ of the update Rᵀc.

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
    _check_finite(matrix)
    size, diagonal = len(matrix), matrix.diagonal()
    cutoff = size * max(100 * torch.finfo(torch.float64).eps, 10 * row_epsilon**2)
    own = _factor(matrix, diagonal, -max(min(cutoff, MOST_CUT), LEAST))
    damped = diagonal + damping
    if own is None and (damping == 0 or _factor(matrix, damped, -LEAST, damping) is None):
        return None
    factor = _factor(matrix, damped, 0.0, damping)
    if factor is None:
        return None
    inverse = torch.where(diagonal > 0, damped.rsqrt(), 0.0)
    solved = torch.cholesky_solve((inverse * right).unsqueeze(1), factor).squeeze(1) * inverse
    # Once refined: what the factor lacks in digits shows in the residual.
    for _ in range(2):
        residual = torch.where(diagonal > 0, right - matrix @ solved - damping * solved, 0.0)
        change = torch.cholesky_solve((inverse * residual).unsqueeze(1), factor).squeeze(1)
        solved = solved + change * inverse
    if own is None:
        grown = (solved.square() * diagonal).sum().sqrt() * row_epsilon
        length = (solved @ matrix @ solved).clamp_min(0).sqrt()
        if not bool(grown <= LOST * length):
            return None
    return solved


def _factor(matrix: Tensor, diagonal: Tensor, shift: float, damping: float = 0.0) -> Tensor | None:
    """The Cholesky factor of D^-½(K + λI)D^-½ + shift·I, None if that is not positive definite."""
    inverse = torch.where(diagonal > damping, diagonal.rsqrt(), 0.0)
    unit = matrix * inverse * inverse.unsqueeze(1)
    unit.diagonal().fill_(1.0 + shift)
    factor, info = torch.linalg.cholesky_ex(unit)
    return factor if int(info) == 0 else None
