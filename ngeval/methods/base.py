"""The protocol of a method, ``prepare(problem, kernel, seed) → state``, and base classes of states.

A state holds everything that does not depend on λ, so that a sweep over dampings costs one
preparation and a rescaling for each λ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, Updates
from ngeval.problem.problem import Problem


class State(Protocol):
    """A method prepared on a problem.

    A state may also have ``coverage``, the percentage of the parameters that it treats (default
    100), ``notes``, a tuple of remarks for the column ``note`` of its results, ``rank``, that of
    its curvature by the rule for λ = 0, and ``gaps(dampings)``, how far the γ of an iterative
    solution may be from the exact one, relative, or ``bounds(dampings)`` on that γ.
    """

    @property
    def largest_curvature(self) -> float:
        """The largest eigenvalue of the method's curvature; NaN if it has none.

        ``damping_scale="relative"`` multiplies λ by it.
        """
        ...

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ (absolute), in a form that can be graded.

        A method that does not depend on λ may return one update for all of them.
        """
        ...

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``; the step is −η d. λ is absolute."""
        return self.updates([damping]).direction(0)


class Method(Protocol):
    """An update rule that ngeval can grade."""

    @property
    def name(self) -> str:
        """The name in tables, parameter included, e.g. ``"sf:4"``."""
        ...

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> State:
        """Do all work that does not depend on λ.

        Args:
            problem: the model on its batch.
            kernel: of the problem; it computes once what several methods share.
            seed: the only source of randomness.
        """
        ...


class ParameterState(ABC):
    """A state whose update is computed in parameter space. Every λ needs one JVP."""

    def __init__(self, problem: Problem, largest_curvature: float) -> None:
        self.problem = problem
        self.largest_curvature = largest_curvature

    @abstractmethod
    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``."""

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ, each computed when it is graded."""
        return DirectionUpdates(len(dampings), lambda i: self.direction(dampings[i]))


class UndampedState(ParameterState):
    """A state with one update d for every λ, shape ``(P,)``, and without a curvature."""

    def __init__(
        self, problem: Problem, step: Tensor, coverage: float = 100.0, notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(problem, math.nan)
        self.step = step
        self.coverage = coverage
        self.notes = notes

    def direction(self, damping: float) -> Tensor:
        return self.step

    def updates(self, dampings: Sequence[float]) -> Updates:
        return DirectionUpdates(1, lambda _: self.step)
