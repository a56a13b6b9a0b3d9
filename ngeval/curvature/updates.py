"""Updates at many dampings, in the forms that methods return and `ngeval.grading` grades.

How d(λ) is made and how it is graded are separate, so that the batch that an update is made from
need not be the batch that grades it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.logit_kernel import combine
from ngeval.problem.problem import Problem


class Updates(ABC):
    """d(λ) for L dampings."""

    @property
    @abstractmethod
    def count(self) -> int:
        """L."""

    @abstractmethod
    def direction(self, index: int) -> Tensor:
        """The update of one λ, shape ``(P,)``; of a d = Jᵀw by one backward pass."""


@dataclass(frozen=True)
class CotangentUpdates(Updates):
    """Updates made of rows: d(λ) = Jᵀw(λ) = Σ_nq c_nq(λ) J_nᵀv_nq.

    Attributes:
        problem: whose J.
        vectors: v in float64, shape ``(N, Q, *positions, C)``.
        coefficients: c in float64, shape ``(L, N, Q)``.
        decrease: dᵀg on the problem's batch, shape ``(L,)``, where a method can compute it without
            the cancellation in uᵀt.
    """

    problem: Problem
    vectors: Tensor
    coefficients: Tensor
    decrease: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.coefficients)

    def direction(self, index: int) -> Tensor:
        return self.problem.vjp(combine(self.vectors, self.coefficients[index : index + 1])[0])


@dataclass(frozen=True)
class FieldUpdates(Updates):
    """Updates d(λ) = Jᵀw(λ) whose fields have no common vectors.

    Attributes:
        problem: whose J.
        fields: w in float64, shape ``(L, N, *positions, C)``.
    """

    problem: Problem
    fields: Tensor

    @property
    def count(self) -> int:
        return len(self.fields)

    def direction(self, index: int) -> Tensor:
        return self.problem.vjp(self.fields[index])


@dataclass(frozen=True)
class DirectionUpdates(Updates):
    """Updates that are computed in parameter space, one by one.

    Attributes:
        size: L.
        make: computes the update of an index, shape ``(P,)``.
    """

    size: int
    make: Callable[[int], Tensor]

    @property
    def count(self) -> int:
        return self.size

    def direction(self, index: int) -> Tensor:
        return self.make(index)


@dataclass(frozen=True)
class SolvedUpdates(DirectionUpdates):
    """Updates whose quadratic forms on their own batch came with them (from a Krylov run).

    Attributes:
        curvature: dᵀFd, shape ``(L,)``.
        decrease: dᵀg, shape ``(L,)``.
        squared_norms: ‖d‖², shape ``(L,)``.
    """

    curvature: Tensor
    decrease: Tensor
    squared_norms: Tensor


def as_tensor(problem: Problem, dampings: Sequence[float]) -> Tensor:
    """Dampings as a float64 vector on the problem's device."""
    return torch.tensor(list(dampings), dtype=torch.float64, device=problem.device)
