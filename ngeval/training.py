"""Training a task from scratch, with a checkpoint for every epoch."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.checkpoints import save_checkpoint, save_optimizer
from ngeval.checks import Inputs, check_device
from ngeval.errors import InputError, ModelError, OutputError, TaskError
from ngeval.functional import map_inputs, model_errors, outputs_of
from ngeval.likelihoods import CategoricalDistribution, OutputDistribution
from ngeval.methods.optimizer import optimizer_entry
from ngeval.results import check_folder
from ngeval.tasks import Batch, Task


@dataclass(frozen=True)
class EpochReport:
    """What a checkpoint's JSON says of losses (mean ℓ_n, nats) and accuracies (fractions)."""

    epoch: int
    train_loss: float
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None


@dataclass(frozen=True)
class Training:
    """A training run: minimise the mean loss of a task.

    Attributes:
        task: the model, data and likelihood.
        output: folder for ``epoch-000.safetensors``, ``epoch-000.json``,
            ``epoch-000.optimizer.pt``, ….
        optimizer: a name in `ngeval.methods.optimizer.OPTIMIZERS`, or the dotted path of an
            Optimizer class.
        epochs: passes over the training data; 0 writes the initial weights alone.
        learning_rate: None takes the optimizer's default.
        batch_size: samples in a step.
        num_batches: steps in an epoch; None is one pass over the data.
        seed: for the initial weights and the order of samples.
        device: where to compute.
        force: replace the checkpoints of an earlier run in that folder.
    """

    task: Task
    output: Path
    optimizer: str = "adamw"
    epochs: int = 10
    learning_rate: float | None = None
    batch_size: int = 64
    num_batches: int | None = None
    seed: int = 0
    device: str = "cpu"
    force: bool = False

    def run(self) -> Iterator[EpochReport]:
        """Train, yielding a report for each checkpoint as soon as it is written.

        Raises:
            InputError: unknown optimizer, or a setting out of range.
            OutputError: the folder holds checkpoints (without ``force``) or cannot be written.
            ModelError: the loss became NaN or infinite.
        """
        self._check()
        self._prepare_folder()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.task.model().to(self.device)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ModelError(f"task {self.task.name!r}: the model has no trainable parameter")
            optimizers = optimizer_entry(self.optimizer).build(model, self.learning_rate)
            report = self._measured(model, 0)
            self._remove_earlier()
            yield self._save(model, report, optimizers)
            for epoch in range(1, self.epochs + 1):
                self._train_epoch(model, optimizers, epoch)
                yield self._save(model, self._measured(model, epoch), optimizers)

    def _check(self) -> None:
        optimizer_entry(self.optimizer)  # an unknown name is an error before any work
        if self.epochs < 0 or self.batch_size < 1:
            raise InputError("epochs must be ≥ 0 and the batch size ≥ 1")
        if self.num_batches is not None and self.num_batches < 1:
            raise InputError("the number of batches must be at least 1")
        check_device(self.device)
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"the learning rate must be positive, not {self.learning_rate}")

    def _prepare_folder(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"output {self.output} is a file; give a folder")
        check_folder(self.output)
        earlier = self._earlier()
        if earlier and not self.force:
            raise OutputError(
                f"{self.output} holds checkpoints of an earlier run ({earlier[0].name}, …); pass "
                "--force to replace them"
            )

    def _earlier(self) -> list[Path]:
        """The files of an earlier run in the folder."""
        ours = re.compile(r"epoch-\d+\.(safetensors|json|optimizer\.pt)")
        return sorted(path for path in self.output.iterdir() if ours.fullmatch(path.name))

    def _remove_earlier(self) -> None:
        """Only once the new run has something to put in their place."""
        for path in self._earlier():
            path.unlink()

    def _train_epoch(self, model: nn.Module, optimizers: Sequence[Optimizer], epoch: int) -> None:
        model.train()
        # Another order of samples in every epoch, reproducible from the seed.
        seed = self.seed * 100_003 + epoch
        for batch in self.task.batches(self.batch_size, self.num_batches, seed):
            outputs, distribution = self._forward(model, batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            # dL/dz is the residual: the likelihood is the one source of truth for the loss.
            mean_residual = distribution.residual() / len(outputs)
            outputs.backward(mean_residual.to(outputs.dtype))
            for optimizer in optimizers:
                optimizer.step()

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, OutputDistribution]:
        inputs, targets = batch
        inputs = map_inputs(inputs, lambda t: t.to(self.device))
        with model_errors():
            outputs = outputs_of(call_model(model, inputs), self.task.output)
        if not bool(torch.isfinite(outputs).all()):
            raise ModelError(
                "training diverged: the model's outputs are NaN or infinite; lower the learning "
                "rate"
            )
        likelihood = self.task.resolved_likelihood()
        return outputs, likelihood.bind(outputs, targets.to(self.device))

    def _measured(self, model: nn.Module, epoch: int) -> EpochReport:
        """Losses and accuracies over one pass of the training and the validation data."""
        model.eval()
        train = self.task.batches(self.batch_size, self.num_batches, self.seed)
        train_loss, train_accuracy = self._measure(model, train)
        validation_loss = validation_accuracy = None
        if self.task.load_validation is not None:
            validation_loss, validation_accuracy = self._measure(model, self.task.validation())
        return EpochReport(epoch, train_loss, train_accuracy, validation_loss, validation_accuracy)

    def _save(
        self, model: nn.Module, report: EpochReport, optimizers: Sequence[Optimizer]
    ) -> EpochReport:
        stem = self.output / f"epoch-{report.epoch:03d}"
        save_optimizer(optimizers, stem.with_suffix(".optimizer.pt"), self.optimizer)
        save_checkpoint(
            model, stem.with_suffix(".safetensors"), vars(report) | self._settings(optimizers)
        )
        return report

    def _settings(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "likelihood": self.task.resolved_likelihood().name,
            "optimizer": self.optimizer,
            "learning_rate": _learning_rate(optimizers),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "versions": {
                "ngeval": version("ngeval"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _measure(self, model: nn.Module, batches: Iterator[Batch]) -> tuple[float, float | None]:
        """Mean loss in nats, and the accuracy where targets are classes."""
        total = right = samples = positions = 0.0
        for batch in batches:
            with torch.no_grad():
                _, distribution = self._forward(model, batch)
            total += float(distribution.loss().sum())
            samples += len(distribution.logits)
            if isinstance(distribution, CategoricalDistribution):
                mask = distribution.mask.squeeze(-1)
                hits = distribution.logits.argmax(-1) == distribution.targets
                right += float((hits & mask).sum())
                positions += float(mask.sum())
        if not samples:
            raise TaskError(f"task {self.task.name!r}: load_validation gave no batch")
        return total / samples, right / positions if positions else None


def _learning_rate(optimizers: Sequence[Optimizer]) -> float | None:
    """Of the first parameter group; None for an optimizer without one."""
    rate = optimizers[0].param_groups[0].get("lr")
    return None if rate is None else float(rate)


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call a module with a tensor, a tuple (positional) or a dict (by keyword)."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
