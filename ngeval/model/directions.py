"""Directions in parameter space: as callers pass them, and as flat vectors of length P."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.model.function import ModelFunction

Direction = Tensor | Mapping[str, Tensor]
"""A vector of length P, or a tensor for every trainable parameter by name."""


def vector_of(direction: Direction, function: ModelFunction) -> Tensor:
    """Check a direction and flatten it to length P.

    Args:
        direction: an update.
        function: the model at θ.

    Raises:
        InputError: wrong length or shape, missing or unknown names, values not finite.
    """
    if isinstance(direction, Tensor):
        if direction.shape != (function.num_parameters,):
            raise InputError(
                f"the direction has shape {tuple(direction.shape)}; it needs "
                f"({function.num_parameters},), one entry for each trainable scalar"
            )
        vector = direction.detach()
    elif isinstance(direction, Mapping):
        vector = _named_vector(direction, function.parameters)
    else:
        raise InputError(
            "a direction is a torch vector or a dict of tensors by parameter name, not "
            f"{type(direction).__name__}"
        )
    if not math.isfinite(largest(vector)):
        raise InputError("the direction holds NaN or infinite values")
    return vector


def largest(vector: Tensor) -> float:
    """The largest |v|, or NaN if v has one, in a single pass without a copy."""
    wide = vector if vector.is_floating_point() else vector.to(torch.float64)
    return float(torch.linalg.vector_norm(wide, math.inf)) if wide.numel() else 0.0


def _named_vector(direction: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
    missing = [name for name in expected if name not in direction]
    unknown = [name for name in direction if name not in expected]
    if missing or unknown:
        raise InputError(
            f"the direction's names differ from the trainable parameters: missing {missing}, "
            f"unknown {unknown}"
        )
    for name, parameter in expected.items():
        if not isinstance(direction[name], Tensor):
            raise InputError(f"the direction's {name!r} is not a tensor")
        if direction[name].shape != parameter.shape:
            raise InputError(
                f"the direction's {name!r} has shape {tuple(direction[name].shape)}, the "
                f"parameter {tuple(parameter.shape)}"
            )
    return torch.cat([direction[name].detach().reshape(-1) for name in expected])
