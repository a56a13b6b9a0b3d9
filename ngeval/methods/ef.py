"""``ef`` and ``ief``: the empirical Fisher and its improved form, exact on the batch.

Both are Gᵀ(K + λI)⁻¹b with K = GGᵀ, the ridge regression of b on the per-sample gradients. By the
Woodbury identity EF's (GᵀG + λI)⁻¹g has b = 1; iEF has b_n = s_n = ‖u_n‖². At λ → 0 with K
invertible the step −η d changes the loss of sample n by −η b_n to first order: by the same amount
for all samples with EF, in proportion to ‖u_n‖² with iEF.
Source: Wu et al., "An improved empirical Fisher approximation for natural gradient descent"
(arXiv 2406.06420).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngeval.curvature.damped_inverse import ridge
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.row_space import RowSpace
from ngeval.curvature.row_svd import RowSvd
from ngeval.curvature.updates import SpaceUpdates
from ngeval.methods.base import State
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
        """Factor G."""
        size = float(problem.residual.abs().max()) if self.improved else 1.0
        size = size if size > 0 else 1.0
        squares = (problem.residual / size).square().flatten(1).sum(1)
        target = squares if self.improved else torch.ones_like(squares)
        space = kernel.space(kernel.residual_vectors)
        return EmpiricalState(space, kernel.gradients, target, size)


class EmpiricalState(State):
    """The ridge regression of ``size``² · ``target`` on the per-sample gradients."""

    def __init__(self, space: RowSpace, gradients: RowSvd, target: Tensor, size: float) -> None:
        self.space = space
        self.gradients = gradients
        self.target = target
        self.size = size

    @property
    def largest_curvature(self) -> float:
        return self.gradients.largest

    @property
    def rank(self) -> int:
        """The rank at λ = 0."""
        return self.gradients.at_zero.rank

    def updates(self, dampings: Sequence[float]) -> SpaceUpdates:
        """The updates of every λ, with dᵀg = Σ_n g_n·d.

        Late in training the tangents of samples that the model fits well are huge, and dᵀg from
        them would be a difference of numbers that are orders of magnitude larger.
        """
        solved = [ridge(self.gradients, self.target, damping) for damping in dampings]
        # Not by the square, which may underflow.
        scaled = [replace(each, size=each.size * self.size * self.size) for each in solved]
        return SpaceUpdates.of(self.space, scaled)
