"""The logit kernel Θ = JJᵀ, Gram matrices made from it, and one factorisation for every λ.

Every update of the form d = Jᵀw (sgd, ef, ief, sf, ng) has the logit tangent t = Θw, so once Θ
is there, no method and no damping needs another pass through the model. Θ is the empirical
neural tangent kernel of Jacot et al. (arXiv 1806.07572).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from ngeval.errors import EngineError, NumericalError
from ngeval.fisher import unit_cotangents
from ngeval.jacobians import gram_matrix
from ngeval.problem import Problem

# Up to this size a Gram matrix is factored to high relative accuracy (see Spectrum.of).
GRADED_SIZE = 800


def logit_kernel(problem: Problem) -> Tensor:
    """Θ = JJᵀ of a problem: float64, shape ``(NC, NC)``, computed once per problem.

    Row n·C + c belongs to output c of sample n (outputs flattened over positions).

    Raises:
        EngineError: Θ and its factorisation would not fit in the problem's memory budget.
    """
    size = problem.num_samples * problem.num_outputs
    # Θ, SᵀΘS, its eigenvectors and LAPACK's workspace of the same size.
    needed, budget = 5 * 8 * size**2, problem.rows.memory
    if needed > budget:
        fits = int((budget / 40) ** 0.5 / problem.num_outputs)
        advice = (
            f"at most {fits} samples fit"
            if fits
            else f"not even one sample of {problem.num_outputs} outputs fits"
        )
        raise EngineError(
            f"the logit kernel of {problem.num_samples} samples × {problem.num_outputs} outputs "
            f"needs {needed / 2**30:.1f} GiB, over the memory budget of "
            f"{budget / 2**30:.1f} GiB: {advice}; use a smaller batch or raise memory="
        )
    return problem.remember(
        "logit_kernel", lambda: gram_matrix(problem.rows, unit_cotangents(problem))
    )


def tangents_of(problem: Problem, cotangents: Tensor) -> Tensor:
    """T = Θw for cotangent fields w with any leading dimensions: the same shape."""
    theta = logit_kernel(problem)
    size = theta.shape[0]
    return (cotangents.reshape(-1, size) @ theta).reshape(cotangents.shape)


def gradient_products(problem: Problem, left: Tensor, right: Tensor) -> Tensor:
    """Inner products (J_nᵀa_qn)·(J_mᵀb_pm) of per-sample gradients, from Θ alone.

    Args:
        problem: the problem.
        left: a, shape ``(Q, N, *positions, C)``: Q cotangents for each sample.
        right: b, shape ``(R, N, *positions, C)``.

    Returns:
        Shape ``(Q·N, R·N)``; row q·N + n. With a = b = u this is the gradient Gram matrix K.
    """
    samples, outputs = problem.num_samples, problem.num_outputs
    theta = logit_kernel(problem).reshape(samples, outputs, samples, outputs)
    left, right = left.reshape(-1, samples, outputs), right.reshape(-1, samples, outputs)
    half = torch.einsum("qnc,ncmd->qnmd", left, theta)
    products = torch.einsum("qnmd,rmd->qnrm", half, right)
    return products.reshape(left.shape[0] * samples, right.shape[0] * samples)


def gradient_gram(problem: Problem) -> Tensor:
    """K_nm = g_n·g_m = u_nᵀΘ_nm u_m: float64, shape ``(N, N)``."""
    residual = problem.residual.unsqueeze(0)
    return problem.remember("gradient_gram", lambda: gradient_products(problem, residual, residual))


def whitened_kernel(problem: Problem) -> Tensor:
    """SᵀΘS, whose non-zero eigenvalues are those of F: float64, shape ``(NC, NC)``."""
    theta = logit_kernel(problem)
    size = theta.shape[0]
    fields = theta.reshape(size, *problem.outputs.shape)
    half = problem.distribution.factor_transpose_product(fields).reshape(size, size)
    fields = half.T.reshape(size, *problem.outputs.shape)
    return problem.distribution.factor_transpose_product(fields).reshape(size, size)


def fisher_spectrum(problem: Problem) -> Spectrum:
    """The eigendecomposition of SᵀΘS, computed once per problem."""
    return problem.remember(
        "fisher_spectrum", lambda: Spectrum.of(whitened_kernel(problem), problem.dtype)
    )


@dataclass(frozen=True)
class Spectrum:
    """The range of a positive semi-definite matrix A: its eigenpairs above the cut-off.

    Attributes:
        eigenvalues: shape ``(rank,)``, positive.
        eigenvectors: orthonormal columns, shape ``(n, rank)``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor, row_dtype: torch.dtype) -> Spectrum:
        """Factor A, a Gram matrix of rows that were computed in ``row_dtype``.

        The relative cut-off is n·max(ε, 10 ε_row²), with ε that of float64 and ε_row that of the
        rows' dtype (3.6e-14 for n = 160 in float64, 2.3e-11 in float32): below it, what remains
        of a row after the others are projected out is rounding.

        Up to n = 800 the rows are first scaled to unit norm, A = D R D: a pivoted Cholesky
        factor L of R finds the rank (cut-off relative to 1), and the SVD of D L gives the
        eigenpairs. A small gradient thus keeps its digits beside large ones: eigenvalues are
        resolved down to ε² of the largest, not ε. Larger matrices (SᵀΘS, as a rule) are
        decomposed as they are, with the cut-off relative to the largest eigenvalue.

        Raises:
            NumericalError: A has NaN or infinite entries.
        """
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(
                "a Gram matrix has NaN or infinite entries: gradients overflow at these weights; "
                "try dtype=torch.float64"
            )
        size = matrix.shape[0]
        row_eps = torch.finfo(row_dtype).eps
        cutoff = size * max(torch.finfo(torch.float64).eps, 10 * row_eps**2)
        pairs = _graded_eigenpairs if size <= GRADED_SIZE else _plain_eigenpairs
        eigenvalues, eigenvectors = pairs(matrix.to("cpu", torch.float64), cutoff)
        return cls(eigenvalues.to(matrix.device), eigenvectors.to(matrix.device))

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

    def projected_norm(self, vector: Tensor) -> float:
        """The norm of the projection of ``vector`` onto the range."""
        return float((self.eigenvectors.T @ vector).norm())


def _graded_eigenpairs(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Eigenpairs from the SVD of a row-scaled, pivoted Cholesky factor."""
    scale = matrix.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    unit = (matrix * inverse * inverse.unsqueeze(1)).numpy()
    factor, pivots, rank, _ = lapack.dpstrf(unit, tol=cutoff, lower=1)
    lower = np.zeros((matrix.shape[0], int(rank)))
    lower[pivots - 1] = np.tril(factor)[:, : int(rank)]
    left, singular, _ = torch.linalg.svd(
        scale.unsqueeze(1) * torch.from_numpy(lower), full_matrices=False
    )
    kept = singular > 0
    return singular[kept].square(), left[:, kept]


def _plain_eigenpairs(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    kept = eigenvalues > cutoff * eigenvalues.max().clamp_min(0)
    return eigenvalues[kept], eigenvectors[:, kept]
