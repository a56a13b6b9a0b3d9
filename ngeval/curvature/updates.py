"""Updates at many dampings, in the forms that methods return and `ngeval.grading` grades.

How d(λ) is made and how it is graded are separate, so that the batch that an update is made from
need not be the batch that grades it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.row_space import RowSpace


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
class SpaceUpdates(Updates):
    """Updates made of rows, d(λ) = size · Qᵀy, in the coordinates of a space.

    Attributes:
        space: the span of the rows.
        coordinates: y of length 1, or 0, float64, shape ``(L, r)``.
        sizes: ‖d‖, shape ``(L,)``; it can leave float64's range where γ does not.
        decrease: gᵀQᵀy, shape ``(L,)``, which loses digits where it is computed from tangents.
        roots: ‖SᵀJ Qᵀy‖, likewise, where the method has it.
    """

    space: RowSpace
    coordinates: Tensor
    sizes: Tensor
    decrease: Tensor
    roots: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.coordinates)

    @property
    def finite_sizes(self) -> Tensor:
        """‖d‖, NaN where the coordinates are not finite."""
        finite = torch.isfinite(self.coordinates).all(1)
        return torch.where(finite, self.sizes, math.nan)

    def direction(self, index: int) -> Tensor:
        unit = self.space.directions(self.coordinates[index : index + 1])[0]
        return unit * self.sizes[index].to(unit.dtype)


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
