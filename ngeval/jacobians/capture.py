"""One forward pass with hooks, one backward pass for each cotangent: the terms of all rows.

Which module is watched, and how, is the `CapturePlan`'s business. The forward pass runs with every
parameter in place; the backward pass goes to the watched outputs alone, so that no gradient of a
parameter is ever made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ngeval.errors import EngineError
from ngeval.jacobians.capture_plan import CapturePlan
from ngeval.jacobians.layer_rules import HookedModule, RecordedCall
from ngeval.jacobians.layouts import one_for_each
from ngeval.jacobians.module_vjp import unit_term
from ngeval.jacobians.terms import RowsTerm, Term, merged
from ngeval.jacobians.whole_model import loop_rows
from ngeval.model.checks import named_tensors
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled, map_inputs
from ngeval.utils.memory import is_out_of_memory

Use = Callable[..., None]
"""Takes ``(terms, vectors=slice)``."""

BATCHED_ENTRIES = 2**22
"""Up to this many entries of gradients, cotangents are pulled back together; passes over larger
ones are faster one by one."""


class UnsupportedLayerError(EngineError):
    """The model was not called as it was when the plan was made."""


def capture(
    function: ModelFunction, plan: CapturePlan, samples: slice, cotangents: Tensor
) -> list[Term]:
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
    count, vectors = cotangents.shape[:2]
    together = vectors > 1 and count * vectors * plan.watched_scalars(function) < BATCHED_ENTRIES
    calls, copies, outputs = forward(function, plan, batch, fused=not together)
    targets = _watched(calls, copies)
    terms: list[Term] = []
    if targets:
        pull_back = _pull_back_together if together else _pull_back_singly
        terms = _terms(function, calls, copies, pull_back(outputs, targets, cotangents))
    if plan.looped:
        terms.append(_loop_term(function, plan.looped, samples, cotangents))
    return merged(terms)


def stream(
    function: ModelFunction, plan: CapturePlan, samples: slice, cotangents: Tensor, use: Use
) -> None:
    """Like `capture`, but a layer's term is used, and let go, when the backward pass comes by.

    Beside what any backward pass holds, only one layer's gradient exists at a time. Cotangents
    are pulled back one by one.

    Args:
        function: the model at θ on its batch.
        plan: for this model.
        samples: which samples of the batch.
        cotangents: v of shape ``(samples, Q, *positions, C)``.
        use: called with terms and the slice of the cotangents that they belong to; all terms of a
            parameter come in one call for each cotangent.
    """
    batch = map_inputs(function.inputs, itemgetter(samples))
    taps = _Taps(function, plan.streamed())
    calls, copies, outputs = forward(function, plan, batch, taps=taps, fused=True)
    kept = [call for call in calls if call.owner.name not in taps.owners]
    del calls
    targets = [taps.source, *_watched(kept, copies)]
    last = cotangents.shape[1] - 1
    for q in range(last + 1):
        part = slice(q, q + 1)
        taps.use, taps.last = partial(use, vectors=part), q == last
        found = _pull_back_singly(outputs, targets, cotangents[:, part], retain=q < last)[1:]
        terms = _terms(function, kept, copies, found)
        if plan.looped:
            terms.append(_loop_term(function, plan.looped, samples, cotangents[:, part]))
        use(merged(terms), vectors=part)


def forward(
    function: ModelFunction,
    plan: CapturePlan,
    batch: Any,
    *,
    taps: _Taps | None = None,
    fused: bool = False,
    leaves: Parameters | None = None,
) -> tuple[list[RecordedCall], Parameters, Tensor]:
    """The outputs with their graph, the recorded calls, and the copies of replicated parameters.

    Args:
        function: the model at θ.
        plan: for this model.
        batch: inputs.
        taps: put after the outputs of the owners that they name.
        fused: allow fused attention.
        leaves: the parameters that the graph starts from, where they are wanted afterwards.
    """
    count = next(named_tensors(batch))[1].shape[0]
    with autograd_enabled():
        if leaves is None:
            leaves = {name: p.detach().requires_grad_() for name, p in function.parameters.items()}
        copies = {name: one_for_each(leaves[name], count) for name in plan.replicated}
        with _recorded(plan.owners, count, taps) as calls:
            outputs = function({**leaves, **copies}, batch, fused=fused)
    for owner in plan.owners:
        found = sum(call.owner is owner for call in calls)
        if found != len(owner.calls):
            raise UnsupportedLayerError(f"{owner.name} is called {found} times")
    return calls, copies, outputs


class _Taps:
    """Identities after the streamed owners' outputs, which show the gradients that pass.

    A gradient at `source`, which every tap names as an input, makes autograd pass by all of them,
    and makes no gradient of a parameter.
    """

    def __init__(self, function: ModelFunction, owners: set[str]) -> None:
        self.function = function
        self.owners = owners
        self.source = torch.zeros((), device=function.device, requires_grad=True)
        self.use: Callable[[list[Term]], None] = lambda _: None
        self.last = False

    def tap(self, call: RecordedCall, made: list[Any]) -> None:
        """Put a tap after the output of a recorded call."""
        index = next(iter(call.outputs))
        call.outputs.clear()
        made[index] = _Tap.apply(  # type: ignore[no-untyped-call]
            made[index], self.source, partial(self._passed, call, index)
        )

    def _passed(self, call: RecordedCall, index: int, gradient: Tensor) -> None:
        layout, rule = call.layout.outputs[index], call.owner.rule
        if layout is None or rule is None:
            return
        call.gradients[index] = layout.chunks(gradient.unsqueeze(0), 1)
        self.use([rule.term(self.function, call)])
        call.gradients.clear()
        if self.last:
            call.leaves.clear()


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, _source: Tensor, passed: Callable[..., None]) -> Tensor:
        ctx.passed = passed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.passed(gradient)
        return gradient, gradient.new_zeros(()), None


def _watched(calls: list[RecordedCall], copies: Parameters) -> list[Tensor]:
    """Where gradients are wanted, in the order in which `_terms` takes them."""
    return [*(tensor for call in calls for tensor in call.outputs.values()), *copies.values()]


def _terms(
    function: ModelFunction, calls: list[RecordedCall], copies: Parameters, found: list[Tensor]
) -> list[Term]:
    """The terms of recorded calls and copies, given the gradients there."""
    gradients = iter(found)
    terms: list[Term] = []
    for call in calls:
        if not call.outputs:  # under no_grad: its rows are zero
            continue
        for index in call.outputs:
            layout = call.layout.outputs[index]
            if layout is not None:
                call.gradients[index] = layout.chunks(next(gradients), 1)
        rule = call.owner.rule
        terms.append(rule.term(function, call) if rule else unit_term(function, call))
    for name, gradient in zip(copies, gradients, strict=True):
        terms.append(_copy_term(name, gradient.transpose(0, 1).unsqueeze(2)))
    return terms


@contextlib.contextmanager
def _recorded(
    owners: list[HookedModule], count: int, taps: _Taps | None
) -> Iterator[list[RecordedCall]]:
    """Record the owners' calls while inside; all hooks are gone afterwards."""
    calls: list[RecordedCall] = []

    def hook_for(owner: HookedModule) -> Any:
        layouts = iter(owner.calls)

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            layout = next(layouts, None)
            if layout is None:
                raise UnsupportedLayerError(f"{owner.name} is called more often than before")
            leaves, spec = tree_flatten((args, kwargs))
            made, made_spec = tree_flatten(output)
            if owner.replicate:
                made = [one_for_each(made[0], count)]
            # An output may be made from another one inside: only what leaves counts.
            apart = owner.rule is None and len(made) > 1
            if apart:
                made = [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in made]
            made_by_leaf = {
                i: leaf
                for i, leaf in enumerate(made)
                if isinstance(leaf, Tensor) and leaf.requires_grad and layout.outputs[i] is not None
            }
            detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = RecordedCall(owner, layout, spec, detached, made_by_leaf)
            calls.append(call)
            tapped = taps is not None and owner.name in taps.owners and bool(made_by_leaf)
            if taps is not None and tapped:
                taps.tap(call, made)
            if layout.in_place:
                # The model goes on with a copy, and what was recorded stays as it was.
                made = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in made]
            elif not (owner.replicate or tapped or apart):
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


