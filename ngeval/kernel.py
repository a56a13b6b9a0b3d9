"""The logit kernel Θ = JJᵀ, and one factorisation for every λ.

Every update of the form d = Jᵀw (sgd, ef, ief, sf, ng) has the logit tangent t = Θw, so once Θ
is there, no method and no damping needs another pass through the model. Θ is the empirical
neural tangent kernel of Jacot et al. (arXiv 1806.07572).

A small problem keeps J itself: products of J resolve singular values down to ε of the largest, a
Gram matrix only down to √ε. Larger ones keep Θ, N·C × N·C, whatever the number of parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ngeval.errors import EngineError
from ngeval.fisher import factor_columns, unit_cotangents
from ngeval.jacobians import gram_matrix
from ngeval.problem import Problem
from ngeval.spectrum import UNSEEN, Spectrum

EXPLICIT_ENTRIES = 2**22
"""Up to this many entries J is kept itself (32 MiB in float64)."""


class LogitKernel(ABC):
    """Θ of a problem as a product, and the spectra of Gram matrices made from it."""

    def __init__(self, problem: Problem) -> None:
        """Keep the sizes and the dtype that the rows are computed in."""
        self.shape = (problem.num_samples, problem.num_outputs)
        self.row_dtype = problem.dtype

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """Θ, float64, shape ``(NC, NC)``; row n·C + c belongs to output c of sample n."""

    @abstractmethod
    def push(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """The tangents and lengths of updates d = Jᵀw.

        Args:
            fields: w, shape ``(L, N, *positions, C)``.

        Returns:
            t = Θw, the same shape, and ‖d‖² = wᵀΘw, shape ``(L,)``.
        """

    @abstractmethod
    def spectrum(self, cotangents: Tensor, right: Tensor, unseen: float = UNSEEN) -> Spectrum:
        """The spectrum of the Gram matrix of rows J_nᵀv_nq, row n·Q + q.

        Args:
            cotangents: v, shape ``(N, Q, *positions, C)``. v = u gives that of K, the columns of
                S that of SᵀΘS.
            right: the vector that it will be solved for, shape ``(N·Q,)``.
            unseen: what part of it may be lost; see `Spectrum.of_gram`.
        """


class JacobianKernel(LogitKernel):
    """Θ as the product of J, shape ``(NC, P)``, and its transpose."""

    def __init__(self, problem: Problem) -> None:
        """Compute all rows of J, in float64."""
        super().__init__(problem)
        blocks = [part for _, part in problem.rows.iterate(unit_cotangents(problem))]
        self.jacobian = torch.cat([torch.cat(list(part.values()), 1).double() for part in blocks])

    @property
    def matrix(self) -> Tensor:
        """J Jᵀ."""
        return self.jacobian @ self.jacobian.T

    def push(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Through parameter space: d = Jᵀw, t = J d."""
        directions = fields.flatten(1) @ self.jacobian
        tangents = (directions @ self.jacobian.T).reshape(fields.shape)
        return tangents, directions.square().sum(1)

    def spectrum(self, cotangents: Tensor, right: Tensor, unseen: float = UNSEEN) -> Spectrum:
        """From the rows themselves."""
        samples, outputs = self.shape
        vectors = cotangents.reshape(samples, -1, outputs)
        rows = torch.bmm(vectors, self.jacobian.reshape(samples, outputs, -1))
        return Spectrum.of_rows(rows.flatten(0, 1), self.row_dtype)


class GramKernel(LogitKernel):
    """Θ itself, shape ``(NC, NC)``."""

    def __init__(self, problem: Problem) -> None:
        """Accumulate Θ in float64, in the problem's memory budget."""
        super().__init__(problem)
        self.theta = gram_matrix(problem.rows, unit_cotangents(problem))

    @property
    def matrix(self) -> Tensor:
        """Θ as it is kept."""
        return self.theta

    def push(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """T = Θw, ‖d‖² = w·t."""
        tangents = (fields.flatten(1) @ self.theta).reshape(fields.shape)
        return tangents, (fields * tangents).flatten(1).sum(1)

    def spectrum(self, cotangents: Tensor, right: Tensor, unseen: float = UNSEEN) -> Spectrum:
        """From the Gram matrix v_nqᵀ Θ_nm v_mp."""
        samples, outputs = self.shape
        vectors = cotangents.reshape(samples, -1, outputs)
        theta = self.theta.reshape(samples, outputs, samples, outputs)
        half = torch.einsum("nqc,ncmd->nqmd", vectors, theta)
        gram = torch.einsum("nqmd,mpd->nqmp", half, vectors)
        size = samples * vectors.shape[1]
        return Spectrum.of_gram(gram.reshape(size, size), self.row_dtype, right, unseen)


def logit_kernel(problem: Problem) -> LogitKernel:
    """Θ = JJᵀ of a problem, computed once.

    Raises:
        EngineError: Θ and its factorisation would not fit in the problem's memory budget.
    """
    size, budget = problem.num_samples * problem.num_outputs, problem.rows.memory
    entries = size * problem.num_parameters
    # J, its scaled copy and the workspace of their factorisation.
    if entries <= EXPLICIT_ENTRIES and 4 * 8 * entries <= budget:
        return problem.remember("logit_kernel", lambda: JacobianKernel(problem))
    # Θ, SᵀΘS, its eigenvectors and LAPACK's workspace of the same size.
    needed = 5 * 8 * size**2
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
    return problem.remember("logit_kernel", lambda: GramKernel(problem))


def gradient_spectrum(problem: Problem) -> Spectrum:
    """The spectrum of K_nm = g_n·g_m = u_nᵀΘ_nm u_m, computed once per problem."""
    return problem.remember(
        "gradient_spectrum",
        lambda: logit_kernel(problem).spectrum(
            problem.residual.unsqueeze(1), torch.ones_like(problem.loss)
        ),
    )


def fisher_spectrum(problem: Problem) -> Spectrum:
    """The spectrum of SᵀΘS, whose eigenvalues are those of F, computed once per problem.

    dᵀFd and dᵀg of the natural gradient, and γ_min, are sums of squares of r's coefficients, so
    that a lost part of 10⁻⁴ changes them by 10⁻⁸.
    """
    return problem.remember(
        "fisher_spectrum",
        lambda: logit_kernel(problem).spectrum(
            factor_columns(problem), problem.distribution.whitened_residual().flatten(), 1e-4
        ),
    )
