"""A model at fixed θ on one batch, as a pure function of its trainable parameters.

Nothing here writes to the caller's module: parameters and buffers are passed to it for the duration
of one call (`torch.func.functional_call`), so its weights, gradients, mode, buffers and hooks are
the same afterwards, also after an exception.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ngeval.errors import ModelError
from ngeval.model.autograd import Parameters, autograd_enabled, leaves_of, pull_back
from ngeval.model.checks import check_mode, check_model
from ngeval.model.inputs import (
    Inputs,
    Ragged,
    call_arguments,
    cast_inputs,
    check_inputs,
    map_tensors,
    named_tensors,
)
from ngeval.model.operations import called
from ngeval.model.outputs import Output, Reading, outputs_of
from ngeval.model.sharding import SINGLE, Shards
from ngeval.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class ModelFunction:
    """z = f_θ(x) for a batch x, with f differentiable in the trainable parameters alone.

    Attributes:
        model: the caller's module, never modified.
        inputs: the batch; every tensor has the samples in its first dimension.
        parameters: the trainable parameters by name, detached; they share memory with the
            model's unless ``cast`` is set.
        frozen: the other parameters, if ``cast`` is set.
        buffers: copies; every call works on copies of these.
        originals: the model's parameters themselves, to detect that one was replaced.
        slots: every place in the model that holds a parameter or buffer, with the canonical name
            of what it holds; tied weights have several places.
        versions: the version counter of each parameter, to detect a change in place.
        cast: the dtype that everything is converted to; None for the model's.
        output: which of the model's outputs is z, or how it is read off them.
        ragged: a batch whose samples are passed one by one; ``inputs`` are then their numbers.
        inner_epsilon: machine epsilon of the coarsest type to which the model's code narrows.
        forward_mode: compute J d by forward-mode AD where every operation has a rule.
        inner_gradients: the model differentiates inside its forward pass, which therefore records
            a graph wherever it runs.
        notes: workarounds that were needed, for reports.
        shards: this process's part of the batch.
        split: parameters that FSDP2 keeps in parts; they are left in the model.
    """

    model: nn.Module
    inputs: Inputs
    parameters: Parameters
    frozen: Parameters
    buffers: Parameters
    originals: Parameters
    slots: dict[str, str]
    versions: dict[str, int]
    cast: torch.dtype | None = None
    output: Output = None
    ragged: Ragged | None = None
    inner_epsilon: float = 0.0
    forward_mode: bool = True
    inner_gradients: bool = False
    notes: set[str] = field(default_factory=set)
    shards: Shards = SINGLE
    split: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        dtype: torch.dtype | None,
        output: Output = None,
        shards: Shards = SINGLE,
        split: frozenset[str] = frozenset(),
    ) -> ModelFunction:
        """Check the model and the inputs, and fix θ at its current value.

        Args:
            model: in eval mode; its parameters with ``requires_grad`` are θ.
            inputs: see `ngeval.Problem`, or a `Ragged` batch.
            dtype: compute in this floating-point type; None keeps the model's.
            output: which of the model's outputs is z; None: the tensor, or its ``.logits``.
            shards: this process's part of the batch.
            split: parameters that FSDP2 keeps in parts.

        Raises:
            ModelError: no trainable parameter, NaN weights, active dropout or batch statistics.
            InputError: inputs of the wrong kind, of unequal length, empty, or not finite.
        """
        model = unwrapped(model)
        check_model(model)
        ragged = inputs if isinstance(inputs, Ragged) else None
        if ragged is None:
            check_inputs(inputs)
            inputs = map_tensors(inputs, torch.clone)  # the caller may reuse the batch's memory
        else:
            inputs = torch.arange(ragged.count)
        named: Parameters = dict(model.named_parameters())
        trainable = {n: p.detach() for n, p in named.items() if p.requires_grad}
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        versions = {n: _version_of(p) for n, p in named.items()}
        function = cls(
            model=model,
            inputs=inputs,
            parameters=trainable,
            frozen={},
            buffers=buffers,
            originals=named,
            slots=slots_of(model),
            versions=versions,
            output=output,
            ragged=ragged,
            shards=shards,
            split=split,
        )
        return function if dtype is None else function.converted(dtype)

    def converted(self, dtype: torch.dtype) -> ModelFunction:
        """The same function with everything in another floating-point type."""
        frozen = {n: p.detach() for n, p in self.model.named_parameters() if not p.requires_grad}
        ragged = None if self.ragged is None else replace(self.ragged, cast=dtype)
        return replace(
            self,
            inputs=cast_inputs(self.inputs, dtype),
            ragged=ragged,
            parameters=_cast_all(self.parameters, dtype),
            frozen=_cast_all(frozen, dtype),
            buffers=_cast_all(self.buffers, dtype),
            cast=dtype,
        )

    def on_batch(self, inputs: Inputs, count: int) -> ModelFunction:
        """The same function on a different batch, of the same kind and of ``count`` samples."""
        if self.ragged is None:
            return replace(self, inputs=cast_inputs(inputs, self.cast))
        ragged = replace(self.ragged, inputs=inputs, count=count)
        return replace(self, inputs=torch.arange(count), ragged=ragged)

    def on(self, samples: slice) -> ModelFunction:
        """The same function on some samples of its batch, for this process alone."""
        inputs = map_tensors(self.inputs, itemgetter(samples))
        return replace(self, inputs=inputs, shards=SINGLE)

    def local(self, at_least: int = 0) -> ModelFunction:
        """The same function on this process's samples; see `Shards.local_slice`."""
        if self.shards.alone:
            return self
        return self.on(self.shards.local_slice(self.num_samples, at_least))

    @property
    def num_samples(self) -> int:
        """N, the length of every input's first dimension."""
        return int(next(named_tensors(self.inputs))[1].shape[0])

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable scalars."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def offsets(self) -> dict[str, int]:
        """Where each parameter begins in a flat vector of length P."""
        sizes = [p.numel() for p in self.parameters.values()]
        return dict(zip(self.parameters, itertools.accumulate([0, *sizes]), strict=False))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the trainable parameters; flat vectors have it."""
        dtype = next(iter(self.parameters.values())).dtype
        for parameter in self.parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    @property
    def epsilon(self) -> float:
        """The coarsest rounding among the trainable parameters and inside the model."""
        return max(
            self.inner_epsilon, *(torch.finfo(p.dtype).eps for p in self.parameters.values())
        )

    @property
    def row_epsilon(self) -> float:
        """The rounding of rows in parameter space."""
        return max(self.inner_epsilon, torch.finfo(self.dtype).eps)

    @property
    def device(self) -> torch.device:
        """The device of θ."""
        return next(iter(self.parameters.values())).device

    def __call__(
        self, parameters: Parameters, inputs: Inputs | None = None, *, fused: bool = False
    ) -> Tensor:
        """Outputs ``(N, *positions, C)`` at the given parameters, on ``inputs`` or the batch.

        Args:
            parameters: θ, by name.
            inputs: another batch.
            fused: allow fused attention, which supports single backward passes, but neither
                ``vmap`` nor forward mode.

        Raises:
            ModelError: the model's parameters have changed since this function was made.
        """
        self.check_unchanged()
        batch = self.inputs if inputs is None else inputs
        if self.ragged is not None:
            samples = [self.ragged.sample(n) for n in batch.tolist()]
            return _joined([self._outputs(parameters, one, fused=fused) for one in samples])
        return self._outputs(parameters, batch, fused=fused)

    def _outputs(self, parameters: Parameters, batch: Inputs, *, fused: bool) -> Tensor:
        # Copies, so that a first layer that works in place, or a buffer that counts calls, changes
        # neither the caller's tensors nor the next call's.
        batch = map_tensors(batch, torch.clone)
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        args, kwargs = call_arguments(self.model, batch)
        tensors = {**parameters, **self.frozen, **buffers}
        placed = {slot: tensors[name] for slot, name in self.slots.items() if name in tensors}
        with autograd_enabled() if self.inner_gradients else contextlib.nullcontext():
            raw = called(self.model, placed, args, kwargs, notes=self.notes, fused=fused)
        if isinstance(self.output, Reading):
            return self.output(raw)
        return outputs_of(raw, self.output)

    def check_unchanged(self) -> None:
        """Raise unless the model is still in eval mode and at θ.

        Raises:
            ModelError: its mode or a parameter has changed.
        """
        check_mode(self.model)
        for name, parameter in self.model.named_parameters():
            changed = _version_of(parameter) != self.versions.get(name)
            if changed and name not in self.split:
                raise ModelError(
                    f"parameter {name!r} was modified after this Problem was made; make a new "
                    "Problem for the new weights"
                )

    def jvp(self, tangent: Parameters) -> Tensor:
        """J d for a direction d in parameter space, in the outputs' shape.

        Forward mode where every operation has a rule for it; otherwise two reverse passes
        (J d is the derivative of the linear map w ↦ Jᵀw, contracted with d).
        """
        if not self.forward_mode:
            return self._jvp_by_double_backward(tangent).detach()
        try:
            # Bare dual numbers: a fifth faster than `torch.func.jvp`, which can be nested.
            with torch.inference_mode(False), torch.no_grad(), forward_ad.dual_level():
                dual = {n: forward_ad.make_dual(p, tangent[n]) for n, p in self.parameters.items()}
                outputs = self(dual)
                along: Tensor | None = forward_ad.unpack_dual(outputs).tangent
                result = torch.zeros_like(outputs) if along is None else along.clone()
        except RuntimeError as error:  # what torch raises for an operation without a forward rule
            if is_out_of_memory(error):
                raise
            try:
                result = self._jvp_by_double_backward(tangent)
            except RuntimeError:
                raise error from None
        return result.detach()

    def _jvp_by_double_backward(self, tangent: Parameters) -> Tensor:
        with autograd_enabled():
            leaves = leaves_of(self.parameters)
            outputs = self(leaves)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, list(leaves.values()), dummy, create_graph=True, materialize_grads=True
            )
            along = {p: tangent[n] for n, p in zip(leaves, pulled, strict=True) if p.requires_grad}
            if not along:
                return torch.zeros_like(outputs)
            result = torch.autograd.grad(
                list(along), [dummy], list(along.values()), allow_unused=True
            )[0]
            if result is None:  # Jᵀw depends on w, unless a backward pass is not recorded
                raise RuntimeError("a function of the model's can be differentiated only once")
            return result

    def vjp(self, cotangent: Tensor) -> Parameters:
        """Jᵀw for a cotangent field w of the outputs' shape, by parameter name."""
        with autograd_enabled():
            leaves = leaves_of(self.parameters)
            outputs = self(leaves, fused=True)
            return pull_back([outputs], leaves, [cotangent])

    def tensors_of(self, path: str) -> Parameters:
        """The tensors at θ of the module at a path, by their paths in it, detached."""
        prefix = f"{path}." if path else ""
        own = {name: tensor.detach() for name, tensor in self.originals.items()}
        known = {**own, **self.parameters, **self.frozen, **self.buffers}
        return {
            slot.removeprefix(prefix): known[name]
            for slot, name in self.slots.items()
            if slot.startswith(prefix)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector of length P, parameters in the model's order."""
        return torch.cat([tensors[n].reshape(-1).to(self.dtype) for n in self.parameters])

    def unflatten(self, vector: Tensor) -> Parameters:
        """Split vectors ``(..., P)`` into tensors of the parameters' shapes and dtypes."""
        parts = self.views(vector)
        return {name: part.to(self.parameters[name].dtype) for name, part in parts.items()}

    def views(self, vector: Tensor) -> Parameters:
        """Split vectors ``(..., P)`` into views of the parameters' shapes, in their own dtype."""
        parts = vector.split([p.numel() for p in self.parameters.values()], dim=-1)
        return {
            name: part.reshape((*vector.shape[:-1], *p.shape))
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    """The outputs of single samples as those of a batch."""
    shapes = {tuple(z.shape) for z in outputs}
    if len(shapes) > 1 or next(iter(shapes))[:1] != (1,):
        raise ModelError(
            f"the outputs of single samples have shapes {sorted(shapes)}; split= needs a model "
            "that returns (1, …, C) for each, of one shape"
        )
    return torch.cat(list(outputs))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s or ``DataParallel``'s wrapper."""
    if isinstance(model, nn.DataParallel):
        return cast(nn.Module, model.module)
    inner: Any = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def slots_of(model: nn.Module) -> dict[str, str]:
    """Each place that holds a parameter or buffer, with the canonical (first) name of it."""
    slots: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                slot = f"{prefix}.{name}" if prefix else name
                slots[slot] = first.setdefault(id(tensor), slot)
    return slots


def _version_of(tensor: Tensor) -> int:
    """The counter of in-place changes, −1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex() and dtype.itemsize >= 4:
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _cast_all(tensors: Parameters, dtype: torch.dtype) -> Parameters:
    return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
