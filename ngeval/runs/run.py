"""A run as plain data: which checkpoints are graded on which batches, with which settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ngeval.checkpoints import Checkpoint
from ngeval.errors import CheckpointError, InputError
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.model.checks import check_device
from ngeval.model.inputs import map_tensors
from ngeval.results.journal import Key
from ngeval.runs.options import MAX_SEED
from ngeval.tasks import Batch, Task

OTHER_BATCHES = 715_827_883
"""Added to the seed for the batches over which optimizers accumulate their state: these differ
from the graded ones."""


@dataclass(frozen=True)
class Run:
    """Which checkpoints are graded on which batches; what is computed of them is a `Work`.

    Attributes:
        task: the model, data and likelihood.
        checkpoints: in the order of training; all are graded on the same batches.
        batch_size: N, samples in a batch.
        num_batches: batches for each checkpoint.
        seed: for the choice of batches and for sampled labels.
        device: where to compute.
        dtype: what models are graded in; see `ngeval.Problem`.
        engine: the Jacobian engine.
        memory: bytes to work in; None: four fifths of the free memory.
        allow_pickle: unpickle checkpoints that contain code.
        checkpoint_key: the place of the weights in each checkpoint's file; None: what fits.
        strict: whether names in checkpoints and in the model must agree.
        optimizer_states: files with the optimizer's state, one for each checkpoint; empty: those
            beside the checkpoints.
        optimizer_options: how an optimizer's step is taken.
        together: where several processes share the run, all compute every unit in step, each on
            a part of its samples.
        source: the file of the task, or the folder of its package; None for a built-in task.

    Raises:
        InputError: a size below 1, an unknown device, or a wrong number of optimizer states.
        CheckpointError: an optimizer state is not a file.
    """

    task: Task
    checkpoints: Sequence[Checkpoint]
    batch_size: int = 160
    num_batches: int = 5
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | str = "auto"
    engine: str = "auto"
    memory: int | None = None
    allow_pickle: bool = False
    checkpoint_key: str | None = None
    strict: bool = True
    optimizer_states: Sequence[Path] = ()
    optimizer_options: OptimizerOptions = field(default_factory=OptimizerOptions)
    together: bool = False
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_batches < 1:
            raise InputError("batch size and number of batches must be at least 1")
        check_device(self.device)
        states, checkpoints = len(self.optimizer_states), len(self.checkpoints)
        if states and states != checkpoints:
            raise InputError(
                f"{states} optimizer states for {checkpoints} checkpoints: give one for each, in "
                "the checkpoints' order, or none to take those beside the checkpoints"
            )
        for path in self.optimizer_states:
            if not path.is_file():
                raise CheckpointError(f"optimizer state {path} is not a file")

    @property
    def num_units(self) -> int:
        """The number of units, each one checkpoint on one batch."""
        return len(self.checkpoints) * self.num_batches

    @property
    def keys(self) -> list[Key]:
        """The keys of all units, by checkpoint and batch."""
        return list(itertools.product(range(len(self.checkpoints)), range(self.num_batches)))

    def seed_of(self, key: Key) -> int:
        """The seed for sampled labels: different for each batch, the same for each checkpoint."""
        return self.seed + key[1]

    def stage(self, index: int) -> Stage:
        """What methods may know of a checkpoint."""
        checkpoint = self.checkpoints[index]
        optimizer = checkpoint.metadata.get("optimizer")
        states = self.optimizer_states
        return Stage(
            checkpoint.name,
            states[index] if states else checkpoint.optimizer,
            optimizer if isinstance(optimizer, str) else None,
            self.other_batches,
            self.optimizer_options,
        )

    def other_batches(self, count: int) -> Iterator[Batch]:
        """Batches of the task that are not graded, for optimizers to accumulate over."""
        seed = (self.seed + OTHER_BATCHES) % (MAX_SEED + 1)
        for inputs, targets in self.task.batches(self.batch_size, count, seed):
            yield map_tensors((inputs, targets), lambda t: t.to(self.device))

    def metric_batches(self, count: int | Literal["all"]) -> Iterator[Batch]:
        """Separate batches that grade: the first of the task, or all of an epoch."""
        number = None if count == "all" else count
        return iter(self.task.batches(self.batch_size, number, self.seed))

    def columns(self, key: Key) -> dict[str, Any]:
        """The columns that identify a unit in a table.

        ``task, checkpoint, stage`` (the checkpoint's place in the run), ``epoch`` and ``step``
        (NaN where the checkpoint does not record them), ``batch``.
        """
        stage, batch = key
        checkpoint = self.checkpoints[stage]
        return {
            "task": self.task.name,
            "checkpoint": checkpoint.name,
            "stage": stage,
            "epoch": math.nan if checkpoint.epoch is None else checkpoint.epoch,
            "step": math.nan if checkpoint.step is None else checkpoint.step,
            "batch": batch,
        }
