"""Updates at many dampings, in the forms that methods return and `ngeval.grading` grades.

How d(λ) is made and how it is graded are separate, so that the batch that an update is made from
need not be the batch that grades it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.row_space import RowSpace
from ngeval.curvature.row_svd import Solution, unit_vector

SENSITIVE = 0.6
"""An update that rounding changes by more than this power of ε is looked at more closely."""


@dataclass(frozen=True)
class KnownForms:
    """What γ needs of L updates, at length 1 (or 0): float64, shape ``(L,)``.

    Attributes:
        roots: ‖SᵀJd‖/‖d‖.
        decrease: gᵀd/‖d‖.
        sizes: ‖d‖.
    """

    roots: Tensor
    decrease: Tensor
    sizes: Tensor

    @classmethod
    def of_sum(cls, solutions: Sequence[Solution]) -> KnownForms:
        """Of one update that is the sum of solutions in orthogonal spaces."""
        sizes = solutions[0].vector.new_tensor([solution.size for solution in solutions])
        parts, size = unit_vector(sizes)
        images = torch.stack([solution.image for solution in solutions], 1)
        slopes = sizes.new_tensor([solution.slope for solution in solutions])
        root = sizes.new_tensor(unit_vector(images @ parts)[1])
        return cls(root, slopes @ parts, sizes.new_tensor(size))

    @classmethod
    def stack(cls, forms: Sequence[KnownForms]) -> KnownForms:
        """The forms of several updates as one."""
        names = ("roots", "decrease", "sizes")
        return cls(*(torch.stack([getattr(each, name) for each in forms]) for name in names))


class Updates(ABC):
    """d(λ) for L dampings."""

    @property
    @abstractmethod
    def is_solution(self) -> bool:
        """Whether it solves a linear system, so that its error is measured by solving again."""

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

    @property
    def is_solution(self) -> bool:
        return True

    space: RowSpace
    coordinates: Tensor
    sizes: Tensor
    decrease: Tensor
    roots: Tensor | None = None

    @classmethod
    def of(cls, space: RowSpace, solutions: Iterable[Solution]) -> SpaceUpdates:
        """From solutions in the coordinates of a space, one for each λ."""
        solved = list(solutions)
        coordinates = torch.stack([solution.vector for solution in solved])
        sizes = coordinates.new_tensor([solution.size for solution in solved])
        return cls(
            space, coordinates, sizes, coordinates.new_tensor([each.slope for each in solved])
        )

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
        is_solution: see `Updates`.
        forms: by the batch that the updates were made from, where the method has them.
        changed: the same updates with other rounding, or None where that changes nothing; from a
            function that measures the rounding of a row's entries, shape ``(P,)``, relative to the
            length of the row.
        unresolved: the relative error of d that such a change does not show, of each λ.
    """

    size: int
    make: Callable[[int], Tensor]
    is_solution: bool = False
    forms: KnownForms | None = None
    changed: Callable[[Callable[[], Tensor]], Callable[[int], Tensor] | None] | None = None
    unresolved: Sequence[float] | None = None

    @property
    def count(self) -> int:
        return self.size

    def direction(self, index: int) -> Tensor:
        return self.make(index)
