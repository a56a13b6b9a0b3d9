"""Directions in parameter space: as flat vectors of length P, and many tangents J d at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.model.autograd import Parameters, model_errors
from ngeval.model.function import ModelFunction
from ngeval.utils.memory import is_out_of_memory

Direction = Tensor | Mapping[str, Tensor]
"""A vector of length P, or a tensor for every trainable parameter by name."""


def vector_of(direction: Direction, function: ModelFunction) -> Tensor:
    """Check a direction and flatten it to length P.

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


def push_directions(function: ModelFunction, directions: Tensor) -> Tensor:
    """The tangents J d of k directions d.

    Args:
        function: the model at θ on its batch.
        directions: D, shape ``(k, P)``. If entries are so large or small that products could
            leave the dtype's range, all directions are scaled to unit size first.

    Returns:
        J d for each, float64, shape ``(k, N, *positions, C)``.
    """
    scale = torch.linalg.vector_norm(directions, math.inf, dim=1).to(torch.float64)
    range_of = torch.finfo(function.dtype)
    low, high = range_of.tiny**0.25, range_of.max**0.25
    in_range = (scale > low) & (scale < high)
    if bool(in_range.all()):
        scale, unit = torch.ones_like(scale), directions  # a copy may be gigabytes
    else:
        unit = directions / torch.where(scale > 0, scale, 1.0).unsqueeze(1).to(directions.dtype)
    with model_errors(), torch.inference_mode(False):
        tangents = _batched(function, unit)
        if tangents is None:
            tangents = torch.stack([function.jvp(function.unflatten(d)) for d in unit])
    shape = (-1, *[1] * (tangents.ndim - 1))
    scaled: Tensor = tangents.to(torch.float64) * scale.reshape(shape)
    return scaled


def _batched(function: ModelFunction, directions: Tensor) -> Tensor | None:
    """One forward pass for all directions; None if an operation has no rule for that."""
    if not function.forward_mode or len(directions) == 1:
        return None

    def along(tangent: Parameters) -> Tensor:
        result: Tensor = torch.func.jvp(function, (function.parameters,), (tangent,))[1]
        return result

    try:
        pushed: Tensor = torch.func.vmap(along)(function.unflatten(directions))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return None
    return pushed.detach()


def chunk_sizes(
    num_samples: int, num_directions: int, sample_bytes: int, memory: int
) -> tuple[int, int]:
    """How many samples and directions to push forward at a time.

    A tangent takes about as much memory as its sample's activations. Directions are batched first,
    since they share the forward pass.
    """
    together = max(1, memory // max(sample_bytes, 1))
    directions = min(num_directions, max(1, together // 2))
    return max(1, min(num_samples, together // (directions + 1))), directions


def slices(count: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step``."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
