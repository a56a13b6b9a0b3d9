"""Many tangents J d at once, in bounded memory: forward mode under ``vmap`` over directions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ngeval.model.function import ModelFunction, Parameters, model_errors
from ngeval.utils.memory import is_out_of_memory


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
