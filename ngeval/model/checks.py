"""Checks of a model and a device before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ngeval.errors import InputError, ModelError


def check_device(device: str) -> None:
    """Raise if a device is not available on this machine.

    Raises:
        InputError: unknown to torch, or not available on this machine.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {device!r} is not available here: {str(error).splitlines()[0]}"
        ) from error


def check_model(model: nn.Module) -> None:
    """Raise unless the model has trainable, finite weights and is in eval mode.

    Raises:
        ModelError: the message says what to change.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "the model has no trainable parameter; set requires_grad_(True) on those to grade"
        )
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise ModelError(f"{kind} {name!r} has no values (lazy or on the meta device)")
            if tensor.is_complex() and kind == "parameter":
                raise ModelError(
                    f"parameter {name!r} is complex; ngeval grades real parameters: hold it as its "
                    "real and imaginary part (torch.view_as_real)"
                )
            _check_finite(kind, name, tensor)
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}) has max_norm, which rewrites its "
                "weights in every forward pass; renormalise them once and set max_norm = None"
            )
    check_mode(model)


def _check_finite(kind: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or is_finite(tensor):
        return
    # Buffers hold masks of −inf by design, but never a NaN.
    if kind == "parameter" or bool(torch.isnan(tensor).any()):
        raise ModelError(f"{kind} {name!r} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers has no NaN and nothing infinite.

    The sum is not finite if an entry is not, and costs a fraction of a test of each entry; the
    entries are tested only if the sum is not finite, since it may merely have overflowed.
    """
    return math.isfinite(tensor.detach().sum()) or bool(torch.isfinite(tensor).all())


def check_mode(model: nn.Module) -> None:
    """Raise if a module in train mode makes outputs random or dependent on other samples."""
    active = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and _differs_in_train_mode(module)
    ]
    if active:
        listed = ", ".join(active[:5]) + (", …" if len(active) > 5 else "")
        raise ModelError(
            f"{len(active)} module(s) in train mode would change the outputs: {listed}; "
            "call model.eval() first"
        )


def _differs_in_train_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    if isinstance(module, nn.RReLU):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rate = getattr(module, "dropout", 0.0)  # MultiheadAttention and the recurrent layers
    return isinstance(rate, float | int) and not math.isclose(float(rate), 0.0)
