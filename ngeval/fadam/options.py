"""What `ngeval.optim.fadam.FAdam` takes: its options as numbers in their ranges, its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ngeval.errors import InputError
from ngeval.fadam.state_checks import as_number


def name_of(group: Mapping[str, Any], index: int) -> str:
    """A parameter's name, or its place in the group."""
    names: Iterable[str] = group.get("param_names") or ()
    return dict(enumerate(names)).get(index, f"parameter {index} of its group")


def check_parameters(group: Mapping[str, Any]) -> None:
    """Refuse complex parameters.

    Raises:
        InputError: names one.
    """
    for index in (i for i, p in enumerate(group["params"]) if p.is_complex()):
        raise InputError(
            f"FAdam: {name_of(group, index)} is complex, of which it knows no Fisher; give it the "
            "real and imaginary parts, torch.view_as_real(parameter)"
        )


def check_gradients(group: Mapping[str, Any]) -> None:
    """Refuse sparse gradients.

    Raises:
        InputError: names a parameter that has one.
    """
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise InputError(
                f"FAdam: the gradient of {name_of(group, index)} is sparse; its momentum would "
                "be dense, so make the gradient dense too: nn.Embedding(…, sparse=False)"
            )


def numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its options as numbers: ∞ for no clipping, the entry of a tensor.

    Raises:
        InputError: an option is out of range.
    """
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise InputError(f"FAdam: betas must be two numbers (β₁, β₂), not {betas!r}")
    clip = math.inf if group["clip"] is None else as_number(group["clip"])
    exponent = as_number(group["exponent"])
    ranges = [
        ("lr", group["lr"], math.inf, "≥ 0"),
        ("the first of betas", betas[0], 1.0, "in [0, 1)"),
        ("the second of betas", betas[1], 1.0, "in [0, 1)"),
        ("eps", group["eps"], math.inf, "≥ 0"),
        ("weight_decay", group["weight_decay"], math.inf, "≥ 0"),
    ]
    found = [as_number(value) for _, value, _, _ in ranges]
    for (name, value, high, told), number in zip(ranges, found, strict=True):
        if not 0 <= number < high:
            raise InputError(f"FAdam: {name} must be a number {told}, not {value!r}")
    if not 0 < exponent <= 1:
        raise InputError(
            f"FAdam: exponent must be a number in (0, 1], not {group['exponent']!r}; ½ is Adam's"
        )
    if not clip > 0:
        raise InputError(f"FAdam: clip must be a positive number, or None, not {group['clip']!r}")
    lr, beta1, beta2, eps, decay = found
    made = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    return {**group, **made, "clip": clip, "exponent": exponent}
