"""The choice of samples for batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ngeval.errors import TaskError


def shuffled_batches(
    size: int, batch_size: int, num_batches: int | None, seed: int
) -> Iterator[Tensor]:
    """Indices of the samples in each batch, without replacement within a pass over the data.

    Without ``num_batches`` it is one pass over the ``size`` samples, whose last batch can be
    smaller.
    """
    if not 1 <= batch_size <= size:
        raise TaskError(f"batch size {batch_size} must be from 1 to {size}, the number of samples")
    generator = torch.Generator().manual_seed(seed)
    if num_batches is None:
        yield from torch.randperm(size, generator=generator).split(batch_size)
        return
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_batches):
        if len(order) < batch_size:
            order = torch.randperm(size, generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield chosen
