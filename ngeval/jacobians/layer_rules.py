"""The rules from a recorded call of a layer to terms of rows.

A rule applies to a layer that is exactly of its class and has no hook or forward of the user's. Any
other module is differentiated as a function of its own; see `ngeval.jacobians.vjp_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ngeval.jacobians.capture_plan import HookedModule, LayerRule, RecordedCall, for_each
from ngeval.jacobians.layouts import CallLayout
from ngeval.jacobians.recurrent import RECURRENT_RULES
from ngeval.jacobians.terms import AffineTerm, ComputedTerm, EmbeddingTerm, Term
from ngeval.model.autograd import Parameters
from ngeval.model.function import ModelFunction

TRANSFORMERS_CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""A class by its module and name, so that transformers need not be installed."""


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a layer, None if it has to be differentiated as a function."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return None
    kind = type(module)
    if (kind.__module__, kind.__name__) == TRANSFORMERS_CONV1D:
        return LayerRule(
            _linear_applies, for_each(_linear_term), affine=_own_weight, transposed=True
        )
    return RULES.get(kind)


def _affine(
    call: RecordedCall,
    inputs: Callable[[slice], Tensor],
    cotangents: Tensor,
    apply: Callable[[Tensor], Tensor] | None = None,
) -> AffineTerm:
    """The term with whichever of weight and bias is trainable."""
    hooked, module = call.hooked, cast(Any, call.hooked.module)
    weight, bias = hooked.parameters.get("weight"), hooked.parameters.get("bias")
    transposed = hooked.rule is not None and hooked.rule.transposed  # GPT-2's linear layer
    return AffineTerm(weight, bias, module.weight.shape, inputs, cotangents, apply, transposed)


def _own_weight(_: Any) -> list[tuple[str, str]]:
    return [("weight", "bias")]


def _linear_term(_: ModelFunction, call: RecordedCall) -> list[Term]:
    gradient = call.gradients[0]
    count, vectors = gradient.shape[:2]
    chunks = call.input_chunks(0, count)

    def inputs(samples: slice) -> Tensor:
        selected = chunks[samples]
        return selected.reshape(selected.shape[0], -1, 1, selected.shape[-1])

    return [_affine(call, inputs, gradient.reshape(count, vectors, -1, 1, gradient.shape[-1]))]


def _linear_applies(_: nn.Module, layout: CallLayout) -> bool:
    return _samples_precede(layout, features=1)


def _samples_precede(layout: CallLayout, features: int) -> bool:
    """Whether the samples are not in one of the last dimensions, of features."""
    shape = layout.shapes[0]
    parts = (layout.inputs[0], layout.outputs[0])
    return shape is not None and all(p is None or p.dim < len(shape) - features for p in parts)


def _samples_first(_: Any, layout: CallLayout) -> bool:
    parts = (layout.inputs[0], layout.outputs[0])
    return all(part is not None and part.dim == 0 for part in parts)


def _conv_term(_: ModelFunction, call: RecordedCall) -> list[Term]:
    layer: Any = call.hooked.module
    gradient = call.gradients[0]  # (n, q, k, O, *pixels)
    chunks = call.input_chunks(0, gradient.shape[0])

    def positions_first(maps: Tensor, lead: int) -> Tensor:
        """(…, k, O, *pixels) to (…, k·pixels, g, o)."""
        wide = maps.unflatten(lead + 1, (layer.groups, -1)).flatten(lead + 3)
        moved: Tensor = wide.movedim(-1, lead + 1).flatten(lead, lead + 1)
        return moved

    def apply(direction: Tensor) -> Tensor:
        maps = layer._conv_forward(chunks.flatten(0, 1), direction, None)
        return positions_first(maps.unflatten(0, chunks.shape[:2]), 1)

    cotangents = positions_first(gradient, 2)
    return [_affine(call, lambda samples: _patches(layer, chunks[samples]), cotangents, apply)]


