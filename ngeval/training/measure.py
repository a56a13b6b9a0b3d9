"""A task's model on its batches: outputs, losses and accuracies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ngeval.errors import InputError, ModelError, TaskError
from ngeval.likelihoods import Categorical, OutputDistribution
from ngeval.likelihoods.categorical import class_labels
from ngeval.model.autograd import model_errors
from ngeval.model.inputs import Inputs, call_arguments, map_tensors
from ngeval.model.outputs import reading_of
from ngeval.tasks import Batch, Task

MONITORS = ("loss", "accuracy")
"""The measures on the validation data by which a training can be judged."""


class DivergedError(ModelError):
    """The loss, the outputs or a step of a training are not finite."""


@dataclass(frozen=True)
class EpochReport:
    """A model after an epoch: mean losses in nats, and accuracies as fractions.

    Epoch 0 is the initial model. A number is None where the task has no such data, and an accuracy
    where the targets are not classes. ``seconds`` is the time of all steps so far, without the time
    of measuring.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    test_loss: float | None = None
    test_accuracy: float | None = None
    step: int = 0
    seconds: float = 0.0


def to_device(inputs: Any, device: str) -> Any:
    """Copy the inputs of a batch, or the batch, to a device."""
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call a module with the inputs of a batch."""
    args, kwargs = call_arguments(model, inputs)
    return model(*args, **kwargs)


def forward(
    task: Task, model: nn.Module, batch: Batch, device: str
) -> tuple[Tensor, OutputDistribution]:
    """The outputs z on a batch, which must be finite, and the likelihood bound to the targets."""
    inputs, targets = to_device(batch, device)
    reading = reading_of(task.resolved_likelihood(), task.output, targets)
    with model_errors():
        outputs = reading(call_model(model, inputs))
    if not bool(torch.isfinite(outputs).all()):
        raise DivergedError(
            "training diverged: the model's outputs are NaN or infinite; lower the learning rate"
        )
    return outputs, reading.bind(outputs, targets)


def measure(
    task: Task, model: nn.Module, batches: Iterator[Batch], source: str, device: str
) -> tuple[float, float | None, int]:
    """Mean loss in nats, accuracy where targets are classes, and number of batches, in eval mode.

    ``source`` is the name of the task's function that loads the batches, for messages.
    """
    model.eval()
    total = right = samples = positions = 0.0
    count = 0
    for batch in batches:
        with torch.no_grad():
            _, distribution = forward(task, model, batch, device)
        total += float(distribution.loss().sum())
        samples += len(distribution.logits)
        count += 1
        classes = class_labels(distribution)
        if classes is not None and distribution.mask is not None:
            mask = distribution.mask.squeeze(-1)
            hits = distribution.logits.argmax(-1) == classes
            right += float((hits & mask).sum())
            positions += float(mask.sum())
    if not samples:
        raise TaskError(f"task {task.name!r}: {source} gave no batch")
    if not math.isfinite(total):
        raise DivergedError(
            "training diverged: the loss is NaN or infinite; lower the learning rate"
        )
    return total / samples, right / positions if positions else None, count


def monitored_column(task: Task, monitor: str) -> str:
    """The field of a report that judges a training: ``train_loss`` without validation data."""
    if monitor not in MONITORS:
        raise InputError(f"monitor {monitor!r}: write one of {', '.join(MONITORS)}")
    if monitor == "accuracy" and not isinstance(task.resolved_likelihood(), Categorical):
        raise InputError(
            f"monitor 'accuracy': task {task.name!r} has no classes as targets (its likelihood is "
            f"{task.resolved_likelihood().name}); monitor the loss"
        )
    return f"validation_{monitor}" if task.load_validation is not None else "train_loss"


def monitored(report: EpochReport, column: str) -> float:
    """The value by which a report is judged, with a sign so that less is better; NaN if missing."""
    value = getattr(report, column)
    if value is None:
        return math.nan
    return -value if column.endswith("accuracy") else float(value)
