"""One checkpoint on one batch: problems by their keys, and the rows that tables are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from ngeval.checkpoints import Checkpoint, CheckpointLoader
from ngeval.curvature.kernel import Kernel
from ngeval.errors import CheckpointError, TaskError
from ngeval.methods import Method, get_methods
from ngeval.methods.stage import Stage
from ngeval.model.function import map_inputs
from ngeval.problem.gamma import gradient_norms, loss_change
from ngeval.problem.problem import Problem
from ngeval.results.hashes import hash_batch, hash_checkpoint
from ngeval.results.journal import Key
from ngeval.tasks import Batch

if TYPE_CHECKING:
    from ngeval.runs.run import Run


@dataclass(frozen=True)
class Unit:
    """One checkpoint on one batch.

    Attributes:
        problem: the model with that checkpoint's weights on that batch.
        columns: what identifies the unit in a table: ``task, checkpoint, stage`` (its place in
            the list), ``epoch`` and ``step`` (where the checkpoint tells them, else NaN),
            ``batch``.
        methods: those that were asked for, at this checkpoint.
        key: the checkpoint's place and the batch's.
    """

    problem: Problem
    columns: dict[str, Any]
    methods: Sequence[Method] = ()
    key: Key = (0, 0)


class Units:
    """Problems by their keys; a checkpoint stays loaded until another is asked for."""

    def __init__(self, run: Run, methods: Sequence[str | Method]) -> None:
        """Build the model.

        Raises:
            InputError: unknown method.
            CheckpointError: a method needs what a checkpoint has not.
        """
        self.run = run
        self.methods = get_methods(methods) if methods else []
        for index in range(len(run.checkpoints)):
            methods_at(self.methods, run.stage(index))  # what is missing is an error now
        base = run.task.model().to(run.device).eval()
        self.loader = CheckpointLoader(base, allow_pickle=run.allow_pickle)
        self.model: nn.Module = base
        self.stage = -1
        self.failure: Exception | None = None
        self.batches: Iterator[Batch] = iter(())
        self.next_batch = math.inf
        self.batch_hashes = dict(enumerate(run.batch_hashes))

    def unit(self, key: Key) -> Unit:
        """One checkpoint on one batch.

        Raises:
            NgevalError: the checkpoint cannot be loaded, or the batch cannot be graded.
        """
        run, (stage, index) = self.run, key
        if stage != self.stage:
            self._load(stage)
        if self.failure is not None:
            raise self.failure
        inputs, targets = self._batch(index)
        problem = Problem(
            self.model,
            map_inputs(inputs, lambda t: t.to(run.device)),
            targets.to(run.device),
            run.task.resolved_likelihood(),
            output=run.task.output,
            dtype=run.dtype,
            engine=run.engine,
            memory=run.memory,
            group=run.ranks.group,
        )
        return Unit(problem, run.columns(key), methods_at(self.methods, run.stage(stage)), key)

    def _load(self, stage: int) -> None:
        """Another checkpoint; one that cannot be loaded fails all its units, and is tried once."""
        run, checkpoint = self.run, self.run.checkpoints[stage]
        self.stage, self.failure = stage, None
        try:
            self.model = run.ranks.agreed(lambda: self._as_it_was(checkpoint).to(run.device).eval())
        except Exception as error:  # of whatever kind: the other checkpoints are none the worse
            self.failure = error
        else:
            run.on_model(checkpoint, self.model)

    def _as_it_was(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with a checkpoint that nobody has written to since the run began."""
        model = self.loader.load(checkpoint)
        known = self.run.checkpoint_hashes.get(checkpoint.name)
        if known is not None and hash_checkpoint(checkpoint) != known:
            raise CheckpointError(
                f"{checkpoint.name} was written to since the run began; where none of its units "
                "was graded before, --resume takes it as it is now"
            )
        return model

    def _batch(self, index: int) -> Batch:
        """A batch of the task; the same ones for every checkpoint.

        Raises:
            TaskError: it is another one than before.
        """
        if index < self.next_batch:
            run = self.run
            self.batches = run.task.batches(run.batch_size, run.num_batches, run.seed)
            self.next_batch = 0
        skipped = int(index - self.next_batch)
        self.next_batch = index + 1
        batch: Batch = next(itertools.islice(self.batches, skipped, None))
        now = hash_batch(*batch)
        if self.batch_hashes.setdefault(index, now) != now:
            raise TaskError(
                f"batch {index} of task {self.run.task.name} is another one when it is read again, "
                "and every checkpoint has to be graded on the same: draw it by the seed that the "
                "task's batches are asked for with"
            )
        return batch


def failed_rows(
    methods: Sequence[str | Method],
    dampings: Sequence[float],
    damping_scale: str,
    reason: str,
    seed: int,
) -> pd.DataFrame:
    """A row for each method and damping of a unit that could not be had; counts are 0."""
    names = [method.name for method in get_methods(methods)]
    return pd.DataFrame(
        [
            {"method": name, "damping": float(damping), "damping_scale": damping_scale}
            for name, damping in itertools.product(names, dampings)
        ]
    ).assign(status="failed", reason=reason, num_samples=0, metric_samples=0, seed=seed)


def methods_at(methods: Sequence[Method], stage: Stage) -> list[Method]:
    """The methods at a checkpoint: those that have ``at(stage)`` are asked, others are the same."""
    return [method.at(stage) if hasattr(method, "at") else method for method in methods]


def sample_table(
    problem: Problem, methods: Sequence[Method], damping: float, seed: int
) -> pd.DataFrame:
    """Per-sample norms, and what each method's update (absolute λ) does to each sample's loss."""
    table, kernel = gradient_norms(problem), Kernel(problem)
    for method in methods:
        direction = method.prepare(problem, kernel, seed).direction(damping)
        table[f"loss_change_{method.name}"] = loss_change(problem, direction).cpu().numpy()
    return table


def labelled(table: pd.DataFrame, columns: dict[str, Any]) -> pd.DataFrame:
    """Put a unit's columns in front of a table."""
    front = pd.DataFrame({key: [value] * len(table) for key, value in columns.items()})
    return pd.concat([front, table.reset_index(drop=True)], axis=1)
