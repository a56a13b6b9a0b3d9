"""Rows of a module of any kind: the VJP of its own function, one sample at a time by ``vmap``.

Only that module runs again, on its recorded inputs, and only its own parameters are differentiated:
the rest of the model runs once, whatever its parameters are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from ngeval.jacobians.layer_rules import RecordedCall
from ngeval.jacobians.terms import ComputedTerm, Term, leading_shape
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled
from ngeval.model.operations import plain_operations
from ngeval.utils.memory import is_out_of_memory


def module_vjp_term(function: ModelFunction, call: RecordedCall) -> Term:
    """Rows Σ_outputs (∂output/∂θ)ᵀ b of the parameters that the module owns."""
    hooked = call.hooked
    lead = leading_shape(next(iter(call.gradients.values())))
    chunks = [
        call.input_chunks(i, lead[0]) if isinstance(leaf, Tensor) else leaf
        for i, leaf in enumerate(call.leaves)
    ]
    module = _SampleFunction(function, call)

    def compute(samples: slice, vectors: slice) -> Parameters:
        inputs = [chunk[samples] if isinstance(chunk, Tensor) else chunk for chunk in chunks]
        gradients = {i: g[samples, vectors] for i, g in call.gradients.items()}
        if not hooked.vmap_fails:
            try:
                rows = module.batched(inputs, gradients)
                part = leading_shape(next(iter(gradients.values())))
                if all(rows[name].shape == (*part, *shape) for name, shape in shapes.items()):
                    return rows
                # torch's rule for prelu under two vmaps confuses their dimensions.
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                # An operation has no rule for vmap.
            hooked.vmap_fails = True
        return module.looped(inputs, gradients)

    shapes = {name: function.parameters[name].shape for name in hooked.parameters.values()}
    return ComputedTerm(lead, shapes, compute)


class _SampleFunction:
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

    def __call__(self, parameters: Parameters, chunks: list[Any]) -> dict[int, Tensor]:
        args, kwargs = tree_unflatten(chunks, self.call.spec)
        others = {name: tensor.clone() for name, tensor in self.others.items()}
        with plain_operations():
            raw = torch.func.functional_call(
                self.call.hooked.module, {**others, **parameters}, args, kwargs, tie_weights=False
            )
        leaves = tree_leaves(raw)
        return {
            index: leaves[index].reshape(gradient.shape[2:])
            for index, gradient in self.call.gradients.items()
        }

    def _named(self, rows: Parameters) -> Parameters:
        """Rows by canonical name; a weight under two paths of the module has a single row.

        Detached: a module that takes another module as an argument (DoRA) uses the parameters of
        that one, and would record their gradients.
        """
        named: Parameters = {}
        for path, name in self.call.hooked.parameters.items():
            row = rows[path].detach()
            named[name] = named[name] + row if name in named else row
        return named

    def batched(self, inputs: list[Any], gradients: dict[int, Tensor]) -> Parameters:
        """All samples and cotangents at once."""
        batched = [i for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)]

        def rows_of_sample(chunks: list[Tensor], vectors: dict[int, Tensor]) -> Parameters:
            complete = list(inputs)
            for i, chunk in zip(batched, chunks, strict=True):
                complete[i] = chunk
            pull_back = torch.func.vjp(lambda p: self(p, complete), self.parameters)[1]
            rows: Parameters = torch.func.vmap(lambda v: pull_back(v)[0])(vectors)
            return rows

        with autograd_enabled():
            rows = torch.func.vmap(rows_of_sample)([inputs[i] for i in batched], gradients)
        return self._named(rows)

    def looped(self, inputs: list[Any], gradients: dict[int, Tensor]) -> Parameters:
        """One sample, one cotangent at a time by plain autograd."""
        first = next(iter(gradients.values()))
        rows: dict[str, list[Tensor]] = {path: [] for path in self.parameters}
        with autograd_enabled():
            leaves = {path: p.detach().requires_grad_() for path, p in self.parameters.items()}
            for n in range(first.shape[0]):
                chunks = [leaf[n] if isinstance(leaf, Tensor) else leaf for leaf in inputs]
                outputs = self(leaves, chunks)
                for q in range(first.shape[1]):
                    pulled = torch.autograd.grad(
                        [outputs[i] for i in gradients],
                        list(leaves.values()),
                        [gradient[n, q] for gradient in gradients.values()],
                        retain_graph=True,
                        materialize_grads=True,
                    )
                    for path, gradient in zip(leaves, pulled, strict=True):
                        rows[path].append(gradient)
        lead = first.shape[:2]
        return self._named(
            {
                path: torch.stack(parts).reshape(*lead, *self.parameters[path].shape)
                for path, parts in rows.items()
            }
        )
