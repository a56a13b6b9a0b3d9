"""What the optimizers here have in common: whether a state that is loaded is one of theirs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ngeval.errors import InputError


def check_state(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    tensors: Collection[str],
    foreign: Collection[str] = (),
) -> None:
    """Refuse a state of another class, or of parameters of other shapes.

    Args:
        optimizer: that is to load it.
        state_dict: as `torch.optim.Optimizer.state_dict` gives it.
        tensors: the entries of a parameter's state that have its shape; ``step`` is a number.
        foreign: settings that this class does not have and others do.

    Raises:
        InputError: names what is missing, or does not fit.
    """
    name = type(optimizer).__name__
    try:
        groups = [(group, list(group["params"])) for group in state_dict["param_groups"]]
        entries = dict(state_dict["state"])
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{name}: not a state_dict of an optimizer: no 'state' or 'param_groups' in it"
        ) from error
    for group, _ in groups:
        missing = sorted(optimizer.defaults.keys() - group.keys())
        if missing or (extra := sorted(group.keys() & set(foreign))):
            what = f"has no {', '.join(missing)}" if missing else f"also has {', '.join(extra)}"
            raise InputError(f"{name}: the state is of another optimizer: its group {what}")
    sizes = [len(keys) for _, keys in groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise InputError(
            f"{name}: the state is of other parameters: groups of {sizes} tensors, here of {own}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for _, keys in groups for key in keys]
    for place, (key, parameter) in enumerate(zip(keys, parameters, strict=True)):
        if key in entries:
            fault = _misfit(entries[key], parameter, tensors)
            if fault:
                raise InputError(f"{name}: the state of parameter {place} does not fit: {fault}")


def _misfit(entry: Any, parameter: Tensor, tensors: Collection[str]) -> str:
    """What is wrong with a parameter's state, nothing if it fits."""
    if not isinstance(entry, Mapping):
        return f"it is a {type(entry).__name__}, not a dict"
    if other := [str(key) for key in entry if key not in (*tensors, "step")]:
        return f"{', '.join(sorted(other))} is of another optimizer"
    if entry and not _is_count(entry.get("step")):
        return f"step must be a whole number ≥ 0, not {entry.get('step')!r}"
    for key in tensors:
        value = entry.get(key)
        if key in entry and not isinstance(value, Tensor):
            return f"{key} is a {type(value).__name__}, not a tensor"
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            return f"{key} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
    return ""


def _is_count(value: Any) -> bool:
    number = as_number(value)
    return math.isfinite(number) and 0 <= number == int(number)


def as_number(value: Any) -> float:
    """A setting's number, NaN where it is none: a text, None, a truth value, several numbers."""
    if isinstance(value, str | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
