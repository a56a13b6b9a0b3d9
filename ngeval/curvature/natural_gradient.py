"""The exact natural gradient of a problem, by a singular value decomposition or a Krylov run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ngeval.curvature.bounds import Bounds
from ngeval.curvature.damped_inverse import DampedInverse
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS, KrylovRun
from ngeval.curvature.row_space import dense_is_feasible
from ngeval.curvature.updates import SpaceUpdates
from ngeval.problem.gamma import gamma_floor
from ngeval.problem.problem import Problem


class DenseSolver:
    """By the singular values of A = SᵀJ = UΣVᵀ: (F + λI)⁻¹g = V(Σ² + λ)⁻¹c with c = Vᵀg."""

    iterations = 0

    def __init__(self, kernel: Kernel) -> None:
        self.space = kernel.logits
        self.whitening_error = kernel.problem.distribution.whitening_error()
        right = kernel.problem.distribution.whitened_residual().flatten()
        gradient = self.space.gradient(kernel.residual_vectors, right)
        self.inverse = DampedInverse(kernel.fisher_rows, gradient)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of F."""
        return self.inverse.rows.largest

    @property
    def rank(self) -> int:
        """The rank of SᵀJ at λ = 0."""
        return self.inverse.rows.at_zero.rank

    def gamma_min(self) -> float:
        """γ_min = (gᵀF⁺g)^(−1/2); ∞ where g = 0."""
        return self.inverse.least_gamma()

    def gammas(self, dampings: Sequence[float]) -> np.ndarray:
        """γ(λ) of every λ."""
        solved = [self.inverse.solve(damping) for damping in dampings]
        return np.array([s.root / s.slope if s.slope > 0 else math.inf for s in solved])

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """γ(λ) of every λ; its bounds differ by what u loses in S r."""
        gammas = self.gammas(dampings)
        return Bounds(gammas, gammas).widened(self.whitening_error)

    def updates(self, dampings: Sequence[float]) -> SpaceUpdates:
        """(F + λI)⁻¹g for every λ."""
        solved = [self.inverse.solve(damping) for damping in dampings]
        updates = SpaceUpdates.of(self.space, solved)
        roots = updates.coordinates.new_tensor([solution.root for solution in solved])
        return replace(updates, roots=roots)


def has_dense_solver(kernel: Kernel) -> bool:
    """Whether Θ is within reach."""
    problem = kernel.problem
    return dense_is_feasible(problem.sizes, problem.rows.memory) or kernel.is_dense


def dense_solver(kernel: Kernel) -> DenseSolver:
    """The solver of a kernel with all of Θ, made once."""
    shards = kernel.problem.shards
    return kernel.memo(DenseSolver, lambda: shards.synchronized(lambda: DenseSolver(kernel)))


NaturalGradientSolver = DenseSolver | KrylovRun


def natural_solver(
    kernel: Kernel, gap: float = GAP, max_iterations: int = MAX_ITERATIONS
) -> NaturalGradientSolver:
    """The exact solver where Θ is within reach, a Krylov run otherwise.

    Both share the costly part, a factorisation or the run so far, with other calls for the kernel.
    """
    if has_dense_solver(kernel):
        return dense_solver(kernel)
    return kernel.once(KrylovRun, gap, max_iterations)


def gamma_min(problem: Problem) -> float:
    """γ_min = (gᵀF⁺g)^(−1/2), the least γ that any update has: that of the natural gradient.

    With r = S⁺u, gᵀF⁺g is the squared norm of the projection of r on the range of SᵀJ. Where the
    logit kernel is out of reach, this is the γ of a Krylov run's update, and γ_min lies between
    `gamma_floor` and it. Returns ∞ where g = 0.
    """
    return max(natural_solver(Kernel(problem)).gamma_min(), gamma_floor(problem))
