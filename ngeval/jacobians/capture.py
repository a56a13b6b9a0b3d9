"""One forward pass with hooks, one backward pass for each cotangent: the terms of all rows.

Which module is watched, and how, is the `Plan`'s business. The forward pass runs with every
parameter in place; the backward pass goes to the watched outputs alone, so that no gradient of a
parameter is ever made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ngeval.checks import named_tensors
from ngeval.errors import EngineError
from ngeval.functional import ModelFunction, Parameters, autograd_enabled, map_inputs
from ngeval.jacobians.engines import loop_rows
from ngeval.jacobians.layouts import one_for_each
from ngeval.jacobians.rules import Call, Owner
from ngeval.jacobians.terms import RowsTerm, Term, merged
from ngeval.jacobians.units import unit_term
from ngeval.memory import is_out_of_memory

BATCHED_ENTRIES = 2**22
"""Up to this many entries of gradients, cotangents are pulled back together; passes over larger
ones are faster one by one."""


class UnsupportedLayerError(EngineError):
    """The model was not called as it was when the plan was made."""


@dataclass
class Plan:
    """Which parameter's rows are read off where.

    Attributes:
        owners: the watched modules.
        replicated: parameters that are handed to the model expanded to one copy for each sample
            (their own first dimension is 1).
        looped: parameters whose rows come from a loop over samples of the whole model.
    """

    owners: list[Owner]
    replicated: list[str] = field(default_factory=list)
    looped: list[str] = field(default_factory=list)

    def captured_bytes(self, function: ModelFunction) -> int:
        """Bytes that a capture keeps for one cotangent of one sample: gradients, and whole rows.

        Gradients exist twice for a moment, when a layer's are brought to float64. Only the rows
        of one unit, or of all looped parameters, exist at one time, with their float64 copy.
        """
        size = function.dtype.itemsize
        gradients = sum(call.output_scalars for owner in self.owners for call in owner.calls)
        wholes = [
            sum(function.parameters[name].numel() for name in names)
            for names in (
                self.looped,
                *(owner.parameters.values() for owner in self.owners if owner.rule is None),
            )
        ]
        copies = sum(function.parameters[name].numel() for name in self.replicated)
        return 2 * size * (gradients + copies) + (size + 8) * max(wholes) + 1


def capture(function: ModelFunction, plan: Plan, samples: slice, cotangents: Tensor) -> list[Term]:
    """Run some samples forward once and pull Q cotangents of each back to every watched output.

    Args:
        function: the model at θ on its batch.
        plan: for this model.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.

    Raises:
        UnsupportedLayerError: a module was called another number of times than in the plan.
    """
    batch = map_inputs(function.inputs, itemgetter(samples))
    calls, copies, outputs = forward(function, plan, batch)
    watched = [tensor for call in calls for tensor in call.outputs.values()]
    targets = [*watched, *copies.values()]
    terms: list[Term] = []
    if targets:
        gradients = iter(_pull_back(outputs, targets, cotangents))
        for call in calls:
            for index in call.outputs:
                layout = call.layout.outputs[index]
                if layout is not None:
                    call.gradients[index] = layout.chunks(next(gradients), 1)
            rule = call.owner.rule
            terms.append(rule.term(function, call) if rule else unit_term(function, call))
        for name, gradient in zip(copies, gradients, strict=True):
            terms.append(_copy_term(name, gradient.transpose(0, 1).unsqueeze(2)))
    if plan.looped:
        terms.append(_loop_term(function, plan.looped, samples, cotangents))
    return merged(terms)


def forward(
    function: ModelFunction, plan: Plan, batch: Any
) -> tuple[list[Call], Parameters, Tensor]:
    """The outputs with their graph, the recorded calls, and the copies of replicated parameters."""
    count = next(named_tensors(batch))[1].shape[0]
    with autograd_enabled():
        leaves = {name: p.detach().requires_grad_() for name, p in function.parameters.items()}
        copies = {name: one_for_each(leaves[name], count) for name in plan.replicated}
        with _recorded(plan.owners, count) as calls:
            outputs = function({**leaves, **copies}, batch)
    for owner in plan.owners:
        found = sum(call.owner is owner for call in calls)
        if found != len(owner.calls):
            raise UnsupportedLayerError(f"{owner.name} is called {found} times")
    return calls, copies, outputs


@contextlib.contextmanager
def _recorded(owners: list[Owner], count: int) -> Iterator[list[Call]]:
    """Record the owners' calls while inside; all hooks are gone afterwards."""
    calls: list[Call] = []

    def hook_for(owner: Owner) -> Any:
        layouts = iter(owner.calls)

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            layout = next(layouts, None)
            if layout is None:
                raise UnsupportedLayerError(f"{owner.name} is called more often than before")
            leaves, spec = tree_flatten((args, kwargs))
            made, made_spec = tree_flatten(output)
            if owner.replicate:
                made = [one_for_each(made[0], count)]
            made_by_leaf = {
                i: leaf
                for i, leaf in enumerate(made)
                if isinstance(leaf, Tensor) and leaf.requires_grad and layout.outputs[i] is not None
            }
            detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            calls.append(Call(owner, layout, spec, detached, made_by_leaf))
            if layout.in_place:
                # The model goes on with a copy, and what was recorded stays as it was.
                made = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in made]
            elif not owner.replicate:
                return None
            return tree_unflatten(made, made_spec)

        return hook

    handles = []
    try:
        for owner in owners:
            hook = hook_for(owner)
            handles.append(owner.module.register_forward_hook(hook, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _pull_back(outputs: Tensor, targets: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients of vᵀz at the targets, for each cotangent: shape ``(Q, *target.shape)``."""
    vectors = cotangents.transpose(0, 1).to(outputs.dtype)
    count = len(vectors)
    found: list[Tensor | None] | None = None
    if not outputs.requires_grad:
        found = [None] * len(targets)
    elif count > 1 and count * sum(t.numel() for t in targets) < BATCHED_ENTRIES:
        try:
            options = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
            found = list(torch.autograd.grad(outputs, targets, vectors, **options))
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            # An operation has no rule for vmap.
    if found is None:
        found = _pull_back_singly(outputs, targets, vectors)
    return [
        t.new_zeros(()).expand(count, *t.shape) if g is None else g
        for t, g in zip(targets, found, strict=True)
    ]


def _pull_back_singly(
    outputs: Tensor, targets: list[Tensor], vectors: Tensor
) -> list[Tensor | None]:
    """One backward pass for each cotangent."""
    found: list[Tensor | None] = [None] * len(targets)
    last = len(vectors) - 1
    for q, vector in enumerate(vectors):
        single = torch.autograd.grad(
            outputs, targets, vector, retain_graph=q < last, allow_unused=True
        )
        for i, gradient in enumerate(single):
            if gradient is None:
                continue
            if last == 0:
                found[i] = gradient.unsqueeze(0)
                continue
            kept = found[i]
            if kept is None:
                kept = found[i] = gradient.new_zeros(last + 1, *gradient.shape)
            kept[q] = gradient
    return found


def _copy_term(name: str, rows: Tensor) -> Term:
    """A replicated parameter's rows are the gradients of its copies: ``(n, q, 1, …)``."""
    return RowsTerm(
        rows.shape[0],
        rows.shape[1],
        {name: rows.shape[2:]},
        lambda samples, vectors: {name: rows[samples, vectors]},
    )


def _loop_term(
    function: ModelFunction, names: list[str], samples: slice, cotangents: Tensor
) -> Term:
    start = samples.start or 0

    def compute(chosen: slice, vectors: slice) -> Parameters:
        first, last, _ = chosen.indices(len(cotangents))
        block = slice(start + first, start + last)
        return loop_rows(function, block, cotangents[chosen, vectors], names)

    shapes = {name: function.parameters[name].shape for name in names}
    return RowsTerm(cotangents.shape[0], cotangents.shape[1], shapes, compute)
