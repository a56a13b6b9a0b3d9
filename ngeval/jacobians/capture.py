"""The layer engine: one forward pass with hooks, one backward pass for each cotangent.

The `CapturePlan` says which modules are hooked. The forward pass runs with every parameter in place
and records the hooked modules' calls; the backward pass computes the gradients at their outputs
alone, so that no parameter's gradient is ever formed. Inputs and output gradients of a layer are
the factors of its rows, a `Term`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ngeval.errors import EngineError
from ngeval.jacobians.capture_plan import CapturePlan, HookedModule, RecordedCall
from ngeval.jacobians.joined_calls import merged
from ngeval.jacobians.layouts import CallLayout, expand_to_samples
from ngeval.jacobians.terms import StoredTerm, Term
from ngeval.jacobians.vjp_rows import loop_rows, module_vjp_terms, stacked, whole_model_term
from ngeval.model.autograd import Parameters, autograd_enabled, leaves_of
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import named_tensors
from ngeval.model.operations import watched_linear
from ngeval.utils.memory import is_out_of_memory

Use = Callable[..., None]
"""Called as ``use(terms, vectors=slice)``."""

BATCHED_ENTRIES = 2**22
"""Up to this many entries of gradients, cotangents are pulled back together; passes over larger
ones are faster one by one."""


class UnsupportedLayerError(EngineError):
    """The model was called differently from when the plan was made."""


def capture(
    function: ModelFunction, plan: CapturePlan, samples: slice, cotangents: Tensor
) -> list[Term]:
    """Run some samples forward once and pull Q cotangents of each back to every hooked output."""
    fused = not _is_batched(function, plan, cotangents)
    recorded = forward(function, plan, function.on(samples).inputs, fused=fused)
    return recorded.capture(samples, cotangents)


def stream(
    function: ModelFunction, plan: CapturePlan, samples: slice, cotangents: Tensor, use: Use
) -> None:
    """Like `capture`, but a layer's term is used, and freed, when the backward pass reaches it.

    In addition to what any backward pass holds, only one layer's gradient exists at a time.
    Cotangents are pulled back one by one; ``use`` is called with terms and the slice of the
    cotangents that they belong to. All terms of a parameter come in one call for each cotangent.
    """
    batch = function.on(samples).inputs
    recorded = forward(function, plan, batch, fused=True, streamed=plan.streamed())
    last = cotangents.shape[1] - 1
    for q in range(last + 1):
        part = slice(q, q + 1)
        recorded.recorder.use = partial(use, vectors=part)
        recorded.recorder.last = q == last
        use(recorded.capture(samples, cotangents[:, part], retain=q < last), vectors=part)


def _is_batched(function: ModelFunction, plan: CapturePlan, cotangents: Tensor) -> bool:
    """Whether several cotangents of a sample are pulled back together."""
    count, vectors = cotangents.shape[:2]
    return vectors > 1 and count * vectors * plan.gradient_scalars(function) < BATCHED_ENTRIES


@dataclass(frozen=True)
class RecordedPass:
    """A forward pass with its graph, from the parameters ``leaves`` to the outputs.

    Those of the plan's replicated parameters have ``copies`` between, one for each sample.
    """

    function: ModelFunction
    plan: CapturePlan
    recorder: Recorder
    leaves: Parameters
    copies: Parameters
    outputs: Tensor

    def capture(self, samples: slice, cotangents: Tensor, *, retain: bool = False) -> list[Term]:
        """Pull cotangents back to every hooked output: the terms of their rows.

        The graph is kept for another backward pass if ``retain``.
        """
        sources = [] if self.recorder.source is None else [self.recorder.source]
        outputs = [tensor for call in self.recorder.calls for tensor in call.outputs.values()]
        targets = [*sources, *outputs, *self.copies.values()]
        terms: list[Term] = []
        if targets:
            batched = _is_batched(self.function, self.plan, cotangents)
            pulled = _pull_back(self.outputs, targets, cotangents, batched=batched, retain=retain)
            terms = self._terms(pulled[len(sources) :])
        if self.plan.looped:
            rows = partial(loop_rows, names=self.plan.looped)
            looped = whole_model_term(rows, self.function, samples, cotangents, self.plan.looped)
            terms.append(looped)
        return merged(terms)

    def _terms(self, gradients: Sequence[Tensor]) -> list[Term]:
        """The terms of the recorded calls and copies, given the gradients there."""
        remaining = iter(gradients)
        terms: list[Term] = []
        by_module: dict[int, list[RecordedCall]] = {}
        for call in self.recorder.calls:
            if not call.outputs:  # under no_grad: its rows are zero; or it was streamed
                continue
            for index in call.outputs:
                call.add_gradient(index, next(remaining))
            by_module.setdefault(id(call.hooked), []).append(call)
        for calls in by_module.values():
            rule = calls[0].hooked.rule
            terms += (rule.terms if rule else module_vjp_terms)(self.function, calls)
        for name, gradient in zip(self.copies, remaining, strict=True):
            # Those of the copies, whose own first dimension is 1: (n, q, 1, …).
            terms.append(StoredTerm({name: gradient.transpose(0, 1).unsqueeze(2)}))
        return terms


def forward(
    function: ModelFunction,
    plan: CapturePlan,
    batch: Any,
    *,
    fused: bool = False,
    streamed: Collection[str] = (),
) -> RecordedPass:
    """Run the model with hooks and record the calls of the plan's modules.

    Terms of the ``streamed`` modules are used while a backward pass runs; see `Recorder`.

    Raises:
        UnsupportedLayerError: a module was called more or fewer times than in the plan.
    """
    recorder = Recorder(function, next(named_tensors(batch))[1].shape[0], streamed)
    with autograd_enabled():
        leaves = leaves_of(function.parameters)
        copies = {name: expand_to_samples(leaves[name], recorder.count) for name in plan.replicated}
        with contextlib.ExitStack() as hooks:
            linear: dict[int, list[Callable[..., Any]]] = {}
            for hooked in plan.modules:
                hook = partial(recorder.hook, hooked, iter(hooked.calls))
                if hooked.of_function:
                    watching = linear.setdefault(id(leaves[hooked.of_function]), [])
                    watching.append(partial(hook, hooked.module))
                    continue
                hooks.enter_context(hooked.module.register_forward_hook(hook, with_kwargs=True))

            def watch(inputs: Tensor, weight: Tensor, _: Tensor | None, output: Tensor) -> Any:
                for hook in linear.get(id(weight), ()):
                    other = hook((inputs,), {}, output)
                    output = output if other is None else other
                return output

            if linear:
                hooks.enter_context(watched_linear(watch))
            outputs = function({**leaves, **copies}, batch, fused=fused)
    for hooked in plan.modules:
        times = sum(call.hooked is hooked for call in recorder.calls)
        if times != len(hooked.calls):
            raise UnsupportedLayerError(
                f"{hooked.name} is called {times} times, not {len(hooked.calls)} as before"
            )
    return RecordedPass(function, plan, recorder, leaves, copies, outputs)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, _source: Tensor, passed: Callable[..., None]) -> Tensor:
        ctx.passed = passed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.passed(gradient)
        return gradient, gradient.new_zeros(()), None


class Recorder:
    """Records calls of hooked modules, and replaces outputs where a layer's hook has to.

    The outputs of streamed modules pass taps, identities that see the gradients there. Every tap
    has `source` as an input. Its gradient therefore makes autograd pass all of them, without
    forming the gradient of a parameter. Terms are passed to `use`; with `last`, no backward pass
    follows the present one.
    """

    def __init__(self, function: ModelFunction, count: int, streamed: Collection[str]) -> None:
        self.calls: list[RecordedCall] = []
        self.count = count
        self.source: Tensor | None = None
        if streamed:
            self.source = torch.zeros((), device=function.device, requires_grad=True)
        self.use: Callable[[list[Term]], None] = lambda _: None
        self.last = False
        self._function, self._streamed = function, streamed

    def hook(
        self,
        hooked: HookedModule,
        layouts: Iterator[CallLayout],
        _: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Any:
        """A forward hook; returns the output to use in place of the module's, None for the same."""
        layout = next(layouts, None)
        if layout is None:
            raise UnsupportedLayerError(f"{hooked.name} is called more often than before")
        leaves, spec = tree_flatten((args, kwargs))
        original, output_spec = tree_flatten(output)
        outputs = list(original)
        if hooked.replicate:
            outputs = [expand_to_samples(outputs[0], self.count)]
        if len(outputs) > 1:
            # One output may be computed from another: only what leaves the module counts.
            outputs = _map_tensors(outputs, lambda tensor: tensor.view_as(tensor))
        differentiable = {
            index: tensor
            for index, tensor in enumerate(outputs)
            if layout.outputs[index] is not None and getattr(tensor, "requires_grad", False)
        }
        call = RecordedCall(
            hooked, layout, spec, _map_tensors(leaves, Tensor.detach), differentiable
        )
        self.calls.append(call)
        if hooked.name in self._streamed and differentiable:
            self._insert_tap(call, outputs)
        if layout.in_place:
            # The model continues with a copy, so that the recorded tensors are not overwritten.
            outputs = _map_tensors(outputs, Tensor.clone)
        if all(new is old for new, old in zip(outputs, original, strict=True)):
            return None
        return tree_unflatten(outputs, output_spec)

    def _insert_tap(self, call: RecordedCall, outputs: list[Any]) -> None:
        index = next(iter(call.outputs))
        call.outputs.clear()
        outputs[index] = _Tap.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
            outputs[index], self.source, partial(self._passed, call, index)
        )

    def _passed(self, call: RecordedCall, index: int, gradient: Tensor) -> None:
        call.add_gradient(index, gradient.unsqueeze(0))
        if call.hooked.rule is not None:  # as of every streamed module
            self.use(call.hooked.rule.terms(self._function, [call]))
        call.gradients.clear()
        if self.last:
            call.leaves.clear()


def _map_tensors(leaves: list[Any], function: Callable[[Tensor], Tensor]) -> list[Any]:
    return [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _pull_back(
    outputs: Tensor, targets: list[Tensor], cotangents: Tensor, *, batched: bool, retain: bool
) -> list[Tensor]:
    """Gradients of vᵀz at the targets, for each cotangent: shape ``(Q, *target.shape)``.

    By one backward pass for each cotangent, or by ``vmap`` where ``batched``.
    """
    vectors = cotangents.transpose(0, 1).to(outputs.dtype)
    zeros = [t.new_zeros(()).expand(len(vectors), *t.shape) for t in targets]
    if not outputs.requires_grad:
        return zeros
    if batched:
        options = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
        try:
            gradients = torch.autograd.grad(outputs, targets, vectors, **options)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            # An operation has no rule for vmap.
        else:
            return [zero if g is None else g for zero, g in zip(zeros, gradients, strict=True)]
    last = len(vectors) - 1
    by_vector = [
        torch.autograd.grad(
            outputs, targets, v, retain_graph=retain or q < last, materialize_grads=True
        )
        for q, v in enumerate(vectors)
    ]
    return [stacked(parts) for parts in zip(*by_vector, strict=True)]
