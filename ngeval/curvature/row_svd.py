"""Factor once, solve for every λ: the singular values of a matrix of rows.

Rows may differ in length by hundreds of orders of magnitude (the gradients of learnt and unlearnt
samples do). A one-sided Jacobi method keeps every row's digits (Demmel et al., "Computing the
singular value decomposition with high relative accuracy", 1999), so that no direction has to be
left out at λ > 0. Only λ = 0 asks for a rank: that of the rows scaled to unit length.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy
import threadpoolctl
import torch
from torch import Tensor

from ngeval.errors import NumericalError
from ngeval.model.checks import is_finite

JACOBI_SIZE = 1000
"""Up to this number of rows or columns every row keeps its digits; more are decomposed by divide
and conquer, which keeps digits relative to the largest row."""

ROUNDING = 30 * torch.finfo(torch.float64).eps
"""Of a sum of rows, relative to the sum of the lengths of all its terms."""

RANK = 10
"""At λ = 0 a row is left out where less than this many n·ε of its length remains after the rows
before it have been projected out."""


SWEEPS = 3
"""Of the refinement for rows that have changed."""


@dataclass(frozen=True)
class RowSvd:
    """A matrix of rows A = U diag(σ) Vᵀ with its scale taken out: A = scale · U diag(σ) Vᵀ.

    Attributes:
        rows: A / scale, float64, shape ``(n, r)``.
        scale: the largest entry of A in size (1 for the zero matrix).
        left: U, orthonormal columns, shape ``(n, k)``.
        singular: σ > 0, shape ``(k,)``.
        right: V, orthonormal columns, shape ``(r, k)``.
        lengths: of what each row was summed from, relative to the scale, shape ``(n,)``: a row
            that is far shorter is the rounding of a sum that cancels.
        change: E / scale for rows A + E near those that are factored, whose solutions are those of
            A corrected to first order in E; None for A's own.
        origin: the factorisation of A itself, where there is such a change.
    """

    rows: Tensor
    scale: float
    left: Tensor
    singular: Tensor
    right: Tensor
    lengths: Tensor
    change: Tensor | None = None
    origin: RowSvd | None = None

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor | None = None) -> RowSvd:
        """Factor rows.

        Args:
            rows: float64, shape ``(n, r)``.
            lengths: of the terms that each row is the sum of, shape ``(n,)``; None for the rows'.

        Raises:
            NumericalError: rows have NaN or infinite entries.
        """
        check_products(rows)
        scale = float(rows.abs().max()) if rows.numel() else 0.0
        scale = scale if scale > 0 else 1.0
        unit = rows / scale
        sizes = unit.norm(dim=1)
        sizes = sizes if lengths is None else torch.maximum(sizes, lengths / scale)
        return cls(unit, scale, *graded_svd(unit), sizes)

    def moved(self, rows: Tensor) -> RowSvd:
        """The same for rows that are near these, A + E: shape ``(n, r)``."""
        check_products(rows)
        return replace(self, change=rows / self.scale - self.rows, origin=self)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of AAᵀ, 0 for the zero matrix."""
        return float((self.scale * self.singular.max()) ** 2) if self.singular.numel() else 0.0

    @cached_property
    def at_zero(self) -> RowSvd:
        """The factorisation for λ = 0: rows that the others span to rounding are projected on them.

        Its rank is that of the rows scaled by their `lengths`, by a pivoted QR factorisation.
        """
        if self.origin is not None:
            zero = self.origin.at_zero
            return replace(zero, change=self.change, origin=zero)
        lengths = self.lengths
        unit = self.rows / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
        columns = unit.T.cpu().numpy()
        with one_thread():
            upper, _ = scipy.linalg.qr(columns, mode="r", pivoting=True)
            cutoff = RANK * len(unit) * np.finfo(np.float64).eps
            rank = int((np.abs(np.diagonal(upper)) > cutoff).sum())
            if rank == self.rank:
                return self
            basis, upper, pivots = scipy.linalg.qr(columns, mode="economic", pivoting=True)
        lower = np.zeros((len(unit), rank))
        lower[pivots] = upper[:rank].T
        kept = lengths.unsqueeze(1) * torch.from_numpy(lower).to(self.rows)
        left, singular, right = graded_svd(kept)
        span = torch.from_numpy(basis[:, :rank]).to(self.rows)
        kept, right = kept @ span.T, span @ right
        return RowSvd(kept, self.scale, left, singular, right, lengths)

    def at(self, damping: float) -> RowSvd:
        """The factorisation that λ is solved with."""
        return self if damping > 0 else self.at_zero

    @property
    def rank(self) -> int:
        """The number of singular values."""
        return len(self.singular)

    def ridge(self, target: Tensor, damping: float) -> Solution:
        """Aᵀ(AAᵀ + λI)⁻¹b, whose ``slope`` is with the sum of the rows.

        Args:
            target: b, shape ``(n,)``.
            damping: λ ≥ 0; 0 is the pseudo-inverse, of `at_zero`.
        """
        svd = self.at(damping)
        unit, size = svd._divided(svd.singular * (svd.left.T @ target), damping, 1.0)
        image = svd.image(unit)
        solution = Solution(svd.right @ unit, size, float(image.sum()), image)
        corrected = svd._corrected(solution, target, damping)
        return replace(corrected, slope=float(corrected.image.sum()))

    def image(self, coefficients: Tensor) -> Tensor:
        """A Vc, shape ``(n,)``."""
        return self.scale * (self.left @ (self.singular * coefficients))

    def gradient_coefficients(self, gradient: RowSum) -> Tensor:
        """C = Vᵀg of a gradient g = Aᵀr, as ΣUᵀr.

        Without r, what may be the rounding of g is left out.
        """
        if gradient.right is None:
            direct = self.right.T @ gradient.total
            return torch.where(direct.abs() > gradient.rounding, direct, 0.0)
        coefficients: Tensor = self.scale * (self.singular * (self.left.T @ gradient.right))
        return coefficients

    def _corrected(
        self, solution: Solution, right: Tensor | None, damping: float, lost: Tensor | None = None
    ) -> Solution:
        """The solution for A + E, by refinement.

        Args:
            solution: d = P g with P = (AᵀA + λI)⁻¹; its slope is not corrected.
            right: b where g is Aᵀb; None for a g that does not depend on A.
            damping: λ.
            lost: the part of such a g that a pseudo-inverse leaves out.
        """
        if self.change is None or not 0 < solution.size < math.inf:
            return solution
        # All is divided by max(scale², λ), in an order in which nothing underflows or overflows.
        relative = damping / self.scale / self.scale
        inverse, shift = 1 / max(1.0, relative), min(1.0, relative)
        if right is not None and relative <= 1:
            right = right / self.scale / solution.size
        elif right is not None:
            right = right * (self.scale / solution.size / damping)
        independent = self.rank == int(self.rows.any(1).sum())
        if independent and (right is not None or shift > 0):
            step, change = self._refined_by_rows(solution, right, inverse, shift)
        else:
            if lost is not None:
                lost = lost / self.scale / self.scale / solution.size
            step, change = self._refined_by_columns(solution, right, lost, inverse, shift)
        vector, length = unit_vector(solution.vector + step)
        image = (solution.image + self.scale * change) / length
        return replace(solution, vector=vector, size=solution.size * length, image=image)

    def _refined_by_rows(
        self, solution: Solution, right: Tensor | None, inverse: float, shift: float
    ) -> tuple[Tensor, Tensor]:
        """The changes of d and Ad for independent rows.

        With w = (AAᵀ + λ)⁻¹b, or −Ad/λ without b, d changes by Eᵀw + (A + E)ᵀω, where
        ((A + E)(A + E)ᵀ + λ)ω = −Ed − (A + E)Eᵀw. Nothing large cancels in that.
        """
        squares = inverse * self.singular.square() + shift
        if right is None:
            weights = solution.image * (-inverse / shift / self.scale)
        else:
            weights = self.left @ ((self.left.T @ right) / squares)
        step = self.change.T @ weights
        change = self.change @ solution.vector + self.rows @ step + self.change @ step
        total = torch.zeros_like(squares)
        for _ in range(SWEEPS):
            part = -(inverse * (self.left.T @ change) + shift * total) / squares
            total = total + part
            moved = self.change.T @ (self.left @ part)
            change = change + self.left @ (self.singular.square() * part) + self.rows @ moved
            moved = moved + self.right @ (self.singular * part)
            step, change = step + moved, change + self.change @ moved
        # That is what is left of b in the end, −λω, where the sum has lost its digits.
        return step, self.left @ total * (-shift / inverse) if inverse > 0 else change

    def _refined_by_columns(
        self,
        solution: Solution,
        right: Tensor | None,
        lost: Tensor | None,
        inverse: float,
        shift: float,
    ) -> tuple[Tensor, Tensor]:
        """The changes of d and Ad for dependent rows, in turn in the range of Aᵀ and outside of it.

        With e the change of Ad and D that of d, the residual is Eᵀ(b − Ad − e) − Aᵀe − λD, in
        which nothing large cancels.
        """
        rest = -inverse * solution.image / self.scale
        rest = rest if right is None else rest + right
        gained = 0.0 if lost is None else (self.left.T @ (self.change @ lost)) / self.singular
        change = self.change @ solution.vector
        inside, outside = torch.zeros_like(self.singular), torch.zeros_like(solution.vector)
        for _ in range(SWEEPS):
            residual = self.right.T @ (self.change.T @ (rest - inverse * change)) + gained
            residual = residual - inverse * self.singular * (self.left.T @ change) - shift * inside
            parts = residual / (inverse * self.singular.square() + shift)
            inside = inside + parts
            change = change + self.left @ (self.singular * parts)
            change = change + self.change @ (self.right @ parts)
            if shift > 0:
                # Outside of V there is only λ and E: a step to the least along the residual.
                residual = self.change.T @ (rest - inverse * change) - shift * outside
                residual = residual - self.right @ (self.right.T @ residual)
                step, length = unit_vector(residual)
                image = self.change @ step
                length = length / (inverse * float(image.square().sum()) + shift)
                outside, change = outside + step * length, change + image * length
        return self.right @ inside + outside, change

    def _divided(self, numerator: Tensor, damping: float, factor: float) -> tuple[Tensor, float]:
        """Factor · scale · diag(1/(scale²σ² + λ)) c, as a unit vector and a length.

        The factor is near 1 or 1/scale, and the order of the products lets none of them underflow.
        """
        squares = self.singular.square()
        relative = damping / self.scale / self.scale
        if relative <= 1:
            unit, length = unit_vector(numerator / (squares + relative))
            return unit, length * factor / self.scale
        inverse = self.scale / damping * self.scale
        unit, length = unit_vector(numerator / (squares * inverse + 1))
        return unit, length * (factor * (self.scale / damping))


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
        return self.rows.gradient_coefficients(self.gradient)

    @cached_property
    def _coefficients_at_zero(self) -> Tensor:
        return self.rows.at_zero.gradient_coefficients(self.gradient)

    def solve(self, damping: float) -> Solution:
        """The solution of a λ ≥ 0; 0 is the pseudo-inverse, of `RowSvd.at_zero`."""
        svd = self.rows.at(damping)
        coefficients = self._coefficients if damping > 0 else self._coefficients_at_zero
        unit, size = svd._divided(coefficients, damping, 1 / svd.scale)
        vector, slope, image = svd.right @ unit, float(coefficients @ unit), svd.image(unit)
        solution = Solution(vector, size, slope, image)
        if damping > 0 and self.outside is not None:
            # λd, whose parts are at most as long as g.
            inside = size * damping
            whole, length = unit_vector(vector * inside + self.outside)
            slope = (slope * inside + float(self.outside @ self.outside)) / length
            solution = Solution(whole, length / damping, slope, image * (inside / length))
        return self._corrected(svd, solution, damping)

    def _corrected(self, svd: RowSvd, solution: Solution, damping: float) -> Solution:
        """Of rows A + E with g = (A + E)ᵀr, or g as it is where r is not known."""
        if svd.change is None:
            return solution
        right, base = self.gradient.right, solution.vector
        lost = self.outside if damping == 0 else None
        corrected = svd._corrected(solution, right, damping, lost)
        slope = solution.slope + float(self.gradient.total @ (corrected.vector - base))
        if right is not None:
            slope += svd.scale * float(right @ (svd.change @ base))
        return replace(corrected, slope=slope)

    def least_gamma(self) -> float:
        """(gᵀ(AᵀA)⁺g)^(−1/2), ∞ where g = 0."""
        svd = self.rows.at_zero
        parts = self._coefficients_at_zero / svd.singular / svd.scale
        return 1 / unit_vector(parts)[1] if bool(parts.any()) else math.inf


