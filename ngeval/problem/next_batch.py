"""From the problem of one batch to that of the next, at the weights that the model has then.

What was found out about the model (its engine, the plan of what to watch, how it rounds) is a
matter of its wiring and of a single sample's shape, so that it is found once for each such shape.
A model may be wired by what is in the batch, though (samples sorted by length), of which the first
batch need not tell. So the probes are run again on the 2nd, 4th, 8th, … batch of a shape: n batches
have log₂ n of them, whose part in the cost of a step goes to nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ngeval.errors import ModelError
from ngeval.jacobians import OnePass, RowSource, choose_engine, recheck_engine
from ngeval.jacobians.capture import UnsupportedLayerError
from ngeval.model.checks import Inputs, check_finite, check_inputs, named_tensors
from ngeval.model.fsdp import put_apart
from ngeval.model.function import (
    ModelFunction,
    cast_all,
    cast_inputs,
    map_inputs,
    slots_of,
    version_of,
)
from ngeval.problem.probes import (
    adds_up,
    check_gradients_add_up,
    check_outputs,
    check_repeatable,
    check_same_problem,
    run_model,
)

if TYPE_CHECKING:
    from ngeval.problem.problem import Problem


@dataclass
class Chain:
    """What the problems of one model share.

    Attributes:
        engine: as it was asked for.
        probes: whether a newly chosen engine is probed.
        found: the source of rows for each kind of batch, by `batch_key`.
        seen: how many batches of each kind there were.
        latest: the problem that holds a recorded pass; only the last one does.
    """

    engine: str
    probes: bool
    found: dict[tuple[object, ...], RowSource]
    seen: Counter[tuple[object, ...]] = field(default_factory=Counter)
    latest: weakref.ref[Problem] | None = None

    def is_due(self, key: tuple[object, ...]) -> bool:
        """Count a batch; whether the probes are run on it: one on which nothing was found."""
        self.seen[key] += 1
        count = self.seen[key] + 1  # with the batch on which the plan was found
        return self.probes and count & (count - 1) == 0

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
    check_same_problem(function, targets)
    key = batch_key(function)
    found = problem._chain.found.get(key)
    if found is None:
        return _afresh(problem, inputs, targets)
    known = found.function
    function = replace(function, inner_epsilon=known.inner_epsilon, forward_mode=known.forward_mode)
    rows = replace(found, function=function)
    if problem._chain.is_due(key):
        made = _bound(problem, rows, run_model(function), targets)
        if not _passes(made):
            return _afresh(problem, inputs, targets)
    try:
        recorded = OnePass(rows) if OnePass.fits(rows, function.num_samples) else None
    except (UnsupportedLayerError, ModelError):  # this batch takes another way through the model
        return _afresh(problem, inputs, targets)
    raw = run_model(function) if recorded is None else recorded.outputs
    made = _bound(problem, rows, raw, targets)
    made._chain.keep(made, recorded)
    return made


def _bound(problem: Problem, rows: RowSource, raw: Tensor, targets: Tensor) -> Problem:
    """The problem of outputs of the same model, with rows of a plan that was found before."""
    made = problem.__new__(type(problem))
    made._chain, made._attention = problem._chain, problem._attention
    made.likelihood, made.function = problem.likelihood, rows.function
    made._bind(raw, targets)
    made._take(rows)
    made._inherited = True
    return made


def _passes(problem: Problem) -> bool:
    """Whether a plan that was found on another batch is right on this one, too.

    Raises:
        ModelError: two runs of the model differ.
        EngineError: samples see each other.
    """
    raw = run_model(problem.function)
    check_repeatable(problem.function, raw)
    choice = recheck_engine(problem.rows, raw, problem.residual)
    return choice is not None and adds_up(choice, problem.function.unflatten(problem.gradient()))


def plan_anew(problem: Problem) -> bool:
    """Choose the engine on a problem's own batch, where it had that of another one.

    For what only shows when rows are made: a model that is routed by its data may have no such
    tensors as the plan says. Later batches of the kind have the new plan.

    Returns:
        Whether there was anything to choose: False if the plan was found on this very batch.

    Raises:
        ModelError: the weights have changed since the problem was made.
        EngineError: no engine treats the model on this batch.
    """
    problem.function.check_unchanged()
    if not problem._inherited:
        return False
    chain, function = problem._chain, problem.function
    with torch.inference_mode(False):
        raw = run_model(function)
        check_outputs(function, raw)
        memory = problem.rows.memory
        choice = choose_engine(
            function, chain.engine, memory, raw, problem.residual, check=chain.probes
        )
        problem._take(choice.rows)
        if chain.probes:
            check_gradients_add_up(choice, function.unflatten(problem.gradient()))
    chain.found[batch_key(problem.function)] = problem.rows
    return True


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
        group=problem.shards.group,
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
    if function.split:
        put_apart(function.model)
    _check_same_parameters(function)
    named, buffers = function.originals, dict(function.model.named_buffers())
    trainable = {n: p.detach() for n, p in named.items() if p.requires_grad}
    versions = {n: version_of(p) for n, p in named.items()}
    moved = {
        n: p
        for n, p in named.items()
        if versions[n] != function.versions.get(n) and n not in function.split
    }
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


def batch_key(function: ModelFunction) -> tuple[object, ...]:
    """Kind, shapes and dtypes of a single sample, and whether it is alone: what plans are kept by.

    All attributions of rows to samples are right where there is one sample: a plan that was found
    there must not serve more.
    """
    named = ((n, tuple(t.shape[1:]), t.dtype) for n, t in named_tensors(function.inputs))
    alone = function.num_samples == 1
    return (type(function.inputs), alone, *sorted(named, key=itemgetter(0)))
