"""Checks of an optimizer's settings, and of a state before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ngeval.errors import InputError


def check_state(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    tensors: Collection[str],
    foreign: Collection[str] = (),
) -> None:
    """Refuse a state of another class, or of parameters of other shapes, and name what differs.

    Of a parameter's state the entries ``tensors`` have its shape, and ``step`` is a number;
    ``foreign`` are settings that other classes have and the optimizer's does not.
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
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise InputError(
            f"{name}: the state is of other parameters: groups of {sizes} tensors, here of "
            f"{expected}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for _, keys in groups for key in keys]
    for index, (key, parameter) in enumerate(zip(keys, parameters, strict=True)):
        fault = _misfit(entries[key], parameter, tensors) if key in entries else ""
        if fault:
            raise InputError(f"{name}: the state of parameter {index} does not fit: {fault}")


class Range(NamedTuple):
    """The numbers that a setting can have, and how an error message describes them."""

    allowed: Callable[[float], bool]
    words: str


def number_in(value: Any, name: str, numbers: Range) -> float:
    """A setting, a number or a tensor of one, as a number; an `InputError` outside its range."""
    number = as_number(value)
    if math.isnan(number) or not numbers.allowed(number):
        raise InputError(f"{name} must be {numbers.words}, not {value!r}")
    return number


def as_number(value: Any) -> float:
    """A setting's number; NaN for text, None, a truth value or several numbers."""
    if isinstance(value, str | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _misfit(entry: Any, parameter: Tensor, tensors: Collection[str]) -> str:
    """The reason why a parameter's state does not fit; empty if it does."""
    if not isinstance(entry, Mapping):
        return f"it is a {type(entry).__name__}, not a dict"
    if other := [str(key) for key in entry if key not in (*tensors, "step")]:
        return f"{', '.join(sorted(other))} is of another optimizer"
    step = as_number(entry.get("step"))
    if entry and not (math.isfinite(step) and 0 <= step == int(step)):
        return f"step must be a whole number ≥ 0, not {entry.get('step')!r}"
    for key in tensors:
        value = entry.get(key)
        if key in entry and not isinstance(value, Tensor):
            return f"{key} is a {type(value).__name__}, not a tensor"
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            return f"{key} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
    return ""
