"""Tuning optimizers with equal budgets, and training with the best settings from several seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ngeval.errors import InputError, NgevalError, OutputError, TaskError
from ngeval.results.manifest import as_options, manifest
from ngeval.results.table_files import ResultFile
from ngeval.tasks import Task
from ngeval.training.grids import Grids, Trial, check_count, plan_trials
from ngeval.training.measure import DivergedError, EpochReport, monitored_column
from ngeval.training.optimizers import eval_mode_note, resolved, takes
from ngeval.training.run import RESULTS, Training, check_earlier, remove_earlier

COLUMNS = (
    "task",
    "optimizer",
    "phase",
    "trial",
    "learning_rate",
    "damping",
    "momentum",
    "weight_decay",
    "max_norm",
    "schedule",
    "batch_size",
    "monitor",
    "seed",
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "status",
    "reason",
)
"""Of the rows that `Search` makes: one for each training and epoch.

``phase`` is ``search`` or ``final``, ``trial`` the number of the settings, ``monitor`` the column
that the best of them is chosen by, ``status`` how the training ended (``ok``, ``diverged`` or
``failed``, with the ``reason``) on all its rows. A training that did not end well has a last row,
without figures, for the epoch in which it broke off."""

WHOLE = ("trial", "batch_size", "seed", "epoch")
"""The columns of whole numbers, which no row lacks."""

OnEpoch = Callable[[EpochReport], None]


@dataclass(frozen=True)
class Search:
    """Every optimizer is tried with as many settings, and its best trained from several seeds.

    The best settings are those with the best epoch by ``monitor`` on the validation data (with the
    least training loss at the end, where a task has none). Trials are trained from ``seed``; final
    trainings from ``seed, …, seed + seeds − 1``, which give the initial weights and the order of
    samples. Where every optimizer has one setting alone, nothing is tried.

    Attributes:
        task: the model, data and likelihood.
        optimizers: as `Training` takes them.
        learning_rates: for all optimizers, or a mapping by name; None takes the default grids.
        dampings: the same, for those that have one.
        kind: ``"grid"`` or ``"random"``; see `ngeval.training.grids.plan_trials`.
        trials: trainings for each optimizer; None: as many as the largest grid has.
        seeds: final trainings of each optimizer.
        seed: the first of them, and of the draws of a random search.
        epochs: of every training; so are all that follow, see `Training`.
        batch_size: samples in a step.
        num_batches: steps in an epoch; None is one pass over the data.
        patience: epochs without a better one after which a training is stopped.
        monitor: ``"loss"`` or ``"accuracy"``.
        momentum: for the optimizers that have one; so for the weight decay.
        weight_decay: None takes the optimizers' own.
        max_norm: of an exact optimizer's update, of the mean gradient for the others.
        schedule: of the learning rate.
        device: where to compute.
        output: folder for ``training.parquet`` and the checkpoints of final trainings,
            ``OPTIMIZER/seed-0/``, …; None writes nothing.
        force: replace what an earlier search wrote there.
        on_note: is told once what a reader must know.
    """

    task: Task
    optimizers: Sequence[str]
    learning_rates: Grids = None
    dampings: Grids = None
    kind: str = "grid"
    trials: int | None = None
    seeds: int = 5
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    num_batches: int | None = None
    patience: int | None = None
    monitor: str = "loss"
    momentum: float | None = None
    weight_decay: float | None = None
    max_norm: float | None = None
    schedule: str = "constant"
    device: str = "cpu"
    output: Path | None = None
    force: bool = False
    on_note: Callable[[str], None] | None = None

    def plan(self) -> dict[str, list[Trial]]:
        """The settings that each optimizer is tried with: as many for one as for the others.

        Raises:
            InputError: see `ngeval.training.grids.plan_trials`.
        """
        return plan_trials(
            self.optimizers,
            self.learning_rates,
            self.dampings,
            self.kind,
            self.trials,
            self.seed,
        )

    @property
    def num_trainings(self) -> int:
        """How many trainings there are in all, unless all trials of an optimizer diverge."""
        counts = [len(trials) for trials in self.plan().values()]
        return sum(self.seeds + (count if count > 1 else 0) for count in counts)

    def alone(self) -> Training:
        """The one training of a search over nothing, its checkpoints in ``output`` itself.

        Raises:
            InputError: an unknown optimizer, or settings that it lacks.
        """
        self._check_settings()
        [(name, [trial])] = self.plan().items()
        training = self._training(name, trial, self.seed, False)
        return replace(training, output=self.output, on_note=self.on_note)

    def check(self) -> None:
        """Find out before any work what can be found out.

        Raises:
            InputError: a setting out of range, or that no optimizer has.
            OutputError: there are results of an earlier search or training (without ``force``), or
                the folder cannot be written.
        """
        self._check_settings()
        plan = self.plan()
        if self.output is not None:
            check_earlier(self.output, self.force)
        for name, trials in plan.items():
            self._training(name, trials[0], self.seed, False).check()
            for seed in self._seeds() if self.output is not None else ():
                self._training(name, trials[0], seed, True).check()
        if self.output is not None:
            ResultFile(self.output / RESULTS, force=self.force)

    def _check_settings(self) -> None:
        check_count("seeds", self.seeds)
        for option in ("momentum", "weight_decay"):
            if getattr(self, option) is not None and not any(
                takes(name, option) for name in self.optimizers
            ):
                raise InputError(
                    f"{', '.join(self.optimizers)}: no {option.replace('_', ' ')}; leave it out"
                )

    def run(self, on_epoch: OnEpoch | None = None) -> Iterator[pd.DataFrame]:
        """Train, yielding the rows of each training when it is finished.

        Their columns are `ngeval.training.COLUMNS`. With ``output`` they are on disk by then.

        Args:
            on_epoch: is told of each epoch.

        Raises:
            InputError: a setting out of range, or that no optimizer has.
            OutputError: see `check`.
            TaskError: the task's own functions fail.
        """
        self.check()
        self._tell()
        target = None
        if self.output is not None:
            target = ResultFile(self.output / RESULTS, force=self.force, told=self._told())
        with target or nullcontext():
            for rows in self._all(on_epoch or (lambda report: None)):
                if target is not None:
                    target.append(rows)
                    target.flush()  # at once: the next training may take hours
                    remove_earlier(target.path.parent, but=target.path.name)
                yield rows

    def _told(self) -> dict[str, Any]:
        """The manifest: all that was asked for."""
        told = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return manifest(as_options(told | {"task": self.task.name, "on_note": None}))

    def _all(self, on_epoch: OnEpoch) -> Iterator[pd.DataFrame]:
        for name, trials in self.plan().items():
            best = 0
            if len(trials) > 1:
                scores = []
                for number, trial in enumerate(trials):
                    rows = self._trained(name, number, trial, self.seed, False, on_epoch)
                    scores.append(score(rows))
                    yield rows
                best = scores.index(min(scores))
                if not math.isfinite(scores[best]):
                    continue  # no trial came to its end: there is nothing to train with
            for seed in self._seeds():
                yield self._trained(name, best, trials[best], seed, True, on_epoch)

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def _training(self, name: str, trial: Trial, seed: int, final: bool) -> Training:
        """The training with these settings, given those of them that the optimizer has."""
        own = {
            option: getattr(self, option) if takes(name, option) else None
            for option in ("momentum", "weight_decay")
        }
        return Training(
            self.task,
            self._folder(name, seed) if final else None,
            name,
            self.epochs,
            trial.learning_rate,
            self.batch_size,
            self.num_batches,
            seed,
            self.device,
            self.force,
            trial.damping,
            max_norm=self.max_norm,
            schedule=self.schedule,
            patience=self.patience,
            monitor=self.monitor,
            **own,
        )

    def _folder(self, name: str, seed: int) -> Path | None:
        """Where a final training's checkpoints go; names like ``sf:4`` are made safe for files."""
        if self.output is None:
            return None
        return self.output / re.sub(r"[^\w.-]", "-", name) / f"seed-{seed}"

    def _trained(
        self, name: str, number: int, trial: Trial, seed: int, final: bool, on_epoch: OnEpoch
    ) -> pd.DataFrame:
        """Rows of one training, however it ended."""
        training = self._training(name, trial, seed, final)
        reports: list[EpochReport] = []
        status, reason = "ok", ""
        try:
            for report in training.run():
                reports.append(report)
                on_epoch(report)
        except (TaskError, OutputError):  # which no other setting would be spared
            raise
        except NgevalError as error:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            reason = str(error)
        phase = "final" if final else "search"
        return self._rows(training, phase, number, reports, status, reason)

    def _rows(
        self,
        training: Training,
        phase: str,
        number: int,
        reports: list[EpochReport],
        status: str,
        reason: str,
    ) -> pd.DataFrame:
        told = asdict(resolved(training.optimizer, training.settings))
        same = told | {
            "task": self.task.name,
            "optimizer": training.optimizer,
            "phase": phase,
            "trial": number,
            "batch_size": self.batch_size,
            "monitor": monitored_column(self.task, self.monitor),
            "seed": training.seed,
            "status": status,
            "reason": reason,
        }
        records = [same | asdict(report) for report in reports]
        if status != "ok":
            records.append(same | {"epoch": len(reports)})
        table = pd.DataFrame.from_records(records).reindex(columns=list(COLUMNS))
        # Numbers also where all are missing: tables of several trainings go together.
        texts = {"task", "optimizer", "phase", "schedule", "monitor", "status", "reason"}
        numbers = [name for name in COLUMNS if name not in (*texts, *WHOLE)]
        return table.astype(dict.fromkeys(numbers, float))

    def _tell(self) -> None:
        if self.on_note is None:
            return
        with torch.random.fork_rng(devices=[]):
            note = eval_mode_note(self.optimizers, self.task.model())
        if note is not None:
            self.on_note(note)


def score(rows: pd.DataFrame) -> float:
    """How good a training is by its ``monitor``, so that less is better; ∞ unless it ended well.

    Its best epoch on the validation data; where there are none, the training loss at the end, of
    which the best epoch would be the same thing but for noise.
    """
    if rows["status"].iloc[0] != "ok":
        return math.inf
    column = str(rows["monitor"].iloc[0])
    values = rows[column].dropna()
    if values.empty:
        return math.inf
    if column == "train_loss":
        return float(values.iloc[-1])
    return float(-values.max() if column.endswith("accuracy") else values.min())
