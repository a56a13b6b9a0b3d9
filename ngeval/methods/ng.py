"""``ng``: the exact damped natural gradient.

With r = S⁺u and g = JᵀS r, (F + λI)⁻¹g = JᵀS (SᵀΘS + λI)⁻¹ r: exact, by one eigendecomposition
in logit space where that is within reach, and otherwise by one Krylov run with two-sided bounds on
its γ. Source: Amari, "Natural gradient works efficiently in learning" (1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS
from ngeval.curvature.natural_gradient import NaturalGradientSolver, natural_solver
from ngeval.curvature.updates import Updates
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class NaturalGradient:
    """d(λ) = (F + λI)⁻¹g; F⁺g at λ = 0.

    Attributes:
        gap: where Θ is out of reach: the relative gap between the bounds on γ to reach.
        max_iterations: and where to stop at the latest.
    """

    name: str = "ng"
    gap: float = GAP
    max_iterations: int = MAX_ITERATIONS

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> NaturalState:
        """Factor SᵀΘS once, or start the run."""
        return NaturalState(natural_solver(kernel, self.gap, self.max_iterations))


class NaturalState:
    """The solver's updates."""

    def __init__(self, solver: NaturalGradientSolver) -> None:
        """Keep the solver."""
        self.solver = solver

    @property
    def largest_curvature(self) -> float:
        """The largest eigenvalue of F."""
        return self.solver.largest

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``."""
        return self.updates([damping]).direction(0)

    def updates(self, dampings: Sequence[float]) -> Updates:
        """Those of every λ."""
        return self.solver.updates(dampings)
