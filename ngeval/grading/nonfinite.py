"""An update that is not finite at one λ costs that λ alone, not the method's other dampings.

Updates are graded many at a time, in common bases that one NaN would spoil. Those that are not
finite are graded as 0 and reported as NaN.
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


def finite_updates(updates: Updates, lost: set[int]) -> Updates:
    """Updates with 0 in place of those that are not finite.

    Args:
        updates: of one method.
        lost: receives the indices of those that are not finite: a direction's when it is computed.
    """
    if isinstance(updates, SolvedUpdates):  # their quadratic forms came with them
        return updates
    if isinstance(updates, CotangentUpdates):
        return replace(updates, coefficients=_zeroed(updates.coefficients, lost))
    if isinstance(updates, FieldUpdates):
        return replace(updates, fields=_zeroed(updates.fields, lost))

    def direction(index: int) -> Tensor:
        vector = updates.direction(index)
        if bool(torch.isfinite(vector).all()):
            return vector
        lost.add(index)
        return torch.zeros_like(vector)

    return DirectionUpdates(updates.count, direction)


def with_nan(values: Tensor, lost: set[int], count: int) -> Tensor:
    """Numbers of ``count`` updates, NaN for those that are lost; shape ``(L,)`` or ``(1,)``."""
    if not lost:
        return values
    places = torch.tensor(sorted(lost), device=values.device)
    return values.expand(count).clone().index_fill_(0, places, math.nan)


def _zeroed(values: Tensor, lost: set[int]) -> Tensor:
    """Values of all updates, shape ``(L, …)``, without those that are not finite."""
    finite = torch.isfinite(values.flatten(1)).all(1)
    lost |= set(torch.nonzero(~finite).flatten().tolist())
    if not lost:
        return values
    return torch.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)
