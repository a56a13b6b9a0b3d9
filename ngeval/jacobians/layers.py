"""The layer-by-layer engine: one forward, Q batched backwards, closed forms for affine layers.

For a layer z = W a + b applied at T positions of a sample (T = 1 for a plain ``Linear``, the
output pixels for a ``Conv2d``), the row of cotangent v is Σ_t b_t a_tᵀ for W and Σ_t b_t for
the bias, with b_t the gradient of vᵀz at the layer's output. At T = 1 the inner product of two
rows is (a·a′ + 1)(b·b′), so Gram matrices and squared sums need no row at all.
Source: Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ngeval.errors import EngineError
from ngeval.functional import ModelFunction, Parameters, autograd_enabled, map_inputs


class UnsupportedLayerError(EngineError):
    """The model is not made of affine layers that are each called once, batch first."""


@dataclass(frozen=True)
class AffineCapture:
    """What the rows of one affine layer are made of, for some samples and cotangents.

    Attributes:
        weight: the weight's parameter name, None if it is frozen.
        bias: the bias's, None if it is frozen or absent.
        weight_shape: as the layer holds it.
        inputs: a, shape ``(N, T, I)``.
        cotangents: b, shape ``(N, Q, T, O)``.
    """

    weight: str | None
    bias: str | None
    weight_shape: torch.Size
    inputs: Tensor
    cotangents: Tensor

    @property
    def positions(self) -> int:
        """T, how often the layer is applied to a sample."""
        return int(self.inputs.shape[1])

    @property
    def row_size(self) -> int:
        """Trainable scalars of the layer."""
        outputs = int(self.cotangents.shape[-1])
        per_output = (self.weight_shape[1:].numel() if self.weight else 0) + bool(self.bias)
        return outputs * per_output

    def rows(self, samples: slice, vectors: slice) -> Parameters:
        """Rows by parameter, shape ``(samples, Q, *parameter.shape)``."""
        inputs, cotangents = self.inputs[samples], self.cotangents[samples, vectors]
        rows = {}
        if self.weight:
            products = torch.einsum("nqto,nti->nqoi", cotangents, inputs)
            rows[self.weight] = products.reshape(*products.shape[:2], *self.weight_shape)
        if self.bias:
            rows[self.bias] = cotangents.sum(2)
        return rows

    def gram(self) -> Tensor:
        """(a·a′ + 1)(b·b′) for every pair of rows, in float64; T must be 1."""
        inputs = self.inputs[:, 0].to(torch.float64)
        cotangents = self.cotangents[:, :, 0].to(torch.float64)
        samples, vectors = cotangents.shape[:2]
        left = inputs @ inputs.T if self.weight else torch.zeros(samples, samples).to(inputs)
        left = left + float(bool(self.bias))
        flat = cotangents.reshape(samples * vectors, -1)
        right = (flat @ flat.T).reshape(samples, vectors, samples, vectors)
        return right.mul_(left[:, None, :, None]).reshape(samples * vectors, -1)

    def squared_sums(self) -> Parameters:
        """Σ_{n,q} of the squared rows, in float64; T must be 1."""
        inputs = self.inputs[:, 0].to(torch.float64).square()
        cotangents = self.cotangents[:, :, 0].to(torch.float64).square().sum(1)
        sums = {}
        if self.weight:
            sums[self.weight] = (cotangents.T @ inputs).reshape(self.weight_shape)
        if self.bias:
            sums[self.bias] = cotangents.sum(0)
        return sums


def capture_layers(
    function: ModelFunction, samples: slice, cotangents: Tensor
) -> list[AffineCapture]:
    """Run some samples forward once and pull Q cotangents of each back to every layer's output.

    Args:
        function: the model at θ on its batch.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.

    Raises:
        UnsupportedLayerError: another kind of layer owns trainable parameters, or one is shared,
            called twice or never, or not batch first.
    """
    owners = affine_owners(function)
    leaves = {name: p.detach().requires_grad_() for name, p in function.parameters.items()}
    batch = map_inputs(function.inputs, lambda t: t[samples])
    with autograd_enabled(), _recorded(owners) as calls:
        outputs = function(leaves, batch)
        _check_calls(owners, calls, len(outputs))
        produced = [calls[name][0][1] for name in owners]
        vectors = cotangents.transpose(0, 1).to(outputs.dtype)
        pulled = torch.autograd.grad(
            outputs, produced, vectors, is_grads_batched=True, materialize_grads=True
        )
    return [
        _affine_capture(function, name, layer, calls[name][0][0], gradient.transpose(0, 1))
        for (name, layer), gradient in zip(owners.items(), pulled, strict=True)
    ]


def layer_rows(function: ModelFunction, samples: slice, cotangents: Tensor) -> Parameters:
    """Rows J_nᵀv of every parameter, from the captured layers."""
    rows: Parameters = {}
    for capture in capture_layers(function, samples, cotangents):
        rows.update(capture.rows(slice(None), slice(None)))
    return {name: rows[name] for name in function.parameters}


def affine_owners(function: ModelFunction) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that own the trainable parameters, by name.

    Raises:
        UnsupportedLayerError: an owner is something else than a plain ``Linear`` or ``Conv2d``,
            or a parameter has two owners.
    """
    owners: dict[str, nn.Linear | nn.Conv2d] = {}
    seen: set[int] = set()
    for name, module in function.model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        if not own:
            continue
        if any(id(parameter) in seen for parameter in own):
            raise UnsupportedLayerError(f"{name} shares a parameter with another module")
        seen.update(id(parameter) for parameter in own)
        if not _is_plain_affine(module):
            raise UnsupportedLayerError(f"{name} is a {type(module).__name__}")
        owners[name] = module
    return owners


