"""Checks of a model, its inputs and a device before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ngeval.errors import InputError, ModelError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def named_tensors(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The input tensors, each with a name for messages."""
    if isinstance(inputs, dict):
        yield from ((f"inputs[{key!r}]", value) for key, value in inputs.items())
    elif isinstance(inputs, tuple):
        yield from ((f"inputs[{i}]", value) for i, value in enumerate(inputs))
    else:
        yield "inputs", inputs


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


def check_inputs(inputs: Inputs) -> None:
    """Raise unless the inputs are finite tensors of one length, batch first.

    Raises:
        InputError: wrong kind, unequal lengths, an empty batch, NaN or infinite values.
    """
    if not isinstance(inputs, Tensor | tuple | dict) or (
        not isinstance(inputs, Tensor) and not inputs
    ):
        raise InputError(
            "inputs must be a tensor, a non-empty tuple of tensors or a dict of tensors, not "
            f"{type(inputs).__name__}"
        )
    lengths: dict[str, int] = {}
    for name, tensor in named_tensors(inputs):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_nested:
            raise InputError(
                f"{name} is a nested tensor, whose samples have no common shape; pad it "
                "(torch.nested.to_padded_tensor) and pass a mask to the model"
            )
        if tensor.ndim == 0:
            raise InputError(f"{name} has no batch dimension (it is a scalar)")
        if tensor.is_floating_point() and not is_finite(tensor):
            first = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
            raise InputError(f"{name} holds NaN or infinite values, first at index {first}")
        lengths[name] = tensor.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InputError(f"the inputs' first dimensions (samples) differ: {listed}")
    if 0 in lengths.values():
        raise InputError("the batch is empty; give at least one sample")


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
