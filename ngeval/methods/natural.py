"""``ng``: the exact damped natural gradient.

With r = S⁺u and g = JᵀS r, (F + λI)⁻¹g = JᵀS (SᵀΘS + λI)⁻¹ r: exact, by one eigendecomposition
in logit space. Source: Amari, "Natural gradient works efficiently in learning" (1998).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ngeval.kernel import fisher_spectrum
from ngeval.methods.base import CotangentState
from ngeval.problem import Problem


@dataclass(frozen=True)
class NaturalGradient:
    """d(λ) = (F + λI)⁻¹g; F⁺g at λ = 0."""

    name: str = "ng"

    def prepare(self, problem: Problem, seed: int = 0) -> NaturalState:
        """Factor SᵀΘS once."""
        return NaturalState(problem, fisher_spectrum(problem).largest)


class NaturalState(CotangentState):
    """w = S (SᵀΘS + λI)⁻¹ r."""

    def cotangents(self, dampings: Tensor) -> Tensor:
        """The cotangent of every λ."""
        whitened = self.problem.distribution.whitened_residual().flatten()
        solved = fisher_spectrum(self.problem).solve(whitened, dampings)
        fields = solved.reshape(len(dampings), *self.problem.outputs.shape)
        return self.problem.distribution.factor_product(fields)
