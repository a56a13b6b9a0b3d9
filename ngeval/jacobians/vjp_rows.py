"""Rows by VJPs of a function: the whole model, or a module that no layer rule applies to.

Both run under ``vmap`` over samples, which some models' code does not allow, or in a loop over
samples by plain autograd. Of a module, its own function runs again, on its recorded inputs, and
only its own parameters are differentiated: the rest of the model runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from ngeval.jacobians.layer_rules import RecordedCall
from ngeval.jacobians.terms import ComputedTerm, Term, leading_shape
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled, leaves_of, pull_back
from ngeval.model.inputs import named_tensors, with_tensors
from ngeval.model.operations import plain_operations
from ngeval.utils.memory import is_out_of_memory


def vmap_rows(function: ModelFunction, samples: slice, cotangents: Tensor) -> Parameters:
    """The rows of the model by parameter, for all samples and cotangents at once."""
    batch = function.on(samples).inputs

    def outputs_of_sample(parameters: Parameters, sample: list[Tensor]) -> Tensor:
        outputs = function(parameters, with_tensors(batch, (t.unsqueeze(0) for t in sample)))
        return outputs.squeeze(0).to(cotangents.dtype)

    tensors = [tensor for _, tensor in named_tensors(batch)]
    return _vmapped(outputs_of_sample, function.parameters, tensors, cotangents)


def loop_rows(
    function: ModelFunction, samples: slice, cotangents: Tensor, names: Iterable[str] | None = None
) -> Parameters:
    """Like `vmap_rows`, one sample and one cotangent at a time: slow, and works for any model."""
    start = samples.start or 0

    def outputs_of_sample(leaves: Parameters, n: int) -> list[Tensor]:
        batch = function.on(slice(start + n, start + n + 1)).inputs
        return [function({**function.parameters, **leaves}, batch, fused=True)]

    names = function.parameters if names is None else names
    parameters = {name: function.parameters[name] for name in names}
    return _looped(outputs_of_sample, parameters, [cotangents.unsqueeze(2)])


def whole_model_term(
    compute_rows: Callable[[ModelFunction, slice, Tensor], Parameters],
    function: ModelFunction,
    samples: slice,
    cotangents: Tensor,
    names: Iterable[str] | None = None,
) -> ComputedTerm:
    """The term of rows that `vmap_rows` or `loop_rows` computes when they are used."""
    start = samples.start or 0

    def compute(chosen: slice, vectors: slice) -> Parameters:
        first, last, _ = chosen.indices(len(cotangents))
        block = slice(start + first, start + last)
        return compute_rows(function, block, cotangents[chosen, vectors])

    names = function.parameters if names is None else names
    shapes = {name: function.parameters[name].shape for name in names}
    return ComputedTerm(leading_shape(cotangents), shapes, compute)


def module_vjp_term(function: ModelFunction, call: RecordedCall) -> Term:
    """Rows Σ_outputs (∂output/∂θ)ᵀ b of the parameters that a module owns."""
    hooked = call.hooked
    lead = leading_shape(next(iter(call.gradients.values())))
    chunks = [
        call.input_chunks(i, lead[0]) if isinstance(leaf, Tensor) else leaf
        for i, leaf in enumerate(call.leaves)
    ]
    module = _ModuleFunction(function, call)

    def compute(samples: slice, vectors: slice) -> Parameters:
        inputs = [chunk[samples] if isinstance(chunk, Tensor) else chunk for chunk in chunks]
        gradients = [gradient[samples, vectors] for gradient in call.gradients.values()]
        if not hooked.vmap_fails:
            try:
                rows = module.named(_vmapped(module, module.parameters, inputs, gradients))
                part = leading_shape(gradients[0])
                if all(rows[name].shape == (*part, *shape) for name, shape in shapes.items()):
                    return rows
                # torch's rule for prelu under two vmaps confuses their dimensions.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                # An operation has no rule for vmap.
            hooked.vmap_fails = True

        def outputs_of_sample(leaves: Parameters, n: int) -> list[Tensor]:
            return module(leaves, [x[n] if isinstance(x, Tensor) else x for x in inputs])

        return module.named(_looped(outputs_of_sample, module.parameters, gradients))

    shapes = {name: function.parameters[name].shape for name in hooked.parameters.values()}
    return ComputedTerm(lead, shapes, compute)


class _ModuleFunction:
    """One sample's outputs of a module as a function of the parameters that it owns."""

    def __init__(self, function: ModelFunction, call: RecordedCall) -> None:
        self.call = call
        name = call.hooked.name
        prefix = f"{name}." if name else ""
        tensors = {**function.parameters, **function.frozen, **function.buffers}
        by_path = {
            slot.removeprefix(prefix): tensors[canonical]
            for slot, canonical in function.slots.items()
            if slot.startswith(prefix) and canonical in tensors
        }
        self.parameters = {path: by_path.pop(path) for path in call.hooked.parameters}
        self.others = by_path

    def __call__(self, parameters: Parameters, chunks: list[Any]) -> list[Tensor]:
        args, kwargs = tree_unflatten(chunks, self.call.spec)
        others = {name: tensor.clone() for name, tensor in self.others.items()}
        with plain_operations():
            raw = torch.func.functional_call(
                self.call.hooked.module, {**others, **parameters}, args, kwargs, tie_weights=False
            )
        leaves = tree_leaves(raw)
        return [
            leaves[index].reshape(gradient.shape[2:])
            for index, gradient in self.call.gradients.items()
        ]

    def named(self, rows: Parameters) -> Parameters:
        """Rows by canonical name; a weight under two paths of the module has a single row.

        Detached: a module that takes another module as an argument (DoRA) uses the parameters of
        that one, and would record their gradients.
        """
        named: Parameters = {}
        for path, name in self.call.hooked.parameters.items():
            row = rows[path].detach()
            named[name] = named[name] + row if name in named else row
        return named


def _vmapped(
    function: Callable[[Parameters, Any], Any], parameters: Parameters, inputs: Any, cotangents: Any
) -> Parameters:
    """Rows of ``function(parameters, sample)``; leaves of the inputs that are no tensors are kept.

    Inputs have the samples first, cotangents the samples and their vectors.
    """

    def rows_of_sample(sample: Any, vectors: Any) -> Parameters:
        pulled = torch.func.vjp(lambda p: function(p, sample), parameters)[1]
        rows: Parameters = torch.func.vmap(lambda v: pulled(v)[0])(vectors)
        return rows

    dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, inputs)
    with autograd_enabled():
        result: Parameters = torch.func.vmap(rows_of_sample, in_dims=(dims, 0))(inputs, cotangents)
    return result


def _looped(
    function: Callable[[Parameters, int], list[Tensor]],
    parameters: Parameters,
    cotangents: list[Tensor],
) -> Parameters:
    """Rows of ``function(parameters, n)``, by one backward pass for each of them."""
    leaves = leaves_of(parameters)
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    count, num_vectors = leading_shape(cotangents[0])
    for n in range(count):
        with autograd_enabled():
            outputs = function(leaves, n)
            for q in range(num_vectors):
                vectors = [cotangent[n, q] for cotangent in cotangents]
                gradients = pull_back(outputs, leaves, vectors, retain_graph=True)
                for name, gradient in gradients.items():
                    rows[name].append(gradient)
    return {
        name: stacked(parts).reshape(count, num_vectors, *parameters[name].shape)
        for name, parts in rows.items()
    }


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Tensors as one, without a copy of a single row, which may be as large as the model."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(list(rows))
