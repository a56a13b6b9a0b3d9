"""What a method is: ``prepare(problem, kernel, seed) → state``, and what a state can be asked.

A state holds everything that does not depend on λ, so that a damping sweep costs one
preparation and a rescaling for each λ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import CotangentUpdates, DirectionUpdates, Updates, as_tensor
from ngeval.problem.problem import Problem


class State(Protocol):
    """A method prepared on a problem.

    Attributes:
        largest_curvature: the largest eigenvalue of the method's own curvature, which
            ``damping_scale="relative"`` multiplies λ by; NaN for a method without one.

    A state may also have ``coverage``, the part of the parameters that it treats, in percent (100
    if it has not), and ``notes``, a tuple of remarks that belong beside its results.
    """

    @property
    def largest_curvature(self) -> float:
        """See the attribute."""
        ...

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``; the step is −η d. λ is absolute."""
        ...

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ (absolute), in a form that can be graded.

        One update for all λ may stand for a method that λ does not enter.
        """
        ...


class Method(Protocol):
    """An update rule that ngeval can grade.

    Attributes:
        name: as it is asked for, parameter included, e.g. ``"sf:4"``.
    """

    @property
    def name(self) -> str:
        """The name, parameter included."""
        ...

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> State:
        """Do all work that does not depend on λ.

        Args:
            problem: the model on its batch.
            kernel: of the problem; what several methods share comes from it.
            seed: the only source of randomness.
        """
        ...


class CotangentState(ABC):
    """A state whose update is made of rows, d = Σ_nq c_nq J_nᵀv_nq: no λ needs a model pass."""

    def __init__(self, problem: Problem, vectors: Tensor, largest_curvature: float) -> None:
        """Keep the problem, the vectors v and the scale of the method's curvature."""
        self.problem = problem
        self.vectors = vectors
        self.largest_curvature = largest_curvature

    @abstractmethod
    def coefficients(self, dampings: Tensor) -> Tensor:
        """The c of every λ: shape ``(L, N, Q)``, float64."""

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), by one backward pass."""
        return self.updates([damping]).direction(0)

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The coefficients of every λ."""
        coefficients = self.coefficients(as_tensor(self.problem, dampings))
        return CotangentUpdates(self.problem, self.vectors, coefficients)


class ParameterState(ABC):
    """A state whose update is made in parameter space: one JVP for every λ."""

    def __init__(self, problem: Problem, largest_curvature: float) -> None:
        """Keep the problem and the scale of the method's curvature."""
        self.problem = problem
        self.largest_curvature = largest_curvature

    @abstractmethod
    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``."""

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The directions, made when they are wanted."""
        return DirectionUpdates(len(dampings), lambda i: self.direction(dampings[i]))
