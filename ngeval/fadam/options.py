"""Checks of what `ngeval.fadam.optimizer.FAdam` is given: options in their ranges, tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ngeval.errors import InputError
from ngeval.fadam.state_checks import Range, number_in

NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "a number ≥ 0")
RANGES = {
    "lr": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "exponent": Range(lambda x: 0 < x <= 1, "a number in (0, 1], and ½ is that of Adam"),
}
BETA = Range(lambda x: 0 <= x < 1, "a number in [0, 1)")
CLIP = Range(lambda x: x > 0, "a positive number, or None")


def check_parameters(group: Mapping[str, Any]) -> None:
    """Check that no parameter of a group is complex."""
    for index, parameter in enumerate(group["params"]):
        if parameter.is_complex():
            raise InputError(
                f"FAdam: {_name(group, index)} is complex, and its Fisher is not defined; give "
                "FAdam the real and imaginary parts, torch.view_as_real(parameter)"
            )


def check_gradients(group: Mapping[str, Any]) -> None:
    """Check that no gradient of a group is sparse."""
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise InputError(
                f"FAdam: the gradient of {_name(group, index)} is sparse; its momentum would "
                "be dense, so make the gradient dense too: nn.Embedding(…, sparse=False)"
            )


def numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its options as numbers: ∞ for no clipping, the entry of a tensor.

    Raises:
        InputError: an option is out of range.
    """
    betas, clip = group["betas"], group["clip"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise InputError(f"FAdam: betas must be two numbers (β₁, β₂), not {betas!r}")
    numbers = {name: number_in(group[name], f"FAdam: {name}", RANGES[name]) for name in RANGES}
    first = number_in(betas[0], "FAdam: the first of betas", BETA)
    second = number_in(betas[1], "FAdam: the second of betas", BETA)
    limit = math.inf if clip is None else number_in(clip, "FAdam: clip", CLIP)
    return {**group, **numbers, "betas": (first, second), "clip": limit}


def _name(group: Mapping[str, Any], index: int) -> str:
    """A parameter's name where the group records it, or its position in the group."""
    names: Sequence[str] = group.get("param_names") or ()
    return names[index] if index < len(names) else f"parameter {index} of its group"
