"""Factor once, solve for every λ: the spectrum of a Gram matrix A = RRᵀ of rows.

Rows may differ in length by many orders of magnitude (the gradients of learnt and unlearnt
samples do), so the rank is decided on rows scaled to unit length: a small gradient keeps all its
digits beside large ones, and only a row that the others span to rounding is left out.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import scipy
import threadpoolctl
import torch
from torch import Tensor

from ngeval.errors import NumericalError
from ngeval.model.checks import is_finite

GRADED_SIZE = 800
"""Larger Gram matrices are first decomposed without scaling (see `Spectrum.of_gram`)."""

MAX_CUTOFF = 1e-2
"""The largest relative cut-off; bfloat16 rows would give one above 1."""

UNSEEN = 1e-8
"""The part of the right-hand side that may be lost before rows are scaled."""


@dataclass(frozen=True)
class Spectrum:
    """The range of a positive semi-definite matrix A: its eigenpairs above the cut-off.

    Attributes:
        eigenvalues: shape ``(rank,)``, positive.
        eigenvectors: orthonormal columns, shape ``(n, rank)``.
        cutoff: eigenvalues that were left out are below about this.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    cutoff: float = 0.0

    @classmethod
    def of_rows(cls, rows: Tensor, row_epsilon: float) -> Spectrum:
        """Factor A = RRᵀ from R itself, by a pivoted QR of the scaled rows and an SVD.

        A row is left out where less than 10·n·ε of its length remains after the rows before it
        are projected out, ε being that of the rows, ``row_epsilon``.

        Args:
            rows: R, shape ``(n, P)``.
            row_epsilon: the rounding of rows, `ModelFunction.row_epsilon`.

        Raises:
            NumericalError: R has NaN or infinite entries.
        """
        check_products(rows)
        scale = rows.norm(dim=1).cpu()
        unit = (rows.cpu().double() * _inverse(scale).unsqueeze(1)).numpy()
        with _one_thread():
            upper, pivots = scipy.linalg.qr(unit.T, mode="r", pivoting=True)
        upper = upper[: min(unit.shape)]
        cutoff = min(10 * len(unit) * row_epsilon, MAX_CUTOFF**0.5)
        rank = int((np.abs(np.diagonal(upper)) > cutoff).sum())
        lower = np.zeros((len(unit), rank))
        lower[pivots] = upper[:rank].T
        return cls._of_factor(scale, lower, rows.device, cutoff**2)

    @classmethod
    def of_gram(
        cls, matrix: Tensor, row_epsilon: float, right: Tensor, unseen: float = UNSEEN
    ) -> Spectrum:
        """Factor A given as a Gram matrix.

        Its relative cut-off is n·max(100 ε, 10 ε_row²), with ε that of float64 and ε_row that of
        rows, ``row_epsilon``. A = D R D with unit diagonal in R, and a pivoted Cholesky factor of
        R gives the rank. Above n = 800 an eigendecomposition of the unscaled A, four times as
        fast, is tried first, with the cut-off 10·n·ε of the largest eigenvalue, and used if its
        range has all of ``right`` but a part of ``unseen``.

        Args:
            matrix: A, shape ``(n, n)``, float64.
            row_epsilon: the rounding of rows, `ModelFunction.row_epsilon`.
            right: the b of (A + λI)⁻¹b that the spectrum is for, shape ``(n,)``.
            unseen: relative to the length of b.

        Raises:
            NumericalError: A has NaN or infinite entries.
        """
        check_products(matrix)
        size = matrix.shape[0]
        epsilon = torch.finfo(torch.float64).eps
        cutoff = min(size * max(100 * epsilon, 10 * row_epsilon**2), MAX_CUTOFF)
        if size > GRADED_SIZE:
            eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
            least = 10 * size * epsilon * float(eigenvalues.max().clamp_min(0))
            kept = eigenvalues > least
            unscaled = cls(eigenvalues[kept], eigenvectors[:, kept], least)
            outside = right - unscaled.eigenvectors @ (unscaled.eigenvectors.T @ right)
            if float(outside.norm()) <= unseen * float(right.norm()):
                return unscaled
        scale = matrix.diagonal().clamp_min(0).sqrt().cpu()
        inverse = _inverse(scale)
        unit = (matrix.cpu() * inverse * inverse.unsqueeze(1)).numpy()
        with _one_thread():
            factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(unit, tol=cutoff, lower=1)
        lower = np.zeros((size, int(rank)))
        lower[pivots - 1] = np.tril(factor)[:, : int(rank)]
        return cls._of_factor(scale, lower, matrix.device, cutoff)

    @classmethod
    def _of_factor(
        cls, scale: Tensor, lower: np.ndarray, device: torch.device, cutoff: float
    ) -> Spectrum:
        """The spectrum of D L LᵀD, from the SVD of D L; the cut-off is that of L Lᵀ."""
        factor = scale.unsqueeze(1) * torch.from_numpy(lower)
        left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        kept = singular > 0
        largest = float(singular.square().max()) if singular.numel() else 0.0
        return cls(singular[kept].square().to(device), left[:, kept].to(device), cutoff * largest)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, 0 for the zero matrix."""
        return float(self.eigenvalues.max()) if self.eigenvalues.numel() else 0.0

    def solve(self, right: Tensor, dampings: Tensor) -> Tensor:
        """(A + λI)⁻¹b on the range of A, for every λ; λ = 0 gives the pseudo-inverse.

        The part of b outside the range is left out: it belongs to combinations of rows that
        vanish, so it never reaches an update.

        Args:
            right: b, shape ``(n,)``.
            dampings: λ ≥ 0, shape ``(L,)``.

        Returns:
            Shape ``(L, n)``.
        """
        coefficients = self.eigenvectors.T @ right
        return (coefficients / (self.eigenvalues + dampings.unsqueeze(1))) @ self.eigenvectors.T

    def image(self, right: Tensor, dampings: Tensor) -> Tensor:
        """A(A + λI)⁻¹b for every λ, shape ``(L, n)``: nothing is lost where A is badly scaled."""
        shares = self.eigenvalues / (self.eigenvalues + dampings.unsqueeze(1))
        return ((self.eigenvectors.T @ right) * shares) @ self.eigenvectors.T

    def projected_norm(self, vector: Tensor) -> float:
        """The norm of the projection of ``vector`` onto the range."""
        return float((self.eigenvectors.T @ vector).norm())


@functools.cache
def _scipy_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


def _one_thread() -> AbstractContextManager[object]:
    """One thread in scipy: its threads would spin on after a call, on cores that torch needs."""
    limit: AbstractContextManager[object] = _scipy_pools().limit(limits=1)
    return limit


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def check_products(tensor: Tensor) -> None:
    """Raise if rows, or products of them, overflow."""
    if not is_finite(tensor):
        raise NumericalError(
            "per-sample gradients overflow at these weights (NaN or infinite inner products); "
            "try dtype=torch.float64"
        )
