"""``sgd``: the plain gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.kernel import residual_vectors
from ngeval.methods.base import CotangentState
from ngeval.problem import Problem


@dataclass(frozen=True)
class Sgd:
    """d = g for every λ. It has no curvature of its own."""

    name: str = "sgd"

    def prepare(self, problem: Problem, seed: int = 0) -> SgdState:
        """Nothing to prepare."""
        return SgdState(problem)


class SgdState(CotangentState):
    """The rows g_n, each once, whatever the damping."""

    def __init__(self, problem: Problem) -> None:
        """Keep the problem; a gradient has no curvature."""
        super().__init__(problem, residual_vectors(problem), math.nan)

    def direction(self, damping: float) -> Tensor:
        """The batch gradient."""
        return self.problem.gradient()

    def coefficients(self, dampings: Tensor) -> Tensor:
        """One update, the same for every λ."""
        return torch.ones_like(self.problem.loss).reshape(1, -1, 1)
