"""From the problem of one batch to that of the next, at the weights that the model has then.

What was learned about the model (its engine, the plan of what to watch, how it rounds) depends on
its wiring and on a single sample's shape, so it is learned once for each such shape. The wiring
may depend on the values in the batch, though (samples sorted by length), which the first batch
need not show. So the probes are run again on the 2nd, 4th, 8th, … batch of a shape: n batches
have log₂ n of them, and their share of the cost of a step vanishes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace

from torch import Tensor

from ngeval.errors import ModelError
from ngeval.jacobians import OnePass, RowSource, choose_engine, recheck_engine
from ngeval.jacobians.capture import UnsupportedLayerError
from ngeval.model.function import ModelFunction
from ngeval.model.renewed import batch_key
from ngeval.problem.linearized import Linearized
from ngeval.problem.mistakes import unused_note
from ngeval.problem.probes import (
    check_gradients_add_up,
    check_repeatable,
    missed_gradients,
    run_model,
)

BatchKey = tuple[object, ...]


@dataclass
class Chain:
    """What the problems of one model share.

    Attributes:
        engine: the engine's name, or ``"auto"``.
        probes: whether a newly chosen engine is probed.
        sources: the source of rows for each kind of batch, by `batch_key`.
        seen: how many batches of each kind there were after the first.
        latest: the problem that holds a recorded pass; only the last one does.
    """

    engine: str
    probes: bool
    sources: dict[BatchKey, RowSource] = field(default_factory=dict)
    seen: Counter[BatchKey] = field(default_factory=Counter)
    latest: weakref.ref[Linearized] | None = None

    def record(self, problem: Linearized, recorded: OnePass | None) -> None:
        """Leave a recorded pass with its problem, and drop that of the problem before."""
        former = self.latest() if self.latest is not None else None
        if former is not None:
            former.recorded = None
        problem.recorded = recorded
        self.latest = None if recorded is None else weakref.ref(problem)

    def choose(self, problem: Linearized, memory: int, raw: Tensor) -> None:
        """Choose the engine on a problem's own batch, for later batches of the kind as well.

        Raises:
            InputError, EngineError, ModelError: see `choose_engine` and `check_gradients_add_up`.
        """
        choice = choose_engine(
            problem.function, self.engine, memory, raw, problem.residual, check=self.probes
        )
        problem.use_rows(choice.rows)
        if self.probes:
            gradient = problem.function.unflatten(problem.gradient())
            check_gradients_add_up(choice, gradient, problem.residual)
            if (note := unused_note(problem.function, gradient)) is not None:
                problem.function.notes.add(note)
        self.sources[batch_key(problem.function)] = problem.rows


def by_known_plan(
    chain: Chain, before: Linearized, function: ModelFunction, targets: Tensor
) -> tuple[RowSource, Tensor, OnePass | None] | None:
    """A batch by the plan that is known for its shapes.

    Args:
        chain: of the model.
        before: the problem of an earlier batch.
        function: the model at its present weights on the new batch.
        targets: the batch's labels.

    Returns:
        The source of rows, the raw outputs and the forward pass if it was recorded; None where the
        engine must be chosen again.

    Raises:
        ModelError: two runs of the model differ.
        EngineError: samples see each other.
    """
    key = batch_key(function)
    known = chain.sources.get(key)
    if known is None:
        return None
    function = replace(
        function,
        inner_epsilon=known.function.inner_epsilon,
        forward_mode=known.function.forward_mode,
        inner_gradients=known.function.inner_gradients,
    )
    rows = replace(known, function=function)
    chain.seen[key] += 1
    count = chain.seen[key] + 1  # with the batch on which the plan was made
    is_due = chain.probes and count & (count - 1) == 0
    if is_due and not _plan_is_right(before, rows, targets):
        return None
    try:
        recorded = OnePass(rows) if OnePass.fits(rows, function.num_samples) else None
    except (UnsupportedLayerError, ModelError):  # the batch takes a different path
        return None
    raw = run_model(function) if recorded is None else recorded.outputs
    return rows, raw, recorded


def _plan_is_right(before: Linearized, rows: RowSource, targets: Tensor) -> bool:
    """Whether a plan that was made on a different batch is right on this one, too."""
    problem = Linearized(rows.function, before.likelihood, run_model(rows.function), targets)
    problem.use_rows(rows)
    raw = run_model(problem.function)
    check_repeatable(problem.function, raw)
    choice = recheck_engine(problem.rows, raw, problem.residual)
    if choice is None:
        return False
    return not missed_gradients(choice, problem.function.unflatten(problem.gradient()))