def _is_plain_affine(module: nn.Module) -> Any:
    """Whether the closed form holds: the class itself, with no forward hook of the user's."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear


@contextlib.contextmanager
def _recorded(
    owners: dict[str, nn.Linear | nn.Conv2d],
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record each layer's input and output while inside; all hooks are gone afterwards."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in owners}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls[name].append((args[0].detach(), output))
            # The model goes on with a copy, so that an activation working in place leaves the
            # recorded output as it was.
            return output.clone()

        return hook

    handles = []
    try:
        for name, layer in owners.items():
            handles.append(layer.register_forward_hook(hook_for(name)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_calls(
    owners: dict[str, nn.Linear | nn.Conv2d],
    calls: dict[str, list[tuple[Tensor, Tensor]]],
    num_samples: int,
) -> None:
    for name, layer in owners.items():
        if len(calls[name]) != 1:
            raise UnsupportedLayerError(f"{name} is called {len(calls[name])} times")
        inputs = calls[name][0][0]
        least = 4 if isinstance(layer, nn.Conv2d) else 2
        if inputs.ndim < least or inputs.shape[0] != num_samples:
            raise UnsupportedLayerError(f"{name} is not called batch first")


def _affine_capture(
    function: ModelFunction,
    name: str,
    layer: nn.Linear | nn.Conv2d,
    inputs: Tensor,
    gradient: Tensor,
) -> AffineCapture:
    """Bring a layer's input to ``(N, T, I)`` and its output gradients to ``(N, Q, T, O)``."""
    if isinstance(layer, nn.Conv2d):
        gradient = gradient.flatten(3).transpose(2, 3)
        inputs = _patches(layer, inputs)
    else:
        gradient = gradient.reshape(*gradient.shape[:2], -1, gradient.shape[-1])
        inputs = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    prefix = f"{name}." if name else ""
    trainable = function.parameters
    return AffineCapture(
        weight=f"{prefix}weight" if f"{prefix}weight" in trainable else None,
        bias=f"{prefix}bias" if f"{prefix}bias" in trainable else None,
        weight_shape=layer.weight.shape,
        inputs=inputs,
        cotangents=gradient,
    )


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The input patch of every output pixel: shape ``(N, T, I)``."""
    if isinstance(layer.padding, str):
        pads = layer._reversed_padding_repeated_twice if layer.padding == "same" else [0] * 4
        inputs = nn.functional.pad(inputs, pads)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = layer.padding
    return nn.functional.unfold(
        inputs, layer.kernel_size, layer.dilation, padding, layer.stride
    ).transpose(1, 2)
