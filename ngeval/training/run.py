"""Training a task from scratch, with a checkpoint for every epoch."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ngeval.checkpoints import save_checkpoint, save_optimizer
from ngeval.errors import InputError, OutputError
from ngeval.model.checks import check_device
from ngeval.results.table_files import check_folder
from ngeval.tasks import Task
from ngeval.training.measure import EpochReport, measure, monitored, monitored_column
from ngeval.training.optimizers import Settings, resolved
from ngeval.training.steppers import Stepper, eval_mode_note

CHECKPOINT_FILE = re.compile(r"epoch-\d+\.(safetensors|json|optimizer\.pt)")


@dataclass(frozen=True)
class Training(Settings):
    """A training run, which minimises the mean loss of a task.

    It also has the settings of the optimizer as attributes; see `Settings`.

    Attributes:
        task: the model, data and likelihood.
        output: folder for ``epoch-000.safetensors``, ``epoch-000.json``,
            ``epoch-000.optimizer.pt``, …; None writes nothing.
        optimizer: a name in `ngeval.methods.optimizer.catalogue.OPTIMIZERS`, the dotted path of an
            Optimizer class, or ``ef``, ``ief``, ``sf``, ``sf:4`` or ``ng``, exact on every batch
            (the model is then in eval mode throughout).
        epochs: passes over the training data; 0 writes the initial weights alone.
        batch_size: samples in a step.
        num_batches: steps in an epoch; None is one pass over the data.
        seed: for the initial weights, the order of samples and the labels that ``sf`` draws.
        device: where to compute.
        force: replace the checkpoints of an earlier run in the folder.
        patience: stop after this many epochs that were not better than the best before, by
            ``monitor`` on the validation data.
        monitor: ``loss`` or ``accuracy``.
        on_note: called with what a user should know, before the first step.
    """

    task: Task
    output: Path | None
    optimizer: str = "adamw"
    epochs: int = 10
    batch_size: int = 64
    num_batches: int | None = None
    seed: int = 0
    device: str = "cpu"
    force: bool = False
    patience: int | None = None
    monitor: str = "loss"
    on_note: Callable[[str], None] | None = None

    def run(self) -> Iterator[EpochReport]:
        """Train, yielding a report for each checkpoint as soon as it is written.

        Raises:
            InputError: see `check`.
            OutputError: see `check`.
            DivergedError: the loss becomes NaN or infinite.
            ModelError: the model or a step of the optimizer fails, or nothing is trainable.
        """
        self.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.task.model().to(self.device)
            stepper = Stepper(self.optimizer, self.task, model, self, self.seed, self.device)
            note = eval_mode_note(self.optimizer, model)
            if note is not None and self.on_note is not None:
                self.on_note(note)
            report, steps = self._measured(stepper, 0, 0.0)
            if self.output is not None:  # not before the model has run
                for path in _checkpoint_files(self.output):
                    path.unlink()
            yield self._save(stepper, report)
            stepper.schedule(self.schedule, steps * self.epochs)
            yield from self._epochs(stepper, report)

    def _epochs(self, stepper: Stepper, report: EpochReport) -> Iterator[EpochReport]:
        column = monitored_column(self.task, self.monitor)
        best, waited = monitored(report, column), 0
        seconds = 0.0
        for epoch in range(1, self.epochs + 1):
            start = time.perf_counter()
            self._train_epoch(stepper, epoch)
            seconds += time.perf_counter() - start
            report, _ = self._measured(stepper, epoch, seconds)
            yield self._save(stepper, report)
            value = monitored(report, column)
            best, waited = (value, 0) if value < best else (best, waited + 1)
            if self.patience is not None and waited >= self.patience:
                return

    def check(self) -> None:
        """Check the settings and the folder before any work.

        Raises:
            InputError: the optimizer is unknown, or a setting is out of range or not one of its
                own.
            OutputError: the folder holds checkpoints (without ``force``) or cannot be written.
        """
        if self.epochs < 0 or self.batch_size < 1:
            raise InputError("epochs must be ≥ 0 and the batch size ≥ 1")
        if self.num_batches is not None and self.num_batches < 1:
            raise InputError("the number of batches must be at least 1")
        check_device(self.device)
        resolved(self.optimizer, self)
        monitored_column(self.task, self.monitor)
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1 epoch, not {self.patience}")
        if self.patience is not None and self.task.load_validation is None:
            raise InputError(
                f"patience needs validation data, and task {self.task.name!r} has none; give it "
                "load_validation, or leave patience out"
            )
        if self.output is not None:
            self._prepare_folder(self.output)

    def _prepare_folder(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {folder} is a file; give a folder")
        check_folder(folder)
        earlier = _checkpoint_files(folder)
        if earlier and not self.force:
            raise OutputError(
                f"{folder} holds checkpoints of an earlier run ({earlier[0].name}, …); pass "
                "--force to replace them"
            )

    def _train_epoch(self, stepper: Stepper, epoch: int) -> None:
        stepper.ready()
        # A different order of samples in every epoch, reproducible from the seed.
        seed = self.seed * 100_003 + epoch
        for batch in self.task.batches(self.batch_size, self.num_batches, seed):
            stepper.step(batch)

    def _measured(self, stepper: Stepper, epoch: int, seconds: float) -> tuple[EpochReport, int]:
        """Losses and accuracies on all data, and the number of batches in an epoch."""
        task, model, device = self.task, stepper.model, self.device
        data = task.batches(self.batch_size, self.num_batches, self.seed)
        train_loss, train_accuracy, batches = measure(task, model, data, "load_batches", device)
        held_out: dict[str, float | None] = {}
        for part, load in (("validation", task.validation), ("test", task.test)):
            loss = accuracy = None
            if getattr(task, f"load_{part}") is not None:
                loss, accuracy, _ = measure(task, model, load(), f"load_{part}", device)
            held_out |= {f"{part}_loss": loss, f"{part}_accuracy": accuracy}
        report = EpochReport(
            epoch, train_loss, train_accuracy, **held_out, step=stepper.steps, seconds=seconds
        )
        return report, batches

    def _save(self, stepper: Stepper, report: EpochReport) -> EpochReport:
        if self.output is None:
            return report
        stem = self.output / f"epoch-{report.epoch:03d}"
        save_optimizer(stepper.optimizers, stem.with_suffix(".optimizer.pt"), self.optimizer)
        metadata: dict[str, Any] = {
            **asdict(report),
            "task": self.task.name,
            "likelihood": self.task.resolved_likelihood().name,
            "optimizer": self.optimizer,
            **asdict(resolved(self.optimizer, self)),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "versions": {
                "ngeval": version("ngeval"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        del metadata["seconds"]  # so that a seed gives the same files to the bit
        save_checkpoint(stepper.model, stem.with_suffix(".safetensors"), metadata)
        return report


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files of an earlier training in a folder, if it exists."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if CHECKPOINT_FILE.fullmatch(path.name)]
