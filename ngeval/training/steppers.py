"""How optimizers take a step on a batch: along a gradient, or exactly on a problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ngeval.errors import ModelError, NgevalError, NumericalError
from ngeval.problem.problem import Problem
from ngeval.tasks import Batch, Task
from ngeval.training.measure import DivergedError, forward, to_device
from ngeval.training.optimizers import SCHEDULES, Settings, build, is_exact
from ngeval.utils.memory import is_out_of_memory


class Stepper:
    """A model with an optimizer, which takes steps on batches and counts them.

    A step goes along the gradient of the mean loss, with the model in train mode; or it is exact on
    the batch, with the model in eval mode, where alone a sample's outputs are a function of the
    weights. The optimizer's name may stand for two of torch's; see `build`.
    """

    def __init__(
        self, name: str, task: Task, model: nn.Module, settings: Settings, seed: int, device: str
    ) -> None:
        self.task, self.model, self.device = task, model, device
        self.optimizers = build(name, model, settings, seed)
        self.is_exact = is_exact(name)
        self.max_norm = settings.max_norm
        self.schedulers: list[LambdaLR] = []
        self.steps = 0
        self._problem: Problem | None = None

    def schedule(self, name: str, steps: int) -> None:
        """Let the learning rates follow a schedule over a number of steps."""
        if name == "constant" or steps == 0:
            return
        factor = SCHEDULES[name]
        self.schedulers = [
            LambdaLR(optimizer, lambda step: factor(min(step / steps, 1.0)))
            for optimizer in self.optimizers
        ]

    def step(self, batch: Batch) -> None:
        """Take a step on a batch; one that is not finite is a `DivergedError`."""
        (self._exact_step if self.is_exact else self._gradient_step)(batch)
        self.steps += 1
        for scheduler in self.schedulers:
            scheduler.step()

    def ready(self) -> None:
        """Set the mode in which the model is trained, before the steps of an epoch."""
        self.model.train(not self.is_exact)

    def _gradient_step(self, batch: Batch) -> None:
        outputs, distribution = forward(self.task, self.model, batch, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        # dL/dz is the residual: the likelihood is the one source of truth for the loss.
        mean_residual = distribution.residual() / len(outputs)
        outputs.backward(mean_residual.to(outputs.dtype))
        if self.max_norm is not None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trainable, self.max_norm)
        for optimizer in self.optimizers:
            with step_errors(optimizer):
                optimizer.step()

    def _exact_step(self, batch: Batch) -> None:
        inputs, targets = to_device(batch, self.device)
        try:
            if self._problem is None:  # the first problem chooses and checks an engine
                likelihood, output = self.task.resolved_likelihood(), self.task.output
                self._problem = Problem(self.model, inputs, targets, likelihood, output=output)
            else:
                self._problem = self._problem.with_batch(inputs, targets)
            with step_errors(self.optimizers[0]):
                # Exact optimizers take a problem where `Optimizer.step` takes a closure.
                self.optimizers[0].step(self._problem)  # type: ignore[call-overload]
        except NumericalError as error:
            raise DivergedError(f"training diverged: {error}") from error
        except ModelError:
            with torch.no_grad():  # raises a DivergedError if the outputs are not finite
                forward(self.task, self.model, batch, self.device)
            raise


def eval_mode_note(name: str, model: nn.Module) -> str | None:
    """How training in eval mode differs from train mode, for an exact optimizer on such a model."""
    parts = []
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        parts.append("without its dropout")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        parts.append("with batch norm on its running statistics, which stay as they are")
    if not is_exact(name) or not parts:
        return None
    return f"{name}: the model trains in eval mode, {' and '.join(parts)}"


@contextmanager
def step_errors(optimizer: Optimizer) -> Iterator[None]:
    """Turn any error of a step, but for out of memory, into a `DivergedError` or `ModelError`."""
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:  # an optimizer of another package can raise anything
        if is_out_of_memory(error):
            raise
        what = f"{type(optimizer).__name__}'s step failed: {type(error).__name__}: {error}"
        if isinstance(error, OverflowError) or "overflow" in str(error):
            raise DivergedError(f"training diverged: {what}; lower the learning rate") from error
        raise ModelError(what) from error
