"""The memory that is free, and retries after an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from ngeval.errors import EngineError
from ngeval.utils.torchrun import local_world_size

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory; use a smaller batch, or a smaller memory= for smaller blocks"

SHARE_OF_FREE = 0.8
"""The share of free memory that is used by default, since other programs need some, too."""

MIN_BYTES = 2**20
"""With less memory than this, an out-of-memory error is not retried."""


def free_memory(device: torch.device) -> int:
    """Bytes to use on a device: four fifths of the free memory, shared among the local ranks."""
    ranks = local_world_size()
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return int(SHARE_OF_FREE * free / -(-ranks // torch.cuda.device_count()))
    return int(SHARE_OF_FREE * psutil.virtual_memory().available / ranks)


def halving(attempt: Callable[[int], T], memory: int) -> T:
    """Call ``attempt(memory)``, with half the memory after every out-of-memory error."""
    while True:
        try:
            return attempt(memory)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if memory < MIN_BYTES:
                raise EngineError(OUT_OF_MEMORY) from error
        # Outside the handler, whose traceback would keep the tensors of the attempt alive.
        memory //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