@dataclass(frozen=True)
class Solution:
    """A solution d = size · y.

    Attributes:
        vector: y of length 1, or 0, shape ``(r,)``.
        size: ‖d‖, which can leave float64's range.
        slope: gᵀy.
        image: Ay, shape ``(n,)``.
    """

    vector: Tensor
    size: float
    slope: float
    image: Tensor


def graded_svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and V of rows whose entries are at most 1 in size; only σ > 0."""
    nonzero = rows.any(1)
    part = rows[nonzero]
    if max(part.shape) > JACOBI_SIZE and min(part.shape) > JACOBI_SIZE // 2:
        inner, singular, right = torch.linalg.svd(part, full_matrices=False)
        right = right.T
    else:
        parts = _jacobi(part.cpu().numpy())
        inner, singular, right = (torch.from_numpy(each).to(rows) for each in parts)
    kept = singular > 0
    inner, singular, right = inner[:, kept], singular[kept], right[:, kept]
    # v_jᵀa_i = σ_j u_ij, with errors of ε‖a_i‖ and εσ_j: the first is better for rows shorter than
    # σ_j, which an improbable label's are.
    short = part.norm(dim=1, keepdim=True) < singular
    left = rows.new_zeros(len(rows), len(singular))
    left[nonzero] = torch.where(short, part @ right / singular, inner)
    return left, singular, right


def _jacobi(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By LAPACK's preconditioned Jacobi method, for which the rows are columns."""
    count, width = rows.shape
    if not rows.any():
        return np.zeros((count, 0)), np.zeros(0), np.zeros((width, 0))
    with one_thread():
        if count <= width:
            right, singular, left = _columns(rows.T)
            return left, singular, right
        # More rows than columns: a QR factorisation of the rows in the order of their sizes, with
        # pivoting, keeps the digits of each (Cox and Higham, 1998).
        order = np.argsort(-np.abs(rows).max(1), kind="stable")
        basis, upper, pivots = scipy.linalg.qr(rows[order], mode="economic", pivoting=True)
        inner, singular, outer = _columns(upper.T)
        left, right = np.empty((count, len(singular))), np.empty((width, len(singular)))
        left[order] = basis @ outer
        right[pivots] = inner
        return left, singular, right


def _columns(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, left, right, work, _, info = scipy.linalg.lapack.dgejsv(
        np.asfortranarray(matrix), joba=0, jobu=0, jobv=0
    )
    if info != 0:
        raise NumericalError(f"the singular value decomposition did not converge (info {info})")
    return left[:, : len(values)], values * (work[0] / work[1]), right


def unit_vector(vector: Tensor) -> tuple[Tensor, float]:
    """A vector of length 1, or 0, and the length."""
    size = float(vector.abs().max()) if vector.numel() else 0.0
    if size == 0 or not np.isfinite(size):
        return vector, size
    scaled = vector / size
    length = float(scaled.norm())
    return scaled / length, length * size


@functools.cache
def _scipy_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


def one_thread() -> AbstractContextManager[object]:
    """One thread in scipy: its threads would spin on after a call, on cores that torch needs."""
    limit: AbstractContextManager[object] = _scipy_pools().limit(limits=1)
    return limit


def check_products(tensor: Tensor) -> None:
    """Raise if rows, or products of them, overflow."""
    if not is_finite(tensor):
        raise NumericalError(
            "per-sample gradients overflow at these weights (NaN or infinite inner products); "
            "try dtype=torch.float64"
        )
