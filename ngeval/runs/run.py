"""A task's checkpoints × batches, one `Problem` at a time, and the tables made over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ngeval.checkpoints import Checkpoint
from ngeval.curvature.krylov import GAP
from ngeval.errors import CheckpointError, InputError, TaskError
from ngeval.grading.evaluate import COLUMNS, Progress, evaluate
from ngeval.grading.layer_table import COLUMNS as LAYER_COLUMNS
from ngeval.grading.layer_table import layer_table
from ngeval.grading.prepare import failure_reason, lost_memory
from ngeval.methods import Method
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.model.checks import check_device
from ngeval.model.function import map_inputs
from ngeval.model.parameter_groups import Groups
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem
from ngeval.results.journal import Key
from ngeval.runs.ranks import OneProcess, Ranks
from ngeval.runs.units import Unit, Units, failed_rows, labelled, sample_table
from ngeval.tasks import Batch, Task

OTHER_BATCHES = 715_827_883
"""Added to the seed for batches that optimizers accumulate their state over, so that they are not
those that are graded."""

NUM_SEEDS = 2**32


@dataclass(frozen=True)
class Grading:
    """How updates are graded.

    Attributes:
        metric_batches: by the Fisher and gradient of that many batches of the task, or of
            ``"all"`` of an epoch; None: by those of the batch that they were made from.
        natural: also γ_min and bounds on the exact natural gradient's γ.
        gap: the relative gap of those bounds.
    """

    metric_batches: int | str | None = None
    natural: bool = True
    gap: float = GAP


@dataclass(frozen=True)
class Run:
    """Which checkpoints are graded on which batches.

    Attributes:
        task: the model, data and likelihood.
        checkpoints: in the order of training; every one is graded on the same batches.
        batch_size: N, samples in a batch.
        num_batches: batches for each checkpoint.
        seed: for the choice of batches and for sampled labels.
        device: where to compute.
        dtype: compute in this dtype; None keeps the model's.
        engine: the Jacobian engine.
        memory: bytes to work in; None: four fifths of what is free.
        allow_pickle: unpickle checkpoints with code.
        on_model: called with each checkpoint and the model that it makes.
        optimizer_states: files with the optimizer's state, one for each checkpoint; none: those
            that are found with the checkpoints.
        optimizer_options: how an optimizer's step is taken.
        keys: the units that are wanted, in this order; None: all, by checkpoint and batch.
        together: where several processes share the run, they do every unit together, each a part
            of its samples.
        ranks: the processes that share the run.
        checkpoint_hashes: by name, as they were when the run began; what is another one by the time
            that it is loaded is refused. None: not looked at.
        batch_hashes: of every batch, likewise.
        source: the file or the package's folder that the task is from, None for ngeval's own.
    """

    task: Task
    checkpoints: Sequence[Checkpoint]
    batch_size: int = 160
    num_batches: int = 5
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    engine: str = "auto"
    memory: int | None = None
    allow_pickle: bool = False
    on_model: Callable[[Checkpoint, nn.Module], None] = lambda *_: None
    optimizer_states: Sequence[Path] = ()
    optimizer_options: OptimizerOptions = field(default_factory=OptimizerOptions)
    keys: Iterable[Key] | None = None
    together: bool = False
    ranks: Ranks = field(default_factory=OneProcess)
    source: Path | None = None
    checkpoint_hashes: Mapping[str, str] = field(default_factory=dict)
    batch_hashes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse sizes that make no batch, and a device or a state that is not there."""
        if self.batch_size < 1 or self.num_batches < 1:
            raise InputError("batch size and number of batches must be at least 1")
        check_device(self.device)
        given, wanted = len(self.optimizer_states), len(self.checkpoints)
        if given and given != wanted:
            raise InputError(
                f"{given} optimizer states for {wanted} checkpoints: give one for each, in the "
                "checkpoints' order, or none to take those beside the checkpoints"
            )
        for path in self.optimizer_states:
            if not path.is_file():
                raise CheckpointError(f"optimizer state {path} is not a file")

    @property
    def num_units(self) -> int:
        """How many problems there are."""
        return len(self.checkpoints) * self.num_batches

    def stage(self, index: int) -> Stage:
        """What methods may know of a checkpoint."""
        checkpoint = self.checkpoints[index]
        told = checkpoint.metadata.get("optimizer")
        given = self.optimizer_states
        return Stage(
            checkpoint.name,
            given[index] if given else checkpoint.optimizer,
            told if isinstance(told, str) else None,
            self.other_batches,
            self.optimizer_options,
        )

    def other_batches(self, count: int) -> Iterator[Batch]:
        """Other batches of the task than are graded, for optimizers to accumulate over."""
        seed = (self.seed + OTHER_BATCHES) % NUM_SEEDS
        for inputs, targets in self.task.batches(self.batch_size, count, seed):
            yield map_inputs(inputs, lambda t: t.to(self.device)), targets.to(self.device)

    def all_keys(self) -> list[Key]:
        """Every unit, by checkpoint and batch."""
        return list(itertools.product(range(len(self.checkpoints)), range(self.num_batches)))

    def columns(self, key: Key) -> dict[str, Any]:
        """What identifies a unit in a table; see `Unit`."""
        stage, batch = key
        checkpoint = self.checkpoints[stage]
        return {
            "task": self.task.name,
            "checkpoint": checkpoint.name,
            "stage": stage,
            "epoch": _number(checkpoint.epoch),
            "step": _number(checkpoint.step),
            "batch": batch,
        }

    def units(self, methods: Sequence[str | Method] = ()) -> Iterator[Unit]:
        """Load each checkpoint once and go through the batches.

        Raises:
            InputError: unknown method.
            CheckpointError: a method needs what a checkpoint has not; before any is loaded.
        """
        units = Units(self, methods)
        for key in self.all_keys() if self.keys is None else self.keys:
            yield units.unit(key)

    def _tables(
        self,
        methods: Sequence[str | Method],
        make: Callable[[Unit], pd.DataFrame],
        failed: Callable[[str, int], pd.DataFrame],
    ) -> Iterator[pd.DataFrame]:
        """One table for each unit, with the unit's columns first.

        A unit that cannot be had (an unreadable checkpoint, NaN weights) has the rows that
        ``failed`` makes of the reason and the seed. In ``attrs``: ``"unit"``, its key, and
        ``"failure"``, why it is to be done again, if it is.

        Raises:
            TaskError: the task has no such batch.
        """
        units = Units(self, methods)
        for key in self.all_keys() if self.keys is None else self.keys:
            try:
                table = make(units.unit(key))
                failure = lost_memory(table)
            except TaskError:  # that every checkpoint would fail by
                raise
            except Exception as error:  # a model may be anybody's; its failure is data
                failure = failure_reason(error)
                table = failed(failure, self._seed_of(key))
            labelled_table = labelled(table, self.columns(key))
            labelled_table.attrs = {"unit": key, "failure": failure}
            yield labelled_table

    def gammas(
        self,
        methods: Sequence[str | Method],
        dampings: Sequence[float],
        damping_scale: str = "absolute",
        grading: Grading = Grading(),
        on_step: Progress | None = None,
    ) -> Iterator[pd.DataFrame]:
        """`ngeval.evaluate` on every unit: one table for each; see `_tables`."""

        def make(unit: Unit) -> pd.DataFrame:
            return evaluate(
                unit.problem,
                unit.methods,
                dampings,
                damping_scale=damping_scale,
                seed=self._seed_of(unit.key),
                metric=self._metric(unit.problem, grading),
                natural=grading.natural,
                gap=grading.gap,
                on_step=on_step,
            )

        def failed(reason: str, seed: int) -> pd.DataFrame:
            counts = {"num_parameters": 0}
            if grading.natural and grading.metric_batches is None:
                counts["iterations"] = 0
            rows = failed_rows(methods, dampings, damping_scale, reason, seed)
            return rows.assign(**counts).reindex(columns=COLUMNS)

        yield from self._tables(methods, make, failed)

    def layers(
        self,
        methods: Sequence[str | Method],
        dampings: Sequence[float],
        groups: Groups = "layer",
        damping_scale: str = "absolute",
        grading: Grading = Grading(),
        on_step: Progress | None = None,
    ) -> Iterator[pd.DataFrame]:
        """`ngeval.layer_table` on every unit: one table for each; see `_tables`."""

        def make(unit: Unit) -> pd.DataFrame:
            return layer_table(
                unit.problem,
                unit.methods,
                dampings,
                groups=groups,
                damping_scale=damping_scale,
                seed=self._seed_of(unit.key),
                metric=self._metric(unit.problem, grading),
                natural=grading.natural,
                on_step=on_step,
            )

        def failed(reason: str, seed: int) -> pd.DataFrame:
            rows = failed_rows(methods, dampings, damping_scale, reason, seed)
            return rows.assign(layer="", num_parameters=0).reindex(columns=LAYER_COLUMNS)

        yield from self._tables(methods, make, failed)

    def _seed_of(self, key: Key) -> int:
        """Another draw of labels for every batch, the same for every checkpoint."""
        return self.seed + key[1]

    def _metric(self, problem: Problem, grading: Grading) -> Metric | None:
        """The metric's batches: the same for every checkpoint and every batch of updates."""
        wanted = grading.metric_batches
        if wanted is None:
            return None
        count = None if isinstance(wanted, str) else wanted
        return Metric(problem, lambda: self.task.batches(self.batch_size, count, self.seed))

    def imbalances(self, methods: Sequence[str | Method], damping: float) -> Iterator[pd.DataFrame]:
        """`ngeval.gradient_norms` on every unit, one row for each sample; see `_tables`.

        For each method a column ``loss_change_<method>``: the first-order change of that sample's
        loss for the unit step −d(λ), in nats. A unit that cannot be had has no rows.
        """

        def make(unit: Unit) -> pd.DataFrame:
            return sample_table(unit.problem, unit.methods, damping, self._seed_of(unit.key))

        yield from self._tables(methods, make, lambda *_: pd.DataFrame())


def _number(told: float | None) -> float:
    return float("nan") if told is None else told
