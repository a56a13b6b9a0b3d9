"""The floating-point type that a model is graded in.

γ belongs to the weights, not to the type that they happen to be stored in. By default everything
is converted to float64, whose rounding is far below any difference between updates; a step in
float32 costs about half as much.
"""

from __future__ import annotations

import torch
from torch import nn

from ngeval.errors import InputError
from ngeval.model.checks import check_model

AUTO = "auto"
"""Float64 where that is affordable; the default."""

MODEL = "model"
"""The types of the model's own tensors."""

COPIES = 6
"""Vectors of all parameters that a computation in float64 may hold at once."""

FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with float64 at half the rate of float32; others have 1/32 or less."""


def candidate_dtypes(
    model: nn.Module, dtype: torch.dtype | str | None, memory: int
) -> list[torch.dtype | None]:
    """The types to try in turn until the model's code accepts one; None is the model's own.

    Float64 is affordable if `COPIES` vectors of all parameters fit in the memory and the device
    computes in it at a reasonable rate. Otherwise half precision is converted to float32.

    Args:
        model: the model.
        dtype: ``"auto"``, ``"model"`` or a floating-point type.
        memory: bytes to work in.

    Raises:
        InputError: not a floating-point type.
    """
    if dtype == MODEL or dtype is None:
        return [None]
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return [dtype]
    if dtype != AUTO:
        raise InputError(
            f"dtype must be 'auto', 'model' or a floating-point torch.dtype, not {dtype!r}"
        )
    check_model(model)
    parameters = list(model.parameters())
    entries = sum(parameter.numel() for parameter in parameters)
    if COPIES * 8 * entries <= memory and all(_has_float64(p.device) for p in parameters):
        return [torch.float64, *_without_half(parameters)]
    return _without_half(parameters)


def names_dtype(error: Exception) -> bool:
    """Whether an error of a model's code may be due to the conversion to another type."""
    return any(word in str(error).lower() for word in ("dtype", "scalar type", "double", "float64"))


def _without_half(parameters: list[nn.Parameter]) -> list[torch.dtype | None]:
    """The model's own types, after float32 if there is half precision among them."""
    half = any(p.is_floating_point() and p.element_size() < 4 for p in parameters)
    return [torch.float32, None] if half else [None]


def _has_float64(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in FULL_RATE
    return device.type == "cpu"
