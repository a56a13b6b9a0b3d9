"""Passes through a model, counted while work is done: for planning, not for results.

A pass is one of the whole batch: half of its samples put through make half a pass, and k tangents
or cotangents that go together under ``vmap`` make k passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ngeval.model.checks import named_tensors
from ngeval.model.function import ModelFunction


@dataclass(frozen=True)
class Passes:
    """How often a batch goes through a model.

    Attributes:
        forward: runs of the model that are not part of a tangent pass.
        backward: cotangents that are pulled back through it.
        tangent: directions that are pushed through it (JVPs), each with the run it goes along.
    """

    forward: float = 0.0
    backward: float = 0.0
    tangent: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.tangent

    def plus(self, other: Passes, times: float = 1.0) -> Passes:
        """The sum with another count, taken so many times."""
        return Passes(
            self.forward + times * other.forward,
            self.backward + times * other.backward,
            self.tangent + times * other.tangent,
        )


class PassCounter:
    """What has passed so far, in samples; see `count_passes`."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.samples = Passes()
        self.runs = 0
        self.latest = 0.0
        self.copies = [1]  # of what goes through now, for every ``vmap`` that is entered
        self.tangents = 0  # how many JVPs are entered
        self.pullbacks = 0  # how many calls of ``torch.func.vjp`` are entered

    def per_batch(self, num_samples: int) -> Passes:
        """Passes over a batch of so many samples."""
        return Passes().plus(self.samples, 1 / num_samples)

    def ran(self, samples: int, outputs: Tensor) -> None:
        """Count a run, and every backward pass that will come by its outputs."""
        self.runs += 1
        self.latest = samples * self.copies[-1]
        if self.tangents:
            self.samples = self.samples.plus(Passes(tangent=self.latest))
            return
        self.samples = self.samples.plus(Passes(forward=self.latest))
        # Outputs of `torch.func.vjp` take no hook: its pullback is counted instead.
        if outputs.requires_grad and not self.pullbacks:
            outputs.register_hook(lambda _: self.pulled(samples))

    def pulled(self, samples: float) -> None:
        """Count a backward pass."""
        self.samples = self.samples.plus(Passes(backward=samples * self.copies[-1]))


@contextlib.contextmanager
def count_passes() -> Iterator[PassCounter]:
    """Count the passes of every `ModelFunction` of this process while inside.

    The class and the functions of torch that it is differentiated by are wrapped for that time;
    results are the same.
    """
    counter = PassCounter()
    with (
        _wrapped(ModelFunction, "__call__", lambda inner: _counting_run(inner, counter)),
        _wrapped(ModelFunction, "jvp", lambda inner: _as_tangent(inner, counter)),
        _wrapped(torch.func, "jvp", lambda inner: _as_tangent(inner, counter)),
        _wrapped(torch.func, "vjp", lambda inner: _counting_pullback(inner, counter)),
        _wrapped(torch.func, "vmap", lambda inner: _with_copies(inner, counter)),
        _wrapped(torch.autograd, "grad", lambda inner: _with_batched_grads(inner, counter)),
    ):
        yield counter


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """With an attribute replaced by what is made of it, which is put back at the end."""
    inner = owner.__dict__[name]
    setattr(owner, name, wrap(inner))
    try:
        yield
    finally:
        setattr(owner, name, inner)


def _counting_run(inner: Any, counter: PassCounter) -> Any:
    def run(function: ModelFunction, parameters: Any, inputs: Any = None, **options: Any) -> Tensor:
        outputs: Tensor = inner(function, parameters, inputs, **options)
        batch = function.inputs if inputs is None else inputs
        counter.ran(next(named_tensors(batch))[1].shape[0], outputs)
        return outputs

    return run


def _as_tangent(inner: Any, counter: PassCounter) -> Any:
    def push(*args: Any, **options: Any) -> Any:
        counter.tangents += 1
        try:
            return inner(*args, **options)
        finally:
            counter.tangents -= 1

    return push


def _counting_pullback(inner: Any, counter: PassCounter) -> Any:
    def vjp(*args: Any, **options: Any) -> Any:
        before = counter.runs
        counter.pullbacks += 1
        try:
            outputs, pull_back, *rest = inner(*args, **options)
        finally:
            counter.pullbacks -= 1
        if counter.runs == before:  # of a module alone
            return (outputs, pull_back, *rest)
        samples = counter.latest / counter.copies[-1]

        def counted(*cotangents: Any, **more: Any) -> Any:
            counter.pulled(samples)
            return pull_back(*cotangents, **more)

        return (outputs, counted, *rest)

    return vjp


def _with_copies(inner: Any, counter: PassCounter) -> Any:
    def vmap(function: Any, *dims: Any, **options: Any) -> Any:
        batched = inner(function, *dims, **options)

        def over_all(*args: Any, **more: Any) -> Any:
            sizes = [leaf.shape[0] for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            with _copies(counter, sizes[0]):
                return batched(*args, **more)

        return over_all

    return vmap


def _with_batched_grads(inner: Any, counter: PassCounter) -> Any:
    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **more: Any) -> Any:
        count = 1
        if more.get("is_grads_batched"):
            first = grad_outputs if isinstance(grad_outputs, Tensor) else grad_outputs[0]
            count = first.shape[0]
        with _copies(counter, count):
            return inner(outputs, inputs, grad_outputs, *args, **more)

    return grad


@contextlib.contextmanager
def _copies(counter: PassCounter, count: int) -> Iterator[None]:
    counter.copies.append(counter.copies[-1] * count)
    try:
        yield
    finally:
        counter.copies.pop()
