"""A module of any kind as a unit: the VJP of its own function, one sample at a time by ``vmap``.

Only that module runs again, on the inputs it was given, and only its own parameters are
differentiated: the rest of the model is passed once, whatever the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from ngeval.jacobians.layer_rules import RecordedCall
from ngeval.jacobians.terms import RowsTerm, Term
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled
from ngeval.model.operations import plain_operations
from ngeval.utils.memory import is_out_of_memory


def unit_term(function: ModelFunction, call: RecordedCall) -> Term:
    """Rows Σ_outputs (∂output/∂θ)ᵀ b of the unit's own parameters."""
    owner = call.owner
    first = next(iter(call.gradients.values()))
    count, num_vectors = first.shape[:2]
    chunks = [
        call.input_chunks(i, count) if isinstance(leaf, Tensor) else leaf
        for i, leaf in enumerate(call.leaves)
    ]
    own = _UnitFunction(function, call)

    def compute(samples: slice, vectors: slice) -> Parameters:
        inputs = [chunk[samples] if isinstance(chunk, Tensor) else chunk for chunk in chunks]
        gradients = {i: g[samples, vectors] for i, g in call.gradients.items()}
        if not owner.looped:
            try:
                rows = own.vectorised(inputs, gradients)
                lead = next(iter(gradients.values())).shape[:2]
                if all(rows[name].shape == (*lead, *shape) for name, shape in shapes.items()):
                    return rows
                # torch's rule for prelu under two vmaps mixes their dimensions up.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                # An operation has no rule for vmap.
            owner.looped.append(True)
        return own.looped(inputs, gradients)

    shapes = {name: function.parameters[name].shape for name in owner.parameters.values()}
    return RowsTerm(count, num_vectors, shapes, compute)


class _UnitFunction:
    """One sample's outputs of a module as a function of the parameters that it owns."""

    def __init__(self, function: ModelFunction, call: RecordedCall) -> None:
        self.call = call
        owner = call.owner
        prefix = f"{owner.name}." if owner.name else ""
        tensors = {**function.parameters, **function.frozen, **function.buffers}
        placed = {
            slot.removeprefix(prefix): tensors[name]
            for slot, name in function.slots.items()
            if slot.startswith(prefix) and name in tensors
        }
        self.own = {path: placed.pop(path) for path in owner.parameters}
        self.others = placed

    def __call__(self, own: Parameters, chunks: list[Any]) -> dict[int, Tensor]:
        args, kwargs = tree_unflatten(chunks, self.call.spec)
        buffers = {name: tensor.clone() for name, tensor in self.others.items()}
        with plain_operations():
            raw = torch.func.functional_call(
                self.call.owner.module, {**buffers, **own}, args, kwargs, tie_weights=False
            )
        leaves = tree_leaves(raw)
        return {
            index: leaves[index].reshape(gradient.shape[2:])
            for index, gradient in self.call.gradients.items()
        }

    def _named(self, rows: Parameters) -> Parameters:
        """Rows by canonical name; a weight under two paths of the unit has one row.

        Detached: a module that is given another module as an argument (DoRA) uses that one's own
        parameters, and would record their gradients.
        """
        named: Parameters = {}
        for path, name in self.call.owner.parameters.items():
            row = rows[path].detach()
            named[name] = named[name] + row if name in named else row
        return named

    def vectorised(self, inputs: list[Any], gradients: dict[int, Tensor]) -> Parameters:
        """All samples and cotangents at once."""
        batched = [i for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)]

        def rows_of_one(chunks: list[Tensor], vectors: dict[int, Tensor]) -> Parameters:
            complete = list(inputs)
            for i, chunk in zip(batched, chunks, strict=True):
                complete[i] = chunk
            pull_back = torch.func.vjp(lambda own: self(own, complete), self.own)[1]
            rows: Parameters = torch.func.vmap(lambda v: pull_back(v)[0])(vectors)
            return rows

        with autograd_enabled():
            rows = torch.func.vmap(rows_of_one)([inputs[i] for i in batched], gradients)
        return self._named(rows)

    def looped(self, inputs: list[Any], gradients: dict[int, Tensor]) -> Parameters:
        """One sample, one cotangent at a time by plain autograd."""
        first = next(iter(gradients.values()))
        rows: dict[str, list[Tensor]] = {path: [] for path in self.own}
        with autograd_enabled():
            leaves = {path: p.detach().requires_grad_() for path, p in self.own.items()}
            for n in range(first.shape[0]):
                chunks = [leaf[n] if isinstance(leaf, Tensor) else leaf for leaf in inputs]
                made = self(leaves, chunks)
                for q in range(first.shape[1]):
                    found = torch.autograd.grad(
                        [made[i] for i in gradients],
                        list(leaves.values()),
                        [gradient[n, q] for gradient in gradients.values()],
                        retain_graph=True,
                        materialize_grads=True,
                    )
                    for path, gradient in zip(leaves, found, strict=True):
                        rows[path].append(gradient)
        lead = first.shape[:2]
        return self._named(
            {
                path: torch.stack(parts).reshape(*lead, *self.own[path].shape)
                for path, parts in rows.items()
            }
        )
