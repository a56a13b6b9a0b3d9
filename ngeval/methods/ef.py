"""``ef`` and ``ief``: the empirical Fisher and its improved form, exactly and per batch.

Both are Gᵀ(K + λI)⁻¹b. By the Woodbury identity EF's (GᵀG + λI)⁻¹g is the one with b = 1; iEF
takes b_n = s_n = ‖u_n‖². At λ → 0 with K invertible the step −η d changes the loss of sample n
by −η b_n to first order: the same for all samples under EF, in proportion to ‖u_n‖² under iEF.
Source: Wu et al., "An improved empirical Fisher approximation for natural gradient descent"
(arXiv 2406.06420).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import CotangentUpdates, Updates, as_tensor
from ngeval.methods.base import CotangentState
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class EmpiricalFisher:
    """d(λ) = Gᵀ(K + λI)⁻¹b with b = 1 (EF) or b_n = ‖u_n‖² (iEF)."""

    name: str
    improved: bool

    @classmethod
    def parse(cls, name: str) -> EmpiricalFisher:
        """Build ``ef`` or ``ief``."""
        return cls(name, improved=name == "ief")

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> EmpiricalState:
        """Factor K once."""
        squares = problem.residual.square().flatten(1).sum(1)
        return EmpiricalState(
            problem,
            kernel,
            squares if self.improved else torch.ones_like(squares),
        )


class EmpiricalState(CotangentState):
    """Rows g_n = J_nᵀu_n with coefficients c = (K + λI)⁻¹b."""

    def __init__(self, problem: Problem, kernel: Kernel, right: Tensor) -> None:
        """Keep the factored K and the right-hand side b."""
        self.spectrum = kernel.gradient_spectrum
        super().__init__(problem, kernel.residual_vectors, self.spectrum.largest)
        self.right = right

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The coefficients of every λ, and dᵀg = 1ᵀK(K + λI)⁻¹b.

        Late in training, samples that are learnt have huge coefficients: from the tangent, dᵀg
        would be a difference of numbers many orders larger.
        """
        lambdas = as_tensor(self.problem, dampings)
        decrease = self.spectrum.image(self.right, lambdas).sum(1)
        return CotangentUpdates(self.problem, self.vectors, self.coefficients(lambdas), decrease)

    def coefficients(self, dampings: Tensor) -> Tensor:
        """The c_n(λ) of every λ."""
        return self.spectrum.solve(self.right, dampings).unsqueeze(2)
