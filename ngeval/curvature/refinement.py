"""Solutions for rows A + E by those for A, which show what rounding of the size of E would change.

No decomposition is made for A + E. A few sweeps of refinement by that of A reach the digits of one,
as long as E is small beside the smallest singular value; where it is not, the change is large.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ngeval.curvature.row_svd import RowSvd, Solution, row_lengths, unit_vector

SWEEPS = 3
"""The change falls by the relative size of E in every sweep."""


def refined(
    svd: RowSvd,
    solution: Solution,
    right: Tensor | None,
    damping: float,
    lost: Tensor | None = None,
) -> Solution:
    """The solution for A + E, E being the change of the decomposition.

    Args:
        svd: of A.
        solution: d = (AᵀA + λI)⁻¹g; its slope is not changed.
        right: b where g is Aᵀb; None for a g that does not depend on A.
        damping: λ.
        lost: the part of such a g that a pseudo-inverse leaves out.
    """
    if svd.change is None or not 0 < solution.size < math.inf:
        return solution
    if _is_lost(svd, svd.change, right, damping):
        return replace(solution, size=math.nan)
    # All is divided by max(scale², λ), in an order in which nothing underflows or overflows.
    relative = damping / svd.scale / svd.scale
    inverse, shift = 1 / max(1.0, relative), min(1.0, relative)
    if right is not None and relative <= 1:
        right = right / svd.scale / solution.size
    elif right is not None:
        right = right * (svd.scale / solution.size / damping)
    independent = svd.rank == int(svd.rows.any(1).sum())
    if independent and (right is not None or shift > 0):
        step, change = _by_rows(svd, svd.change, solution, right, inverse, shift)
    else:
        if lost is not None:
            lost = lost / svd.scale / svd.scale / solution.size
        step, change = _by_columns(svd, svd.change, solution, right, lost, inverse, shift)
    vector, length = unit_vector(solution.vector + step)
    image = (solution.image + svd.scale * change) / length
    return replace(solution, vector=vector, size=solution.size * length, image=image)


def _is_lost(svd: RowSvd, change: Tensor, right: Tensor | None, damping: float) -> bool:
    """Whether a row that is no longer than its change decides about the solution.

    A row that underflows is one; no correction to first order finds what it would do.
    """
    lengths = row_lengths(change)
    rounding = svd.lengths < lengths  # not of rows that cancel: their rank is decided already
    rounding &= lengths * svd.scale > damping**0.5
    return bool(rounding.any() if right is None else (rounding & (right != 0)).any())


def _by_rows(
    svd: RowSvd,
    change: Tensor,
    solution: Solution,
    right: Tensor | None,
    inverse: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The changes of d and Ad for independent rows.

    With w = (AAᵀ + λ)⁻¹b, or −Ad/λ without b, d changes by Eᵀw + (A + E)ᵀω, where
    ((A + E)(A + E)ᵀ + λ)ω = −Ed − (A + E)Eᵀw. Nothing large cancels in that.
    """
    squares = inverse * svd.singular.square() + shift
    if right is None:
        weights = solution.image * (-inverse / shift / svd.scale)
    else:
        weights = svd.left @ ((svd.left.T @ right) / squares)
        if shift > 0:  # a row of A that is 0 has the weight b/λ
            weights = torch.where(svd.rows.any(1), weights, right / shift)
    step = change.T @ weights
    image = change @ solution.vector + svd.rows @ step + change @ step
    total = torch.zeros_like(squares)
    for _ in range(SWEEPS):
        part = -(inverse * (svd.left.T @ image) + shift * total) / squares
        total = total + part
        moved = change.T @ (svd.left @ part)
        image = image + svd.left @ (svd.singular.square() * part) + svd.rows @ moved
        moved = moved + svd.right @ (svd.singular * part)
        step, image = step + moved, image + change @ moved
    # That is what is left of b in the end, −λω, where the sum has lost its digits.
    return step, svd.left @ total * (-shift / inverse) if inverse > 0 else image


def _by_columns(
    svd: RowSvd,
    change: Tensor,
    solution: Solution,
    right: Tensor | None,
    lost: Tensor | None,
    inverse: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The changes of d and Ad for dependent rows, in turn in the range of Aᵀ and outside of it.

    With e the change of Ad and D that of d, the residual is Eᵀ(b − Ad − e) − Aᵀe − λD, in which
    nothing large cancels.
    """
    rest = -inverse * solution.image / svd.scale
    rest = rest if right is None else rest + right
    gained = 0.0 if lost is None else (svd.left.T @ (change @ lost)) / svd.singular
    image = change @ solution.vector
    inside, outside = torch.zeros_like(svd.singular), torch.zeros_like(solution.vector)
    for _ in range(SWEEPS):
        residual = svd.right.T @ (change.T @ (rest - inverse * image)) + gained
        residual = residual - inverse * svd.singular * (svd.left.T @ image) - shift * inside
        parts = residual / (inverse * svd.singular.square() + shift)
        inside = inside + parts
        image = image + svd.left @ (svd.singular * parts) + change @ (svd.right @ parts)
        if shift > 0 and svd.rank < len(outside):
            # Outside of V there is only λ and E: a step to the least along the residual.
            residual = change.T @ (rest - inverse * image) - shift * outside
            residual = residual - svd.right @ (svd.right.T @ residual)
            step, length = unit_vector(residual)
            moved = change @ step
            length = length / (inverse * float(moved.square().sum()) + shift)
            outside, image = outside + step * length, image + moved * length
    return svd.right @ inside + outside, image
