"""Checks that the values of a saved state can be used in a step: finite, of the right type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ngeval.methods.optimizer.clone import reachable

FIX = "; set it in the file's param_groups and save the file again"


class MisfitError(Exception):
    """The reason why a state does not fit; the caller adds the name of the file."""


def check_hyperparameters(hyper: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check those hyperparameters of a file's group that are numbers in the class's defaults.

    Raises:
        MisfitError: one is not a number, or not a usable one.
    """
    for key in (k for k, default in defaults.items() if isinstance(default, float) and k in hyper):
        value = hyper[key]
        if not _is_number(value):
            raise MisfitError(f"{key} in its groups is {value!r}, not a number{FIX}")
        if not _is_usable(value, infinite=key != "lr"):
            raise MisfitError(f"{key} in its groups is {float(value)}{FIX}")
    if (count := hyper.get("step")) is not None:
        _check_count("step in its groups", count)


def check_entry(key: str, name: str, expected: Any, value: Any) -> None:
    """Check that an entry of a parameter's state has the type that a step creates, and is finite.

    Raises:
        MisfitError: it does not; the message names the entry and the parameter.
    """
    where = f"{key} of {name}"
    if key == "step":
        _check_count(where, value)
        return
    numeric = isinstance(expected, Tensor | int | float) and not isinstance(expected, bool)
    if numeric and not isinstance(value, Tensor | int | float):
        raise MisfitError(f"{where} is a {type(value).__name__}, not a tensor or number")
    if isinstance(expected, Tensor) and isinstance(value, Tensor):
        real = expected.is_floating_point()
        if (real and not value.is_floating_point()) or expected.is_complex() != value.is_complex():
            raise MisfitError(f"{where} is of {value.dtype}, where {expected.dtype} is needed")
    for part in [value] if isinstance(value, float) else reachable(value):
        if isinstance(part, Tensor | float) and not _is_usable(part):
            raise MisfitError(f"{where} is NaN or infinite: the run had diverged, or overflowed")


def _check_count(where: str, value: Any) -> None:
    """Check that a value is a finite number ≥ 0."""
    if not _is_number(value) or not _is_usable(value) or float(value) < 0:
        shown = value.tolist() if isinstance(value, Tensor) and value.numel() == 1 else value
        raise MisfitError(f"{where} is {shown!r}, which is not a number of steps")


def _is_number(value: Any) -> bool:
    """Whether a value is one real number, in a tensor or not."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_usable(value: Tensor | float, *, infinite: bool = False) -> bool:
    """Whether a number, or all of a tensor, is finite; ``infinite`` allows infinity too."""
    tensor = torch.as_tensor(value)
    good = ~torch.isnan(tensor) if infinite else torch.isfinite(tensor)
    return bool(good.all())
