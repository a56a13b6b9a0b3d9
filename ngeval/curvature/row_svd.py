"""Factor once, solve for every λ: the singular values of a matrix of rows.

Rows may differ in length by hundreds of orders of magnitude (the gradients of learnt and unlearnt
samples do). A one-sided Jacobi method keeps every row's digits (Demmel et al., "Computing the
singular value decomposition with high relative accuracy", 1999), so that no direction has to be
left out at λ > 0. Only λ = 0 asks for a rank: that of the rows scaled to unit length.
"""

from __future__ import annotations

import functools
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

RANK = 10
"""At λ = 0 a row is left out where less than this many n·ε of its length remains after the rows
before it have been projected out."""


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
        sizes = row_lengths(unit)
        sizes = sizes if lengths is None else torch.maximum(sizes, lengths / scale)
        return cls(unit, scale, *graded_svd(unit), sizes)

    def moved(self, rows: Tensor) -> RowSvd:
        """The same for rows that are near these, A + E: shape ``(n, r)``."""
        check_products(rows)
        return replace(self, change=rows / self.scale - self.rows, origin=self)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of AAᵀ, 0 for the zero matrix."""
        if not self.singular.numel():
            return 0.0
        top = self.singular.argmax()
        value = self.singular[top]
        if self.change is not None:
            value = value + self.left[:, top] @ self.change @ self.right[:, top]
        return float((self.scale * value) ** 2)

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

    def image(self, coefficients: Tensor) -> Tensor:
        """A Vc, shape ``(n,)``."""
        return self.scale * (self.left @ (self.singular * coefficients))

    def divided(self, numerator: Tensor, damping: float, factor: float) -> tuple[Tensor, float]:
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

    @property
    def root(self) -> float:
        """‖Ay‖."""
        return unit_vector(self.image)[1]


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
    short = row_lengths(part).unsqueeze(1) < singular
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


def row_lengths(rows: Tensor) -> Tensor:
    """The lengths of rows whose squares may underflow, shape ``(n,)``."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    sizes = rows.abs().amax(1, keepdim=True)
    unit = rows / torch.where(sizes > 0, sizes, 1.0)
    lengths: Tensor = sizes.squeeze(1) * unit.norm(dim=1)
    return lengths


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
