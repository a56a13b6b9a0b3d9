"""How much memory there is, and what to do when there was less."""

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
"""What part of free memory is taken where nothing is asked for: others live here too."""

LEAST = 2**20
"""Below this many bytes an out-of-memory error is not ours to mend."""


def free_memory(device: torch.device) -> int:
    """Bytes to use on a device: four fifths of what is free now, shared with the other ranks."""
    ranks = local_world_size()
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return int(SHARE_OF_FREE * free / -(-ranks // torch.cuda.device_count()))
    return int(SHARE_OF_FREE * psutil.virtual_memory().available / ranks)


def describe_bytes(count: float) -> str:
    """An amount as people write it.

    >>> describe_bytes(3 * 2**29)
    '1.5 GiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"


def halving(attempt: Callable[[int], T], memory: int) -> T:
    """Call ``attempt(memory)``, with half the memory after every out-of-memory error."""
    while True:
        try:
            return attempt(memory)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if memory < LEAST:
                raise EngineError(OUT_OF_MEMORY) from error
        # Outside the handler, so that the traceback no longer holds what the attempt had made.
        memory //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
