"""The time that an engine's rows take, predicted by counting operations.

Counted, not measured: the same model on the same batch always has the same engine. The operations
for two and for four samples are extrapolated to the batch, as a loop over samples grows with it
and the overhead of ``vmap`` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ngeval.jacobians.row_source import RowSource
from ngeval.jacobians.terms import whole_block

OVERHEAD, PER_ENTRY, PER_FLOP = 1e-5, 1e-9, 5e-11
"""Seconds of an operation, of an entry that it writes, and of a floating-point operation."""

COUNTED_SIZES = (2, 4)


class _OperationCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.seconds: float = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        written = sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.seconds += OVERHEAD + PER_ENTRY * written
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.seconds += PER_FLOP * formula(*args, **(kwargs or {}), out_val=result)
        return result


def predicted_seconds(source: RowSource, cotangents: Tensor) -> float:
    """Of the rows J_nᵀv_nq of the batch, counted on its first samples."""
    count = len(cotangents)
    if count <= COUNTED_SIZES[1]:
        return _counted(source, cotangents)
    small, large = (_counted(source, cotangents[:size]) for size in COUNTED_SIZES)
    slope = (large - small) / (COUNTED_SIZES[1] - COUNTED_SIZES[0])
    return large + slope * (count - COUNTED_SIZES[1])


def _counted(source: RowSource, cotangents: Tensor) -> float:
    count = _OperationCount()
    with torch.inference_mode(False), count:
        source.rows(cotangents, whole_block(cotangents))
    return count.seconds
