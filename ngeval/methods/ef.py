"""``ef`` and ``ief``: the empirical Fisher and its improved form, exact on the batch.

Both are Gᵀ(K + λI)⁻¹b. By the Woodbury identity EF's (GᵀG + λI)⁻¹g has b = 1; iEF has
b_n = s_n = ‖u_n‖². At λ → 0 with K invertible the step −η d changes the loss of sample n by −η b_n
to first order: by the same amount for all samples with EF, in proportion to ‖u_n‖² with iEF.
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
        """Factor K."""
        squares = problem.residual.square().flatten(1).sum(1)
        right = squares if self.improved else torch.ones_like(squares)
        return EmpiricalState(problem, kernel, right)


class EmpiricalState(CotangentState):
    """Rows g_n = J_nᵀu_n with coefficients c = (K + λI)⁻¹b."""

    def __init__(self, problem: Problem, kernel: Kernel, right: Tensor) -> None:
        self.spectrum = kernel.gradient_spectrum
        super().__init__(problem, kernel.residual_vectors, self.spectrum.largest)
        self.right = right

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ, with dᵀg = 1ᵀK(K + λI)⁻¹b.

        Late in training, samples that the model fits well have huge coefficients, and dᵀg from the
        tangent would be a difference of numbers that are orders of magnitude larger.
        """
        lambdas = as_tensor(self.problem, dampings)
        decrease = self.spectrum.image(self.right, lambdas).sum(1)
        return CotangentUpdates(self.problem, self.vectors, self.coefficients(lambdas), decrease)

    def coefficients(self, dampings: Tensor) -> Tensor:
        return self.spectrum.solve(self.right, dampings).unsqueeze(2)
