"""What ``demo`` does: train on real data, grade every checkpoint at every damping, draw figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.stages import three_stages
from ngeval.checkpoints import find_checkpoints
from ngeval.errors import InputError
from ngeval.plots import (
    FIGURE_SUFFIXES,
    damping_figure,
    norms_figure,
    save_figure,
    stages_figure,
)
from ngeval.results.manifest import manifest
from ngeval.results.table_files import ResultFile, check_output
from ngeval.runs.run import Run
from ngeval.runs.tables import GammaTable, SampleTable, unit_tables
from ngeval.runs.units import Units
from ngeval.tasks import Task, get_task
from ngeval.training import EpochReport, Training

METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")
DAMPINGS = tuple(float(value) for value in np.logspace(-8, 4, 50))

Advance = Callable[[str, int], None]
"""Called after each step of the work with the name of its part and the steps of that part."""


@dataclass(frozen=True)
class Demo:
    """The demonstration: digits-mlp with AdamW, from the first epoch to convergence.

    Attributes:
        output: folder for ``checkpoints/``, ``results.parquet``, ``imbalance.parquet``, figures.
        epochs: passes over the 1,437 training images.
        batch_size: N of the graded batches.
        num_batches: graded batches for each checkpoint.
        seed: for training, batches and sampled labels.
        force: replace the output of an earlier demo.
    """

    output: Path
    epochs: int = 12
    batch_size: int = 160
    num_batches: int = 4
    seed: int = 0
    force: bool = False

    def run(
        self, on_epoch: Callable[[EpochReport], None], advance: Advance
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Do everything; return the γ table and the table of samples, which are also written."""
        task = get_task("digits-mlp")
        checkpoints = self.output / "checkpoints"
        self._check(task)
        record = manifest(
            {
                "task": task.name,
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "num_batches": self.num_batches,
                "seed": self.seed,
            }
        )
        with (
            self._file("results.parquet", record) as gammas,
            self._file("imbalance.parquet", record) as samples,
        ):
            training = Training(
                task, checkpoints, epochs=self.epochs, seed=self.seed, force=self.force
            )
            for report in training.run():
                on_epoch(report)
                advance("training", self.epochs + 1)
            run = Run(
                task,
                find_checkpoints([str(checkpoints)]),
                batch_size=self.batch_size,
                num_batches=self.num_batches,
                seed=self.seed,
            )
            works = (GammaTable.of(METHODS, dampings=DAMPINGS), SampleTable.of(()))
            for work, file in zip(works, (gammas, samples), strict=True):
                for _, entry in unit_tables(Units(run, work.resolved), work, run.keys):
                    file.append(entry.table)
                    advance(work.description, run.num_units)
        self._draw(gammas.table(), samples.table())
        return gammas.table(), samples.table()

    def _file(self, name: str, record: dict[str, Any]) -> ResultFile:
        return ResultFile(self.output / name, force=self.force, manifest=record)

    @property
    def figures(self) -> dict[str, Path]:
        """The files of the figures by kind."""
        return {kind: self.output / f"{kind}.png" for kind in ("stages", "damping", "imbalance")}

    def _check(self, task: Task) -> None:
        """Check before training what would otherwise fail after it."""
        for path in self.figures.values():
            check_output(path, FIGURE_SUFFIXES, force=self.force)
        if self.epochs < 0:
            raise InputError("epochs must be ≥ 0")
        Run(task, (), self.batch_size, self.num_batches, self.seed)
        next(task.batches(self.batch_size, self.num_batches, self.seed))

    def _draw(self, gammas: pd.DataFrame, samples: pd.DataFrame) -> None:
        figures = {
            "stages": stages_figure(gammas),
            "damping": damping_figure(gammas, three_stages(gammas)),
            "imbalance": norms_figure(samples),
        }
        for kind, figure in figures.items():
            save_figure(figure, self.figures[kind])