def _pull_back_together(outputs: Tensor, targets: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients of vᵀz at the targets, for each cotangent: shape ``(Q, *target.shape)``."""
    if outputs.requires_grad:
        vectors = cotangents.transpose(0, 1).to(outputs.dtype)
        try:
            options = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
            found = torch.autograd.grad(outputs, targets, vectors, **options)
            return _with_zeros(found, targets, cotangents.shape[1])
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            # An operation has no rule for vmap.
    return _pull_back_singly(outputs, targets, cotangents)


def _with_zeros(found: Sequence[Tensor | None], targets: list[Tensor], count: int) -> list[Tensor]:
    return [
        t.new_zeros(()).expand(count, *t.shape) if g is None else g
        for t, g in zip(targets, found, strict=True)
    ]


def _pull_back_singly(
    outputs: Tensor, targets: list[Tensor], cotangents: Tensor, *, retain: bool = False
) -> list[Tensor]:
    """One backward pass for each cotangent."""
    vectors = cotangents.transpose(0, 1).to(outputs.dtype)
    found: list[Tensor | None] = [None] * len(targets)
    last = len(vectors) - 1
    if not outputs.requires_grad:
        return _with_zeros(found, targets, last + 1)
    for q, vector in enumerate(vectors):
        single = torch.autograd.grad(
            outputs, targets, vector, retain_graph=retain or q < last, allow_unused=True
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
    return _with_zeros(found, targets, last + 1)


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
