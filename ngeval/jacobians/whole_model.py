"""The two whole-model engines: ``vmap`` over samples, and a loop that works for any model.

Both take a model function, some of its samples and Q cotangents for each, and return for each
parameter the rows J_nᵀv of shape ``(samples, Q, *parameter.shape)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ngeval.jacobians.terms import ComputedTerm, leading_shape
from ngeval.model.checks import Inputs
from ngeval.model.function import (
    ModelFunction,
    Parameters,
    autograd_enabled,
    map_inputs,
    pull_back,
)


def vmap_rows(function: ModelFunction, samples: slice, cotangents: Tensor) -> Parameters:
    """All samples at once: ``vmap`` over samples of a VJP, ``vmap``-ed over its cotangents."""
    batch = map_inputs(function.inputs, itemgetter(samples))

    def rows_of_sample(sample: Inputs, vectors: Tensor) -> Parameters:
        outputs, pull_back, *_ = torch.func.vjp(
            lambda p: function.single(p, sample), function.parameters
        )
        rows: Parameters = torch.func.vmap(lambda v: pull_back(v.to(outputs.dtype))[0])(vectors)
        return rows

    with autograd_enabled():
        result: Parameters = torch.func.vmap(rows_of_sample)(batch, cotangents)
    return result


def loop_rows(
    function: ModelFunction,
    samples: slice,
    cotangents: Tensor,
    names: Iterable[str] | None = None,
) -> Parameters:
    """One sample and one cotangent at a time by plain autograd: slow, and works for any model.

    Args:
        function: the model at θ on its batch.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.
        names: parameters to differentiate; default: all.
    """
    names = list(function.parameters if names is None else names)
    leaves = {name: function.parameters[name].detach().requires_grad_() for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    start = samples.start or 0
    for n, vectors in enumerate(cotangents, start):
        with autograd_enabled():
            outputs = function(
                {**function.parameters, **leaves},
                map_inputs(function.inputs, itemgetter(slice(n, n + 1))),
                fused=True,
            )
            for vector in vectors:
                gradients = pull_back(outputs, leaves, vector.unsqueeze(0), retain_graph=True)
                for name, gradient in gradients.items():
                    rows[name].append(gradient)
    lead = cotangents.shape[:2]
    return {
        name: stacked(parts).reshape(*lead, *leaves[name].shape) for name, parts in rows.items()
    }


def whole_model_term(
    compute_rows: Callable[[ModelFunction, slice, Tensor], Parameters],
    function: ModelFunction,
    samples: slice,
    cotangents: Tensor,
    names: Iterable[str] | None = None,
) -> ComputedTerm:
    """The term of rows that `vmap_rows` or `loop_rows` computes when they are used.

    Args:
        compute_rows: the engine.
        function: the model at θ on its batch.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.
        names: the parameters whose rows it gives; default: all.
    """
    start = samples.start or 0

    def compute(chosen: slice, vectors: slice) -> Parameters:
        first, last, _ = chosen.indices(len(cotangents))
        block = slice(start + first, start + last)
        return compute_rows(function, block, cotangents[chosen, vectors])

    names = function.parameters if names is None else names
    shapes = {name: function.parameters[name].shape for name in names}
    return ComputedTerm(leading_shape(cotangents), shapes, compute)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Tensors as one, without a copy of a single row, which may be as large as the model."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(list(rows))
