"""A model at fixed θ on one batch, as a pure function of its trainable parameters.

Nothing here writes to the caller's module: parameters and buffers are handed to it for the
length of one call (`torch.func.functional_call`), so its weights, gradients, mode, buffers and
hooks are the same afterwards, also after an exception.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngeval.errors import InputError, ModelError, NgevalError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class ModelFunction:
    """z = f_θ(x) for a batch x, with f differentiable in the trainable parameters alone.

    Attributes:
        model: the caller's module, never modified.
        inputs: the batch; every tensor has the samples in its first dimension.
        parameters: the trainable parameters by name, detached (they share memory with the
            model's own unless a dtype was asked for).
        frozen: the other parameters, where a dtype was asked for.
        buffers: as they were; every call works on its own copies.
        versions: the version counter of each parameter, by which a change in place shows.
    """

    model: nn.Module
    inputs: Inputs
    parameters: Parameters
    frozen: Parameters
    buffers: Parameters
    versions: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> ModelFunction:
        """Check the model and the inputs, and take θ as it is now.

        Args:
            model: in eval mode; its parameters with ``requires_grad`` are θ.
            inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
            dtype: compute in this floating-point type; None keeps the model's own.

        Raises:
            ModelError: no trainable parameter, NaN weights, active dropout or batch statistics.
            InputError: inputs of the wrong kind, of unequal length, empty, or not finite.
        """
        _check_model(model)
        check_inputs(inputs)
        trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        frozen: Parameters = {}
        if dtype is not None:
            frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
            trainable, frozen, buffers = (
                {n: _cast(t, dtype) for n, t in group.items()}
                for group in (trainable, frozen, buffers)
            )
            inputs = map_inputs(inputs, lambda t: _cast(t, dtype))
        versions = {n: _version(p) for n, p in model.named_parameters()}
        return cls(model, inputs, trainable, frozen, buffers, versions)

    @property
    def num_samples(self) -> int:
        """N, the length of every input's first dimension."""
        return int(next(_tensors(self.inputs))[1].shape[0])

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable scalars."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the trainable parameters; flat vectors have it."""
        dtype = next(iter(self.parameters.values())).dtype
        for parameter in self.parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where θ lives."""
        return next(iter(self.parameters.values())).device

    def __call__(self, parameters: Parameters, inputs: Inputs | None = None) -> Tensor:
        """Outputs ``(N, *positions, C)`` at the given parameters, on ``inputs`` or the batch.

        Raises:
            ModelError: the model's parameters were changed since this function was made.
        """
        self._check_unchanged()
        batch = self.inputs if inputs is None else inputs
        # Clones, so that neither a first layer working in place nor a buffer that counts calls
        # reaches the caller's tensors or the next call.
        batch = map_inputs(batch, torch.clone)
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = {}
        if isinstance(batch, dict):
            kwargs = batch
        else:
            args = batch if isinstance(batch, tuple) else (batch,)
        # Forward-mode AD has no rule for fused attention, so every pass uses the plain one.
        with sdpa_kernel(SDPBackend.MATH):
            raw = torch.func.functional_call(
                self.model, {**parameters, **self.frozen, **buffers}, args, kwargs
            )
        return outputs_of(raw)

    def _check_unchanged(self) -> None:
        for name, parameter in self.model.named_parameters():
            if _version(parameter) != self.versions[name]:
                raise ModelError(
                    f"parameter {name!r} was modified after this Problem was made; make a new "
                    "Problem for the new weights"
                )

    def single(self, parameters: Parameters, sample: Inputs) -> Tensor:
        """Outputs ``(*positions, C)`` for one sample given without its batch dimension."""
        return self(parameters, map_inputs(sample, lambda t: t.unsqueeze(0))).squeeze(0)

    def jvp(self, tangent: Parameters) -> Tensor:
        """T = J d for a direction d in parameter space: the outputs' shape.

        Forward mode where every operation has a rule for it; otherwise two reverse passes
        (J d is the derivative of the linear map w ↦ Jᵀw, contracted with d).
        """
        try:
            with torch.inference_mode(False):
                result: Tensor = torch.func.jvp(self, (self.parameters,), (tangent,))[1]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's word for an operation without a forward rule
            try:
                result = self._jvp_by_double_backward(tangent)
            except RuntimeError:
                raise error from None
        return result.detach()

    def _jvp_by_double_backward(self, tangent: Parameters) -> Tensor:
        with autograd_enabled():
            leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
            outputs = self(leaves)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, list(leaves.values()), dummy, create_graph=True, materialize_grads=True
            )
            along = [tangent[name] for name in leaves]
            return torch.autograd.grad(pulled, [dummy], along, materialize_grads=True)[0]

    def vjp(self, cotangent: Tensor) -> Parameters:
        """Jᵀw for a cotangent field w of the outputs' shape, by parameter name."""
        with autograd_enabled():
            leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
            outputs = self(leaves)
            gradients = torch.autograd.grad(
                outputs,
                list(leaves.values()),
                cotangent.to(outputs.dtype),
                materialize_grads=True,
            )
        return dict(zip(leaves, gradients, strict=True))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector of length P, parameters in the model's own order."""
        return torch.cat([tensors[n].reshape(-1).to(self.dtype) for n in self.parameters])

    def unflatten(self, vector: Tensor) -> Parameters:
        """Split a vector of length P into tensors of the parameters' shapes and dtypes."""
        sizes = [p.numel() for p in self.parameters.values()]
        parts = vector.split(sizes)
        return {
            name: part.reshape(p.shape).to(p.dtype)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }


def map_inputs(inputs: Inputs, function: Any) -> Inputs:
    """Apply a function to every tensor of the inputs, keeping their structure."""
    if isinstance(inputs, dict):
        return {key: function(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    result: Tensor = function(inputs)
    return result


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Turn whatever a user's model raises into a `ModelError` that says it was the model.

    Raises:
        ModelError: something other than an ngeval error was raised inside.
    """
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model failed on its inputs: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """Record gradients whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _version(tensor: Tensor) -> int:
    """The counter of in-place changes; tensors made in inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tensors(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The input tensors, each with a name for messages."""
    if isinstance(inputs, dict):
        yield from ((f"inputs[{key!r}]", value) for key, value in inputs.items())
    elif isinstance(inputs, tuple):
        yield from ((f"inputs[{i}]", value) for i, value in enumerate(inputs))
    else:
        yield "inputs", inputs


def outputs_of(raw: Any) -> Tensor:
    """The outputs z in a model's return value.

    Raises:
        ModelError: it is neither a tensor nor an object with a ``.logits`` tensor.
    """
    outputs = raw if isinstance(raw, Tensor) else getattr(raw, "logits", None)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returned {type(raw).__name__}; ngeval needs a tensor of outputs or an "
            "object with a .logits tensor (wrap the model in a module that picks one)"
        )
    return outputs


def check_device(device: str) -> None:
    """Raise if there is no such device here.

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
    for name, tensor in _tensors(inputs):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.ndim == 0:
            raise InputError(f"{name} has no batch dimension (it is a scalar)")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            first = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
            raise InputError(f"{name} holds NaN or infinite values, first at index {first}")
        lengths[name] = tensor.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InputError(f"the inputs' first dimensions (samples) differ: {listed}")
    if 0 in lengths.values():
        raise InputError("the batch is empty; give at least one sample")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "the model has no trainable parameter; set requires_grad_(True) on those to grade"
        )
    for kind, named in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in named:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                # Buffers hold masks of −inf by design; a NaN is never one.
                if kind == "buffer" and not bool(torch.isnan(tensor).any()):
                    continue
                raise ModelError(f"{kind} {name!r} holds NaN or infinite values")
    _check_mode(model)


def _check_mode(model: nn.Module) -> None:
    """Refuse modules whose train mode makes the output random or ties samples together."""
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