def _conv_applies(layer: Any, layout: CallLayout) -> bool:
    shape = layout.shapes[0]
    batched = shape is not None and len(shape) == len(layer.kernel_size) + 2
    return batched and _samples_first(layer, layout)


def _patches(layer: Any, chunks: Tensor) -> Tensor:
    """The input patch of every output pixel: ``(n, k, channels, *pixels)`` to ``(n, t, g, i)``."""
    count, repeats = chunks.shape[:2]
    inputs = chunks.flatten(0, 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    inputs = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    dims = len(layer.kernel_size)
    for d in range(dims):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        inputs = inputs.unfold(2 + d, reach, layer.stride[d])[..., :: layer.dilation[d]]
    # Pixels last: whole rows of the image are copied at once.
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    patches = inputs.permute(order).flatten(2 + dims).flatten(1, 1 + dims)
    patches = patches.unflatten(1, (layer.groups, -1)).unflatten(0, (count, repeats))
    # (n, k, g, i, pixels) to (n, k·pixels, g, i), a view where k = 1
    moved: Tensor = patches.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return moved


def _transposed_conv_terms(_: ModelFunction, call: RecordedCall) -> list[Term]:
    """A transposed convolution: every input pixel is mapped to a patch of the outputs.

    z = Σ_t fold(Wᵀ x_t): the gradient at the patch of pixel t is what a convolution with the same
    geometry would see there.
    """
    layer: Any = call.hooked.module
    gradient = call.gradients[0]  # (n, q, k, O, *pixels)
    count = len(gradient)
    chunks = call.input_chunks(0, count)
    weight, bias = (call.hooked.parameters.get(name) for name in ("weight", "bias"))
    terms: list[Term] = []
    if weight:
        shape = chunks.shape[3:]
        patches = _output_patches(layer, gradient.flatten(0, 2), shape)  # (n·q·k, t, o)
        cotangents = patches.unflatten(0, gradient.shape[:3]).flatten(2, 3).unsqueeze(3)
        flat = chunks.flatten(3).transpose(2, 3).flatten(1, 2).unsqueeze(2)
        terms.append(
            AffineTerm(
                weight,
                None,
                layer.weight.shape,
                lambda samples: flat[samples],
                cotangents,
                transposed=True,
            )
        )
    if bias:
        pixels = gradient.flatten(4).transpose(3, 4).flatten(2, 3).unsqueeze(3)
        nothing = pixels.new_empty(count, pixels.shape[2], 1, 0)
        terms.append(
            AffineTerm(None, bias, layer.weight.shape, lambda samples: nothing[samples], pixels)
        )
    return terms


def _output_patches(layer: Any, maps: Tensor, shape: torch.Size) -> Tensor:
    """The patch of outputs ``(b, O, *pixels)`` that each input pixel reaches: ``(b, t, o)``."""
    dims = len(shape)
    for d in range(dims):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        needed = (shape[d] - 1) * layer.stride[d] + reach
        before = layer.padding[d]
        after = needed - before - maps.shape[2 + d]
        widths = [0, 0] * dims
        widths[2 * (dims - 1 - d)], widths[2 * (dims - 1 - d) + 1] = before, after
        maps = nn.functional.pad(maps, widths)
    for d in range(dims):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        maps = maps.unfold(2 + d, reach, layer.stride[d])[..., :: layer.dilation[d]]
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    patches: Tensor = maps.permute(order).flatten(1, dims).flatten(2)
    return patches


def _transposed_conv_applies(layer: Any, layout: CallLayout) -> bool:
    return layer.groups == 1 and _conv_applies(layer, layout)


def _embedding_term(_: ModelFunction, call: RecordedCall) -> list[Term]:
    table: Any = call.hooked.module
    gradient = call.gradients[0]
    count, vectors = gradient.shape[:2]
    indices = call.input_chunks(0, count).reshape(count, -1)
    if table.padding_idx is not None:
        indices = torch.where(indices == table.padding_idx, -1, indices)
    cotangents = gradient.reshape(count, vectors, -1, gradient.shape[-1])
    weight = call.hooked.parameters["weight"]
    return [EmbeddingTerm(weight, table.weight.shape, indices, cotangents)]


def _embedding_applies(table: nn.Embedding, layout: CallLayout) -> bool:
    return not table.scale_grad_by_freq and _linear_applies(table, layout)


def _normalized(function: ModelFunction, hooked: HookedModule, inputs: Tensor) -> Tensor:
    """x̂, which the norm's weight multiplies."""
    norm: Any = hooked.module
    kind = type(norm)
    if kind is nn.LayerNorm:
        return nn.functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    if kind is nn.RMSNorm:
        return nn.functional.rms_norm(inputs, norm.normalized_shape, eps=norm.eps)
    if kind is nn.GroupNorm:
        return nn.functional.group_norm(inputs, norm.num_groups, eps=norm.eps)
    prefix = f"{hooked.name}." if hooked.name else ""
    mean, variance = (
        function.buffers[function.slots[f"{prefix}{name}"]]
        for name in ("running_mean", "running_var")
    )
    return nn.functional.batch_norm(inputs, mean, variance, eps=norm.eps)


def _norm_term(function: ModelFunction, call: RecordedCall, *, channels_first: bool) -> list[Term]:
    """Σ_t b_t ⊙ x̂_t for the weight, Σ_t b_t for the bias."""
    hooked, gradient = call.hooked, call.gradients[0]
    count, vectors = gradient.shape[:2]
    module: Any = hooked.module
    shape = (module.weight if module.weight is not None else module.bias).shape
    chunks = call.input_chunks(0, count)

    def positions_first(tensor: Tensor, lead: int) -> Tensor:
        if channels_first:
            tensor = tensor.movedim(lead + 1, -1)
        return tensor.reshape(*tensor.shape[:lead], -1, shape.numel())

    def compute(samples: slice, chosen: slice) -> Parameters:
        flat = positions_first(gradient[samples, chosen], 2)
        rows = {}
        if weight := hooked.parameters.get("weight"):
            inputs = chunks[samples]
            normalized = _normalized(function, hooked, inputs.flatten(0, 1)).reshape(inputs.shape)
            products = torch.einsum("nqtd,ntd->nqd", flat, positions_first(normalized, 1))
            rows[weight] = products.unflatten(2, shape)
        if bias := hooked.parameters.get("bias"):
            rows[bias] = flat.sum(2).unflatten(2, shape)
        return rows

    names = dict.fromkeys(hooked.parameters.values(), shape)
    return [ComputedTerm((count, vectors), names, compute)]


def _layer_norm_applies(norm: Any, layout: CallLayout) -> bool:
    return _samples_precede(layout, features=len(norm.normalized_shape))


_CONVOLUTION = LayerRule(_conv_applies, for_each(_conv_term), affine=_own_weight)
_TRANSPOSED = LayerRule(
    _transposed_conv_applies,
    for_each(_transposed_conv_terms),
    affine=lambda _: [("weight", ""), ("", "bias")],
    transposed=True,
)
_LAST_NORM = LayerRule(_layer_norm_applies, for_each(partial(_norm_term, channels_first=False)))
_CHANNEL_NORM = LayerRule(_samples_first, for_each(partial(_norm_term, channels_first=True)))

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule(_linear_applies, for_each(_linear_term), affine=_own_weight),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    **RECURRENT_RULES,
    nn.Embedding: LayerRule(
        _embedding_applies,
        for_each(_embedding_term),
        affine=_own_weight,
        transposed=True,
        lookup=True,
    ),
    nn.LayerNorm: _LAST_NORM,
    nn.RMSNorm: _LAST_NORM,
    nn.GroupNorm: _CHANNEL_NORM,
    nn.BatchNorm1d: _CHANNEL_NORM,
    nn.BatchNorm2d: _CHANNEL_NORM,
    nn.BatchNorm3d: _CHANNEL_NORM,
}
