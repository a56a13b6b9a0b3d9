"""The states of optimizers in files, read without running code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ngeval.checkpoints.reading import load_file
from ngeval.errors import CheckpointError

PLACES = (
    "states",
    "optimizer_states",
    "optimizer_state",
    "optimizer_state_dict",
    "optimizer_state_dicts",
    "optimizers",
    "optimizer",
    "optim",
)
"""The keys under which training programs keep the states of their optimizers."""

StateDict = dict[str, Any]


@dataclass(frozen=True)
class SavedOptimizer:
    """The optimizers' states in a file.

    Attributes:
        name: the optimizer's name, which ngeval records; None in files of other programs.
        states: the ``state_dict`` of each optimizer.
    """

    name: str | None
    states: list[StateDict]


def save_optimizer(optimizers: Sequence[Optimizer], path: Path, name: str) -> None:
    """Write optimizers' states, with the optimizer's name."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"optimizer": name, "states": states}, path)


def read_optimizer(path: Path, *, allow_pickle: bool = False) -> SavedOptimizer:
    """Read optimizers' states without running code.

    Args:
        path: a file of `save_optimizer`; a file with ``optimizer.state_dict()`` or a list of
            several (a Trainer's ``optimizer.pt``); or a training program's checkpoint with the
            states under one of `PLACES` (Lightning's ``optimizer_states``).
        allow_pickle: unpickle with code; only for files that you trust.

    Raises:
        CheckpointError: the file is unreadable, asks for code to be run, or holds no optimizer's
            state.
    """
    content = load_file(path, "optimizer.state_dict()", allow_pickle=allow_pickle)
    states = _state_dicts(content)
    if not states:
        raise CheckpointError(
            f"{path} holds no optimizer's state: ngeval reads optimizer.state_dict(), or a list of "
            f"them, also under one of {', '.join(PLACES)}"
        )
    for state in states:
        _check(path, state)
    name = content.get("optimizer") if isinstance(content, Mapping) else None
    return SavedOptimizer(name if isinstance(name, str) else None, states)


def _state_dicts(content: Any, depth: int = 0) -> list[StateDict]:
    """The state dicts in the content of a file, in order."""
    if isinstance(content, Mapping):
        if "state" in content and "param_groups" in content:
            return [dict(content)]
        if depth < 2:
            for place in PLACES:
                if states := _state_dicts(content.get(place), depth + 1):
                    return states
        content = list(content.values()) if depth else []
    if isinstance(content, list | tuple):
        parts = [_state_dicts(value, 2) for value in content]
        if all(len(part) == 1 for part in parts):
            return [part[0] for part in parts]
    return []


def _check(path: Path, state: StateDict) -> None:
    """Refuse a state that does not have the form of ``optimizer.state_dict()``."""
    entries, groups = state["state"], state["param_groups"]
    wrong = ""
    if not isinstance(entries, Mapping) or not isinstance(groups, list | tuple):
        wrong = "its state and param_groups"
    for number, group in enumerate(groups if not wrong else ()):
        wrong = wrong or _misformed(f"param_groups[{number}]", group, entries)
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong} do not have the form of optimizer.state_dict(); save that as it is"
        )


def _misformed(where: str, group: Any, entries: Mapping[Any, Any]) -> str:
    """The part of a group and its parameters' states that is misformed, or an empty text."""
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
        return where
    keys, names = group["params"], group.get("param_names")
    if not all(isinstance(key, int | str) for key in keys):
        return f"the params of {where}"
    texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if names is not None and not (texts and len(names) == len(keys)):
        return f"the param_names of {where}"
    without = [key for key in keys if not isinstance(entries.get(key, {}), Mapping)]
    return f"the entries of state[{without[0]!r}]" if without else ""
