"""``sgd``: the plain gradient."""

from __future__ import annotations

from dataclasses import dataclass

from ngeval.curvature.kernel import Kernel
from ngeval.methods.base import UndampedState
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class Sgd:
    """d = g for every λ."""

    name: str = "sgd"

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> UndampedState:
        return UndampedState(problem, problem.gradient())
