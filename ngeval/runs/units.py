"""The units of a run, one checkpoint on one batch each, as problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from ngeval.checkpoints import Checkpoint, CheckpointLoader
from ngeval.errors import CheckpointError, TaskError
from ngeval.methods import Method, get_methods
from ngeval.methods.stage import Stage
from ngeval.model.inputs import map_tensors
from ngeval.problem.problem import Problem
from ngeval.results.hashes import hash_batch, hash_checkpoint
from ngeval.results.journal import Key
from ngeval.runs.estimate import trainable_note
from ngeval.runs.progress import Progress
from ngeval.runs.ranks import Ranks
from ngeval.runs.run import Run
from ngeval.tasks import Batch


@dataclass(frozen=True)
class Unit:
    """One checkpoint on one batch.

    Attributes:
        problem: the model with that checkpoint's weights on that batch.
        methods: the methods of the run, at this checkpoint.
        key: the places of the checkpoint and of the batch.
        columns: what identifies the unit in a table; see `Run.columns`.
        remarks: what to know of the checkpoint, as which of its entries were left out.
    """

    problem: Problem
    methods: Sequence[Method]
    key: Key
    columns: dict[str, Any]
    remarks: Sequence[str] = ()


class Units:
    """The units of a run by their keys; a checkpoint stays loaded until the next is needed."""

    def __init__(
        self,
        run: Run,
        methods: Sequence[Method] = (),
        *,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the model; a `CheckpointError` where a method needs what a checkpoint lacks.

        A checkpoint or batch that differs, when it is read, from the ``identity`` of the run when
        it began is refused.
        """
        self.run, self.methods = run, methods
        for index in range(len(run.checkpoints)):
            methods_at(methods, run.stage(index))  # raises for what is missing before any work
        self.ranks = ranks or Ranks()
        self.progress = progress or Progress()
        self.model: nn.Module = run.task.model().to(run.device).eval()
        self.loader = CheckpointLoader(
            self.model, allow_pickle=run.allow_pickle, key=run.checkpoint_key, strict=run.strict
        )
        self.remarks: set[str] = set()
        self.stage = -1
        self.count = 0
        self.failure: Exception | None = None
        self.batches: Iterator[Batch] = iter(())
        self.next_batch = math.inf
        identity = identity or {"checkpoints": {}, "batches": []}
        self.checkpoint_hashes = identity["checkpoints"]
        self.batch_hashes = {i: batch["sha256"] for i, batch in enumerate(identity["batches"])}

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
            map_tensors(inputs, lambda t: t.to(run.device)),
            map_tensors(targets, lambda t: t.to(run.device)),
            run.task.resolved_likelihood(),
            output=run.task.output,
            dtype=run.dtype,
            engine=run.engine,
            memory=run.memory,
            group=self.ranks.group,
        )
        self.count += 1
        methods = methods_at(self.methods, run.stage(stage))
        return Unit(problem, methods, key, run.columns(key), self.loader.remarks)

    def _load(self, stage: int) -> None:
        """Load a checkpoint; a failure is that of all its units, and loading is tried once."""
        run, checkpoint = self.run, self.run.checkpoints[stage]
        self.stage, self.failure = stage, None
        try:
            self.model = self.ranks.agree(lambda: self._unchanged(checkpoint).to(run.device).eval())
        except Exception as error:  # any model's code runs here, and the other checkpoints may load
            self.failure = error
        else:
            for remark in self.loader.remarks:
                if remark not in self.remarks:
                    self.remarks.add(remark)
                    self.progress.warn(f"warning: {checkpoint.name}: {remark}")
            if checkpoint.is_adapter:
                self.progress.note(f"{checkpoint.name}: {trainable_note(self.model)}")

    def _unchanged(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with a checkpoint that was not written to since the run began."""
        model = self.loader.load(checkpoint)
        expected = self.checkpoint_hashes.get(checkpoint.name)
        if expected is not None and hash_checkpoint(checkpoint) != expected:
            raise CheckpointError(
                f"{checkpoint.name} was written to since the run began; where none of its units "
                "was graded before, --resume grades it as it is now"
            )
        return model

    def _batch(self, index: int) -> Batch:
        """A batch of the task, the same for every checkpoint."""
        run = self.run
        if index < self.next_batch:
            self.batches = run.task.batches(run.batch_size, run.num_batches, run.seed)
            self.next_batch = 0
        skipped = int(index - self.next_batch)
        self.next_batch = index + 1
        batch = next(itertools.islice(self.batches, skipped, None))
        digest = hash_batch(*batch)
        if self.batch_hashes.setdefault(index, digest) != digest:
            raise TaskError(
                f"batch {index} of task {run.task.name} differs when it is read again, and every "
                "checkpoint must be graded on the same batches: draw them with the seed that "
                "load_batches is given"
            )
        return batch


def iterate_units(run: Run, methods: Sequence[str | Method] = ()) -> Iterator[Unit]:
    """All units of a run, each checkpoint loaded once.

    Raises:
        InputError: unknown method.
        NgevalError: see `Units`.
    """
    units = Units(run, get_methods(methods) if methods else [])
    for key in run.keys:
        yield units.unit(key)


def methods_at(methods: Sequence[Method], stage: Stage) -> list[Method]:
    """The methods at a checkpoint: ``at(stage)`` of those that have it, the others as they are."""
    return [method.at(stage) if hasattr(method, "at") else method for method in methods]


def labelled(table: pd.DataFrame, columns: Mapping[str, Any]) -> pd.DataFrame:
    """A table with the columns that identify its unit in front."""
    front = pd.DataFrame({name: [value] * len(table) for name, value in columns.items()})
    return pd.concat([front, table.reset_index(drop=True)], axis=1)
