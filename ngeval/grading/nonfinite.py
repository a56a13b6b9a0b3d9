"""An update that is not finite at one λ costs that λ alone, not the method's others or a family's.

Updates are graded many at a time, in common bases that one NaN would spoil. Those that are not
finite are graded as 0 and told as NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ngeval.curvature.updates import (
    CotangentUpdates,
    DirectionUpdates,
    FieldUpdates,
    SolvedUpdates,
    Updates,
)


class FiniteUpdates:
    """Updates with 0 for those that are not finite.

    Attributes:
        updates: these.
        lost: the places of those that are not; of directions, which are made when they are wanted,
            known once they were.
    """

    def __init__(self, updates: Updates) -> None:
        """Look at what is there already."""
        self.lost: set[int] = set()
        self.updates = self._kept(updates)

    def _kept(self, updates: Updates) -> Updates:
        if isinstance(updates, SolvedUpdates):  # whose forms come with them
            return updates
        if isinstance(updates, CotangentUpdates):
            return replace(updates, coefficients=self._zeroed(updates.coefficients))
        if isinstance(updates, FieldUpdates):
            return replace(updates, fields=self._zeroed(updates.fields))
        return DirectionUpdates(updates.count, lambda index: self._made(updates, index))

    def _zeroed(self, values: Tensor) -> Tensor:
        """Those of all updates, shape ``(L, …)``."""
        finite = torch.isfinite(values.flatten(1)).all(1)
        self.lost |= set(torch.nonzero(~finite).flatten().tolist())
        if not self.lost:
            return values
        return torch.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)

    def _made(self, updates: Updates, index: int) -> Tensor:
        direction = updates.direction(index)
        if bool(torch.isfinite(direction).all()):
            return direction
        self.lost.add(index)
        return torch.zeros_like(direction)

    def told(self, values: Tensor) -> Tensor:
        """Numbers of each update, NaN for those that are lost; shape ``(L,)`` or ``(1,)``."""
        if not self.lost:
            return values
        lost = torch.tensor(sorted(self.lost), device=values.device)
        count = self.updates.count
        return values.expand(count).clone().index_fill_(0, lost, math.nan)
