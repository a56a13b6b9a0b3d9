"""What is in a saved state can be stepped with: numbers that are finite, of the right type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ngeval.methods.optimizer.clone import reachable

MEND = "; set it in the file's param_groups and save the file again"


class MisfitError(Exception):
    """Why a state does not fit; the caller adds which file it was."""


def check_hyperparameters(hyper: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """A group's numbers are numbers, and finite where a step would be silently lost.

    Args:
        hyper: of a group in a file.
        defaults: of the optimizer's class.

    Raises:
        MisfitError: names the hyperparameter.
    """
    for key in (k for k, default in defaults.items() if isinstance(default, float) and k in hyper):
        value = hyper[key]
        if not _is_number(value):
            raise MisfitError(f"{key} in its groups is {value!r}, not a number{MEND}")
        if not _is_usable(value, infinite=key != "lr"):
            raise MisfitError(f"{key} in its groups is {float(value)}{MEND}")
    if (count := hyper.get("step")) is not None:
        _check_count("step in its groups", count)


def check_entry(key: str, name: str, expected: Any, found: Any) -> None:
    """An entry of a parameter's state is of the type that a step makes, and finite.

    Args:
        key: of the entry.
        name: of the parameter.
        expected: the entry after a first step.
        found: the entry in the file.

    Raises:
        MisfitError: names the entry and the parameter.
    """
    where = f"{key} of {name}"
    if key == "step":
        _check_count(where, found)
        return
    numeric = isinstance(expected, Tensor | int | float) and not isinstance(expected, bool)
    if numeric and not isinstance(found, Tensor | int | float):
        raise MisfitError(f"{where} is a {type(found).__name__}, not a tensor or number")
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        real = expected.is_floating_point()
        if (real and not found.is_floating_point()) or expected.is_complex() != found.is_complex():
            raise MisfitError(f"{where} is of {found.dtype}, where {expected.dtype} is needed")
    for value in [found] if isinstance(found, float) else reachable(found):
        if isinstance(value, Tensor | float) and not _is_usable(value):
            raise MisfitError(f"{where} is NaN or infinite: the run had diverged, or overflowed")


def _check_count(where: str, value: Any) -> None:
    """Refuse what no number of steps can be.

    Raises:
        MisfitError: NaN, infinite, negative, or no real number.
    """
    if not _is_number(value) or not _is_usable(value) or float(value) < 0:
        told = value.tolist() if isinstance(value, Tensor) and value.numel() == 1 else value
        raise MisfitError(f"{where} is {told!r}, which is no number of steps")


def _is_number(value: Any) -> bool:
    """Whether it is one real number, as such or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_usable(value: Tensor | float, *, infinite: bool = False) -> bool:
    """Whether a number, or all of a tensor, is finite; with ``infinite`` only not NaN."""
    tensor = torch.as_tensor(value)
    good = ~torch.isnan(tensor) if infinite else torch.isfinite(tensor)
    return bool(good.all())
