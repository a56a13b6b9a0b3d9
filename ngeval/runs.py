"""A task's checkpoints × batches, one `Problem` at a time, and the tables made over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ngeval.checkpoints import Checkpoint, CheckpointLoader
from ngeval.checks import check_device
from ngeval.errors import CheckpointError, InputError
from ngeval.evaluate import Progress, evaluate
from ngeval.functional import map_inputs
from ngeval.groups import Groups
from ngeval.krylov import GAP
from ngeval.layers import layer_table
from ngeval.methods import Method, get_methods
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.metric import Metric
from ngeval.metrics import gradient_norms, loss_change
from ngeval.problem import Problem
from ngeval.tasks import Batch, Task

OTHER_BATCHES = 715_827_883
"""Added to the seed for batches that optimizers accumulate their state over, so that they are not
those that are graded."""

NUM_SEEDS = 2**32


@dataclass(frozen=True)
class Unit:
    """One checkpoint on one batch.

    Attributes:
        problem: the model with that checkpoint's weights on that batch.
        columns: what identifies the unit in a table: ``task, checkpoint, stage`` (its place in
            the list), ``epoch`` and ``step`` (where the checkpoint tells them, else NaN),
            ``batch``.
        methods: those that were asked for, at this checkpoint.
    """

    problem: Problem
    columns: dict[str, Any]
    methods: Sequence[Method] = ()


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
            self._other_batches,
            self.optimizer_options,
        )

    def _other_batches(self, count: int) -> Iterator[Batch]:
        """Batches of the task that are not those that are graded."""
        seed = (self.seed + OTHER_BATCHES) % NUM_SEEDS
        for inputs, targets in self.task.batches(self.batch_size, count, seed):
            yield map_inputs(inputs, lambda t: t.to(self.device)), targets.to(self.device)

    def units(self, methods: Sequence[str | Method] = ()) -> Iterator[Unit]:
        """Load each checkpoint once and go through the batches.

        Raises:
            InputError: unknown method.
            CheckpointError: a method needs what a checkpoint has not; before any is loaded.
        """
        resolved = get_methods(methods) if methods else []
        for index in range(len(self.checkpoints)):
            methods_at(resolved, self.stage(index))  # what is missing is an error now
        base = self.task.model().to(self.device).eval()
        loader = CheckpointLoader(base, allow_pickle=self.allow_pickle)
        for stage, checkpoint in enumerate(self.checkpoints):
            model = loader.load(checkpoint).to(self.device).eval()
            self.on_model(checkpoint, model)
            bound = methods_at(resolved, self.stage(stage))
            batches = self.task.batches(self.batch_size, self.num_batches, self.seed)
            for index, (inputs, targets) in enumerate(batches):
                problem = Problem(
                    model,
                    map_inputs(inputs, lambda t: t.to(self.device)),
                    targets.to(self.device),
                    self.task.resolved_likelihood(),
                    output=self.task.output,
                    dtype=self.dtype,
                    engine=self.engine,
                    memory=self.memory,
                )
                yield Unit(
                    problem,
                    {
                        "task": self.task.name,
                        "checkpoint": checkpoint.name,
                        "stage": stage,
                        "epoch": _number(checkpoint.epoch),
                        "step": _number(checkpoint.step),
                        "batch": index,
                    },
                    bound,
                )

    def gammas(
        self,
        methods: Sequence[str | Method],
        dampings: Sequence[float],
        damping_scale: str = "absolute",
        grading: Grading = Grading(),
        on_step: Progress | None = None,
    ) -> Iterator[pd.DataFrame]:
        """`ngeval.evaluate` on every unit: one table for each, with the unit's columns first."""
        for unit in self.units(methods):
            table = evaluate(
                unit.problem,
                unit.methods,
                dampings,
                damping_scale=damping_scale,
                seed=self._seed_of(unit),
                metric=self._metric(unit.problem, grading),
                natural=grading.natural,
                gap=grading.gap,
                on_step=on_step,
            )
            yield labelled(table, unit)

    def layers(
        self,
        methods: Sequence[str | Method],
        dampings: Sequence[float],
        groups: Groups = "layer",
        damping_scale: str = "absolute",
        grading: Grading = Grading(),
        on_step: Progress | None = None,
    ) -> Iterator[pd.DataFrame]:
        """`ngeval.layer_table` on every unit: one table for each, with the unit's columns first."""
        for unit in self.units(methods):
            table = layer_table(
                unit.problem,
                unit.methods,
                dampings,
                groups=groups,
                damping_scale=damping_scale,
                seed=self._seed_of(unit),
                metric=self._metric(unit.problem, grading),
                natural=grading.natural,
                on_step=on_step,
            )
            yield labelled(table, unit)

    def _seed_of(self, unit: Unit) -> int:
        """Another draw of labels for every batch, the same for every checkpoint."""
        return self.seed + int(unit.columns["batch"])

    def _metric(self, problem: Problem, grading: Grading) -> Metric | None:
        """The metric's batches: the same for every checkpoint and every batch of updates."""
        wanted = grading.metric_batches
        if wanted is None:
            return None
        count = None if isinstance(wanted, str) else wanted
        return Metric(problem, lambda: self.task.batches(self.batch_size, count, self.seed))

    def imbalances(self, methods: Sequence[str | Method], damping: float) -> Iterator[pd.DataFrame]:
        """`ngeval.gradient_norms` on every unit, one row for each sample.

        For each method a column ``loss_change_<method>``: the first-order change of that sample's
        loss for the unit step −d(λ), in nats.
        """
        for unit in self.units(methods):
            table = sample_table(unit.problem, unit.methods, damping, self._seed_of(unit))
            yield labelled(table, unit)


def methods_at(methods: Sequence[Method], stage: Stage) -> list[Method]:
    """The methods at a checkpoint: those that have ``at(stage)`` are asked, others are the same."""
    return [method.at(stage) if hasattr(method, "at") else method for method in methods]


def _number(told: float | None) -> float:
    return float("nan") if told is None else told


def sample_table(
    problem: Problem, methods: Sequence[Method], damping: float, seed: int
) -> pd.DataFrame:
    """Per-sample norms, and what each method's update (absolute λ) does to each sample's loss."""
    table = gradient_norms(problem)
    for method in methods:
        direction = method.prepare(problem, seed).direction(damping)
        table[f"loss_change_{method.name}"] = loss_change(problem, direction).cpu().numpy()
    return table


def labelled(table: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """Put the unit's columns in front of a table."""
    front = pd.DataFrame({key: [value] * len(table) for key, value in unit.columns.items()})
    return pd.concat([front, table.reset_index(drop=True)], axis=1)
