"""Whole-model rows J_nᵀv: ``vmap`` over samples, and a loop that works for any model.

Both take a model function, some of its samples and Q cotangents for each, and return for each
parameter the rows of shape ``(samples, Q, *parameter.shape)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor

from ngeval.model.checks import Inputs
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled, map_inputs


def vmap_rows(function: ModelFunction, samples: slice, cotangents: Tensor) -> Parameters:
    """All samples at once: ``vmap`` over samples of a VJP, ``vmap``-ed over its cotangents."""
    batch = map_inputs(function.inputs, lambda t: t[samples])

    def rows_of_one(sample: Inputs, vectors: Tensor) -> Parameters:
        outputs, pull_back, *_ = torch.func.vjp(
            lambda p: function.single(p, sample), function.parameters
        )
        rows: Parameters = torch.func.vmap(lambda v: pull_back(v.to(outputs.dtype))[0])(vectors)
        return rows

    with autograd_enabled():
        result: Parameters = torch.func.vmap(rows_of_one)(batch, cotangents)
    return result


def loop_rows(
    function: ModelFunction,
    samples: slice,
    cotangents: Tensor,
    names: Iterable[str] | None = None,
) -> Parameters:
    """One sample, one cotangent at a time by plain autograd: slow, and works for any model.

    Args:
        function: the model at θ on its batch.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.
        names: the parameters whose rows are wanted; default: all.
    """
    wanted = list(function.parameters) if names is None else list(names)
    leaves = {n: function.parameters[n].detach().requires_grad_() for n in wanted}
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    start = samples.start or 0
    for offset, vectors in enumerate(cotangents):
        one = slice(start + offset, start + offset + 1)
        with autograd_enabled():
            outputs = function(
                {**function.parameters, **leaves},
                map_inputs(function.inputs, itemgetter(one)),
                fused=True,
            )
            for vector in vectors:
                gradients = torch.autograd.grad(
                    outputs,
                    list(leaves.values()),
                    vector.unsqueeze(0).to(outputs.dtype),
                    retain_graph=True,
                    materialize_grads=True,
                )
                for name, gradient in zip(leaves, gradients, strict=True):
                    rows[name].append(gradient.to_dense() if gradient.is_sparse else gradient)
    lead = cotangents.shape[:2]
    return {
        name: _stacked(found).reshape(*lead, *leaves[name].shape) for name, found in rows.items()
    }


def _stacked(rows: list[Tensor]) -> Tensor:
    """Without a copy where there is one row, which may be as large as the model."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
