"""The processes that ``torchrun`` started, as its environment variables describe them.

A variable that is not a number is an `InputError`.
"""

from __future__ import annotations

import os

from ngeval.errors import InputError


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, 0 without torchrun."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine, 0 without torchrun."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of processes on this machine, 1 without torchrun."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}, not a number as torchrun's")
    return int(text)
