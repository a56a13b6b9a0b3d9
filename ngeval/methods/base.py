"""What a method is: ``prepare(problem, seed) → state``, and what a state can be asked.

A state holds everything that does not depend on λ, so that a damping sweep costs one
preparation and a rescaling for each λ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ngeval.kernel import logit_kernel
from ngeval.problem import Problem


@dataclass(frozen=True)
class Tangents:
    """What γ needs of updates at L dampings.

    Attributes:
        values: t = J d in float64, shape ``(L, N, *positions, C)``.
        squared_norms: ‖d‖² in float64, shape ``(L,)``.
    """

    values: Tensor
    squared_norms: Tensor


class State(Protocol):
    """A method prepared on a problem.

    Attributes:
        largest_curvature: the largest eigenvalue of the method's own curvature, which
            ``damping_scale="relative"`` multiplies λ by; NaN for a method without one.
    """

    largest_curvature: float

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``; the step is −η d. λ is absolute."""
        ...

    def tangents(self, dampings: Sequence[float]) -> Tangents:
        """The logit tangents of d(λ) for every λ (absolute)."""
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

    def prepare(self, problem: Problem, seed: int = 0) -> State:
        """Do all work that does not depend on λ. Randomness comes from ``seed`` alone."""
        ...


class CotangentState(ABC):
    """A state whose update is d = Jᵀw: tangents are Θw and ‖d‖² = wᵀΘw, with no model pass."""

    def __init__(self, problem: Problem, largest_curvature: float) -> None:
        """Keep the problem and the scale of the method's curvature."""
        self.problem = problem
        self.largest_curvature = largest_curvature

    @abstractmethod
    def cotangents(self, dampings: Tensor) -> Tensor:
        """W for every λ: shape ``(L, N, *positions, C)``, float64."""

    def direction(self, damping: float) -> Tensor:
        """The update d = Jᵀw(λ), one backward pass."""
        return self.problem.vjp(self.cotangents(self._tensor([damping]))[0])

    def tangents(self, dampings: Sequence[float]) -> Tangents:
        """T = Θw(λ) for every λ."""
        cotangents = self.cotangents(self._tensor(dampings))
        return Tangents(*logit_kernel(self.problem).push(cotangents))

    def _tensor(self, dampings: Sequence[float]) -> Tensor:
        return torch.tensor(list(dampings), dtype=torch.float64, device=self.problem.device)


class ParameterState(ABC):
    """A state whose update is made in parameter space: one JVP for every λ."""

    def __init__(self, problem: Problem, largest_curvature: float) -> None:
        """Keep the problem and the scale of the method's curvature."""
        self.problem = problem
        self.largest_curvature = largest_curvature

    @abstractmethod
    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``."""

    def tangents(self, dampings: Sequence[float]) -> Tangents:
        """T = J d(λ) for every λ."""
        values, norms = [], []
        for damping in dampings:
            direction = self.direction(damping)
            values.append(self.problem.jvp(direction))
            norms.append(direction.to(torch.float64).square().sum())
        return Tangents(torch.stack(values), torch.stack(norms))
