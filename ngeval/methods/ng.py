"""``ng``: the exact damped natural gradient.

With SᵀJ = UΣVᵀ that is V(Σ² + λ)⁻¹Vᵀg. It comes from one singular value decomposition in logit
space if that is feasible, and else from one Krylov run with two-sided bounds on its γ.
Source: Amari, "Natural gradient works efficiently in learning" (1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ngeval.curvature.bounds import Bounds
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS
from ngeval.curvature.natural_gradient import NaturalGradientSolver, natural_solver
from ngeval.curvature.updates import Updates
from ngeval.methods.base import State
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class NaturalGradient:
    """d(λ) = (F + λI)⁻¹g; F⁺g at λ = 0.

    Attributes:
        name: in tables.
        gap: a Krylov run ends when the relative gap between its bounds on γ is at most this.
        max_iterations: a Krylov run ends after this number of iterations.
    """

    name: str = "ng"
    gap: float = GAP
    max_iterations: int = MAX_ITERATIONS

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> NaturalState:
        """Factor SᵀΘS, or begin a Krylov run."""
        return NaturalState(natural_solver(kernel, self.gap, self.max_iterations))


class NaturalState(State):
    """The natural gradient by a factorisation or a Krylov run."""

    def __init__(self, solver: NaturalGradientSolver) -> None:
        self.solver = solver

    @property
    def largest_curvature(self) -> float:
        return self.solver.largest

    @property
    def rank(self) -> float:
        """The rank at λ = 0, NaN for a Krylov run."""
        return self.solver.rank

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """Bounds on the γ of the exact natural gradient."""
        return self.solver.bounds(dampings)

    def updates(self, dampings: Sequence[float]) -> Updates:
        return self.solver.updates(dampings)
