"""``sgd``: the plain gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, Updates
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class Sgd:
    """d = g for every λ. It has no curvature of its own."""

    name: str = "sgd"

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> SgdState:
        """Nothing to prepare."""
        return SgdState(problem)


class SgdState:
    """The gradient, whatever the damping; one JVP serves all, and no kernel is needed."""

    largest_curvature = math.nan

    def __init__(self, problem: Problem) -> None:
        """Keep the problem."""
        self.problem = problem

    def direction(self, damping: float) -> Tensor:
        """The batch gradient."""
        return self.problem.gradient()

    def updates(self, dampings: Sequence[float]) -> Updates:
        """One update, the same for every λ."""
        return DirectionUpdates(1, lambda _: self.problem.gradient())
