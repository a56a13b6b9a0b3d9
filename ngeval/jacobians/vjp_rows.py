"""Rows by VJPs of a function: the whole model, or a module that no layer rule applies to.

Both run under ``vmap`` over samples, which some models' code does not allow, or in a loop over
samples by plain autograd. Of a module, its own function runs again, on its recorded inputs, and
only its own parameters are differentiated: the rest of the model runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from ngeval.jacobians.capture_plan import RecordedCall
from ngeval.jacobians.terms import ComputedTerm, Term, leading_shape
from ngeval.model.autograd import Parameters, autograd_enabled, leaves_of, pull_back
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import named_tensors, with_tensors
from ngeval.model.operations import called
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


def module_vjp_terms(function: ModelFunction, calls: list[RecordedCall]) -> list[Term]:
    """Rows Σ_calls Σ_outputs (∂output/∂θ)ᵀ b of the parameters that a module owns.

    Calls whose arguments differ in nothing but their numbers run together.
    """
    groups: list[list[RecordedCall]] = []
    for call in calls:
        alike = next((group for group in groups if _are_alike(group[0], call)), None)
        if alike is None:
            groups.append([call])
        else:
            alike.append(call)
    return [_module_vjp_term(function, group) for group in groups]


def _are_alike(first: RecordedCall, other: RecordedCall) -> bool:
    if first.spec != other.spec or first.gradients.keys() != other.gradients.keys():
        return False
    pairs = [*zip(first.leaves, other.leaves, strict=True)]
    pairs += [(first.gradients[i], other.gradients[i]) for i in first.gradients]
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    others = [(a, b) for a, b in pairs if not (isinstance(a, Tensor) and isinstance(b, Tensor))]
    plain = str | int | float | bool | None
    return (
        first.layout.inputs == other.layout.inputs
        and all(a.shape == b.shape and a.dtype == b.dtype for a, b in tensors)
        and all(a is b or (isinstance(a, plain) and a == b) for a, b in others)
    )


def _module_vjp_term(function: ModelFunction, calls: list[RecordedCall]) -> Term:
    hooked = calls[0].hooked
    lead = leading_shape(next(iter(calls[0].gradients.values())))
    chunks = [  # (n, calls, *chunk)
        torch.stack([call.input_chunks(i, lead[0]) for call in calls], 1)
        if isinstance(leaf, Tensor)
        else leaf
        for i, leaf in enumerate(calls[0].leaves)
    ]
    cotangents = [torch.stack([call.gradients[i] for call in calls], 2) for i in calls[0].gradients]
    module = _ModuleFunction(function, calls)
    shapes = {name: function.parameters[name].shape for name in hooked.parameters.values()}

    def vmapped(inputs: list[Any], gradients: list[Tensor]) -> Parameters | None:
        for together in (True, False):
            if together and (len(calls) == 1 or hooked.vmap_over_calls_fails):
                continue
            outputs = module.of_calls_together if together else module.of_calls
            try:
                rows = module.named(_vmapped(outputs, module.parameters, inputs, gradients))
                part = leading_shape(gradients[0])
                if all(rows[name].shape == (*part, *shape) for name, shape in shapes.items()):
                    return rows
                # torch's rule for prelu under two vmaps confuses their dimensions.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                # An operation has no rule for vmap.
            hooked.vmap_over_calls_fails = True
        hooked.vmap_fails = True
        return None

    def compute(samples: slice, vectors: slice) -> Parameters:
        inputs = [chunk[samples] if isinstance(chunk, Tensor) else chunk for chunk in chunks]
        gradients = [cotangent[samples, vectors] for cotangent in cotangents]
        rows = None if hooked.vmap_fails else vmapped(inputs, gradients)
        if rows is not None:
            return rows

        def outputs_of_sample(leaves: Parameters, n: int) -> list[Tensor]:
            return module.of_calls(leaves, [x[n] if isinstance(x, Tensor) else x for x in inputs])

        return module.named(_looped(outputs_of_sample, module.parameters, gradients))

    return ComputedTerm(lead, shapes, compute)


class _ModuleFunction:
    """One sample's outputs of a module as a function of the parameters that it owns."""

    def __init__(self, function: ModelFunction, calls: list[RecordedCall]) -> None:
        self.call, self.count = calls[0], len(calls)
        by_path = function.tensors_of(self.call.hooked.name)
        self.parameters = {path: by_path.pop(path) for path in self.call.hooked.parameters}
        self.others = by_path

    def of_calls(self, parameters: Parameters, chunks: list[Any]) -> list[Tensor]:
        """The outputs of several calls, from leaves with the calls first, one after the other."""
        by_call = [
            self(parameters, [chunk[t] if isinstance(chunk, Tensor) else chunk for chunk in chunks])
            for t in range(self.count)
        ]
        return [torch.stack(outputs) for outputs in zip(*by_call, strict=True)]

    def of_calls_together(self, parameters: Parameters, chunks: list[Any]) -> list[Tensor]:
        """The same, all calls at once."""
        dims = [0 if isinstance(chunk, Tensor) else None for chunk in chunks]
        outputs: list[Tensor] = torch.func.vmap(partial(self, parameters), in_dims=(dims,))(chunks)
        return outputs

    def __call__(self, parameters: Parameters, chunks: list[Any]) -> list[Tensor]:
        args, kwargs = tree_unflatten(chunks, self.call.spec)
        others = {name: tensor.clone() for name, tensor in self.others.items()}
        raw = called(self.call.hooked.module, {**others, **parameters}, args, kwargs)
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
