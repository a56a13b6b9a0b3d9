"""From the problem of one batch to that of the next, at the weights that the model has then.

What was found out about the model (its engine, the plan of what to watch, how it rounds) is a
matter of its wiring and of a single sample's shape, so that it is found once for each such shape.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ngeval.checks import Inputs, check_finite, check_inputs, named_tensors
from ngeval.errors import ModelError
from ngeval.functional import (
    ModelFunction,
    cast_all,
    cast_inputs,
    map_inputs,
    slots_of,
    version_of,
)
from ngeval.jacobians import OnePass, RowSource
from ngeval.jacobians.capture import UnsupportedLayerError
from ngeval.probes import run_model

if TYPE_CHECKING:
    from ngeval.problem import Problem


@dataclass
class Chain:
    """What the problems of one model share.

    Attributes:
        engine: as it was asked for.
        probes: whether a newly chosen engine is probed.
        found: the source of rows for each kind of sample, by `sample_key`.
        latest: the problem that holds a recorded pass; only the last one does.
    """

    engine: str
    probes: bool
    found: dict[tuple[object, ...], RowSource]
    latest: weakref.ref[Problem] | None = None

    def keep(self, problem: Problem, recorded: OnePass | None) -> None:
        """Leave a recorded pass with its problem; that of the problem before is let go."""
        former = self.latest() if self.latest is not None else None
        if former is not None:
            former._pass = None
        problem._pass = recorded
        self.latest = None if recorded is None else weakref.ref(problem)


def following(problem: Problem, inputs: Inputs, targets: Tensor) -> Problem:
    """See `ngeval.problem.Problem.with_batch`."""
    function = at_present(problem.function, inputs)
    found = problem._chain.found.get(sample_key(function))
    if found is None:
        return _afresh(problem, inputs, targets)
    known = found.function
    function = replace(function, inner_epsilon=known.inner_epsilon, forward_mode=known.forward_mode)
    rows = replace(found, function=function)
    try:
        recorded = OnePass(rows) if OnePass.fits(rows, function.num_samples) else None
    except UnsupportedLayerError:  # this batch takes another way through the model
        return _afresh(problem, inputs, targets)
    raw = run_model(function) if recorded is None else recorded.outputs
    made = problem.__new__(type(problem))
    made._chain, made._attention = problem._chain, problem._attention
    made.likelihood, made.function = problem.likelihood, function
    made._bind(raw, targets)
    made._take(rows)
    made._chain.keep(made, recorded)
    return made


def _afresh(problem: Problem, inputs: Inputs, targets: Tensor) -> Problem:
    """With the engine chosen anew, which is kept for later batches of such samples."""
    made = type(problem)(
        problem.function.model,
        inputs,
        targets,
        problem.likelihood,
        output=problem.function.output,
        dtype=problem.function.cast,
        engine=problem._chain.engine,
        memory=problem.rows.memory,
        probes=problem._chain.probes,
    )
    problem._chain.found.update(made._chain.found)
    made._chain = problem._chain
    return made


def at_present(function: ModelFunction, inputs: Inputs) -> ModelFunction:
    """The same function on another batch, at the weights that the model has now.

    What was found out about the model (slots, roundings, modes of differentiation) is kept.

    Args:
        function: at earlier weights, on another batch.
        inputs: of the same kind as those before; their shapes may differ.

    Raises:
        ModelError: a parameter or buffer is not the tensor that it was, or its requires_grad
            was changed, or it holds NaN.
        InputError: as `of`.
    """
    check_inputs(inputs)
    _check_same_parameters(function)
    named, buffers = function.originals, dict(function.model.named_buffers())
    trainable = {n: p.detach() for n, p in named.items() if p.requires_grad}
    versions = {n: version_of(p) for n, p in named.items()}
    moved = {n: p for n, p in named.items() if versions[n] != function.versions.get(n)}
    check_finite("parameter", {**moved, **trainable})
    check_finite("buffer", buffers)
    moved_function = replace(
        function,
        inputs=cast_inputs(map_inputs(inputs, torch.clone), function.cast),
        parameters=cast_all(trainable, function.cast),
        buffers=cast_all({n: b.detach().clone() for n, b in buffers.items()}, function.cast),
        versions=versions,
        notes=set(function.notes),
    )
    if function.cast is None or not moved.keys() & function.frozen.keys():
        return moved_function
    frozen = {n: p.detach() for n, p in named.items() if not p.requires_grad}
    return replace(moved_function, frozen=cast_all(frozen, function.cast))


def _check_same_parameters(function: ModelFunction) -> None:
    """The parameters are the same tensors in the same places, and the same ones train."""
    now = dict(function.model.named_parameters())
    if (
        now.keys() == function.originals.keys()
        and all(now[n] is p for n, p in function.originals.items())
        and all(p.requires_grad == (n in function.parameters) for n, p in now.items())
        and slots_of(function.model) == function.slots
    ):
        return
    other = [n for n, p in function.originals.items() if now.get(n) is not p] + [
        n for n in now if n not in function.originals
    ]
    switched = [n for n, p in now.items() if p.requires_grad != (n in function.parameters)]
    what = "is not the tensor that it was" if other else "has another requires_grad than before"
    names = other or switched
    which = f"parameter {names[0]!r} {what}" if names else "its parameters are tied otherwise"
    raise ModelError(
        f"the model has changed since the first Problem was made: {which}; make a new Problem"
    )


def sample_key(function: ModelFunction) -> tuple[object, ...]:
    """Kind, shapes and dtypes of a single sample: what a plan for the model was made on."""
    named = ((n, tuple(t.shape[1:]), t.dtype) for n, t in named_tensors(function.inputs))
    return (type(function.inputs), *sorted(named, key=itemgetter(0)))
