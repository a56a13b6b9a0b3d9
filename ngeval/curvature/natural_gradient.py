"""The exact natural gradient of a problem, by a singular value decomposition or a Krylov run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS, Bounds, KrylovRun
from ngeval.curvature.row_space import dense_is_feasible
from ngeval.curvature.row_svd import RowSvd, Solution, unit_vector
from ngeval.curvature.updates import SpaceUpdates
from ngeval.problem.gamma import gamma_floor
from ngeval.problem.problem import Problem


class DenseSolver:
    """By the singular values of A = SᵀJ = UΣVᵀ: (F + λI)⁻¹g = V(Σ² + λ)⁻¹c with c = Vᵀg."""

    iterations = 0

    def __init__(self, kernel: Kernel) -> None:
        self.problem = kernel.problem
        self.space = kernel.logits
        self.rows = kernel.fisher_rows
        self.gradients = self.space.rows(kernel.residual_vectors)
        self.right = self.problem.distribution.whitened_residual().flatten()

    @property
    def largest(self) -> float:
        """The largest eigenvalue of F."""
        return self.rows.largest

    @property
    def rank(self) -> int:
        """The rank of SᵀJ at λ = 0."""
        return self.rows.at_zero.rank

    def coefficients(self, svd: RowSvd) -> Tensor:
        """Vᵀg, shape ``(k,)``."""
        return svd.gradient_coefficients(self.gradients, self.right)

    def solve(self, damping: float) -> tuple[Solution, float]:
        """The update of a λ as a unit vector, and gᵀ times that vector."""
        svd = self.rows.at(damping)
        coefficients = self.coefficients(svd)
        solution = self.rows.damped(coefficients, damping)
        return solution, float(coefficients @ solution.coefficients)

    def gamma_min(self) -> float:
        """γ_min = (gᵀF⁺g)^(−1/2); ∞ where g = 0."""
        svd = self.rows.at_zero
        parts = self.coefficients(svd) / svd.singular / svd.scale
        _, length = unit_vector(parts)
        return 1 / length if bool(parts.any()) else math.inf

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """γ(λ) of every λ, as both of its bounds."""
        solved = [self.solve(damping) for damping in dampings]
        gammas = [s.root / slope if slope > 0 else math.inf for s, slope in solved]
        return Bounds(np.array(gammas), np.array(gammas))

    def updates(self, dampings: Sequence[float]) -> SpaceUpdates:
        """(F + λI)⁻¹g for every λ."""
        solved = [self.solve(damping) for damping in dampings]
        coordinates = torch.stack([solution.vector for solution, _ in solved])
        return SpaceUpdates(
            self.space,
            coordinates,
            coordinates.new_tensor([solution.size for solution, _ in solved]),
            coordinates.new_tensor([decrease for _, decrease in solved]),
            coordinates.new_tensor([solution.root for solution, _ in solved]),
        )


NaturalGradientSolver = DenseSolver | KrylovRun


def natural_solver(
    kernel: Kernel, gap: float = GAP, max_iterations: int = MAX_ITERATIONS
) -> NaturalGradientSolver:
    """The exact solver where Θ is within reach, a Krylov run otherwise.

    Both share the costly part, a factorisation or the run so far, with other calls for the kernel.
    """
    problem = kernel.problem
    if dense_is_feasible(problem.sizes, problem.rows.memory) or kernel.is_dense:
        return problem.shards.synchronized(lambda: DenseSolver(kernel))
    return kernel.once(KrylovRun, gap, max_iterations)


def gamma_min(problem: Problem) -> float:
    """γ_min = (gᵀF⁺g)^(−1/2), the least γ that any update has: that of the natural gradient.

    With r = S⁺u, gᵀF⁺g is the squared norm of the projection of r on the range of SᵀJ. Where the
    logit kernel is out of reach, this is the γ of a Krylov run's update, and γ_min lies between
    `gamma_floor` and it. Returns ∞ where g = 0.
    """
    return max(natural_solver(Kernel(problem)).gamma_min(), gamma_floor(problem))
