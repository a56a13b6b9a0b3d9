"""Optimizers by name for training: how each is built, and how it takes a step on a batch."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ngeval.errors import InputError, ModelError, NgevalError, NumericalError, nearest_name
from ngeval.methods.optimizer.build import build_optimizers
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.optim import EF, NG, SF, iEF
from ngeval.problem.problem import Problem
from ngeval.tasks import Batch, Task
from ngeval.training.measure import DivergedError, forward, to_device
from ngeval.utils.memory import is_out_of_memory

EXACT: dict[str, tuple[type[Optimizer], float]] = {
    "ef": (EF, 0.03),
    "ief": (iEF, 0.3),
    "sf": (SF, 0.1),
    "ng": (NG, 0.1),
}
"""The methods under study, exact on every batch, with a learning rate where none is given.

To first order a step of EF lowers each sample's loss by the rate (in nats), of iEF by the rate
times s_n; the full natural gradient step (``sf``, ``ng``) has rate 1."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""What the learning rate is multiplied by, given the fraction of the steps that is done."""

MAX_DRAWS = 10_000
"""More sampled labels than this are a typing error."""


@dataclass(frozen=True)
class Settings:
    """An optimizer's settings; None takes the optimizer's own.

    Attributes:
        learning_rate: for the mean loss; of the exact ones see `EXACT`.
        damping: λ, absolute, added to the sum-reduced curvature; of ef, ief, sf and ng alone.
        momentum: of those that have one.
        weight_decay: decoupled in the exact ones, and as its class does it in the others.
        max_norm: the longest that, over all parameters, the update of an exact optimizer (before
            momentum and the learning rate) or the mean gradient that another is given may be;
            what is longer is scaled down.
        schedule: of the learning rate, step by step: constant, or linear or cosine decay to 0.
    """

    learning_rate: float | None = None
    damping: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    max_norm: float | None = None
    schedule: str = "constant"

    def check(self) -> None:
        """Raise unless every setting is in its range.

        Raises:
            InputError: it is not.
        """
        _check_range("learning rate", self.learning_rate, "positive", zero=False)
        _check_range("damping", self.damping, "≥ 0 and finite", zero=True)
        _check_range("momentum", self.momentum, "in [0, 1)", zero=True, below=1.0)
        _check_range("weight decay", self.weight_decay, "≥ 0 and finite", zero=True)
        _check_range("max norm", self.max_norm, "positive", zero=False)
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"unknown schedule {self.schedule!r}; {nearest_name(self.schedule, SCHEDULES)}"
            )


def _check_range(
    name: str, value: float | None, wanted: str, *, zero: bool, below: float = math.inf
) -> None:
    if value is not None and not ((value >= 0 if zero else value > 0) and value < below):
        raise InputError(f"the {name} must be {wanted}, not {value}")


def is_exact(name: str) -> bool:
    """Whether a name is one of the methods under study: ef, ief, sf, sf:4, ng."""
    return name.partition(":")[0] in EXACT


@cache
def takes(name: str, option: str) -> bool:
    """Whether an optimizer has a ``damping``, ``momentum`` or ``weight_decay``.

    Raises:
        InputError: no such optimizer.
    """
    built = build(name, _smallest(), Settings())
    return any(option in group for optimizer in built for group in optimizer.param_groups)


def resolved(name: str, settings: Settings) -> Settings:
    """The settings with the optimizer's own where none are given, found before any work.

    Raises:
        InputError: no such optimizer, a setting out of range, or one that the optimizer lacks.
        DependencyError: the optimizer's package is not installed.
    """
    settings.check()
    optimizers = build(name, _smallest(), settings)
    group = optimizers[0].param_groups[0]
    if settings.schedule != "constant" and "lr" not in group:
        raise InputError(f"{name} has no learning rate that a {settings.schedule} schedule sets")
    return replace(
        settings,
        learning_rate=_number(group.get("lr")),
        damping=_number(group.get("damping")),
        momentum=_number(group.get("momentum")),
        weight_decay=_number(group.get("weight_decay")),
    )


def _smallest() -> nn.Module:
    """A model that every optimizer can be tried on, also those of matrices alone."""
    # Without drawing numbers, which are the caller's.
    model: nn.Module = nn.utils.skip_init(nn.Linear, 2, 2, bias=False)
    return model


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def build(name: str, model: nn.Module, settings: Settings, seed: int = 0) -> list[Optimizer]:
    """Optimizers on a model's trainable parameters, whose groups know the parameters' names.

    Args:
        name: an exact one, a name in `ngeval.methods.optimizer.catalogue.OPTIMIZERS`, or the dotted
            path of a class.
        model: whose parameters they step.
        settings: the optimizer's.
        seed: for the labels that ``sf`` draws.

    Raises:
        InputError: no such optimizer, one that cannot be stepped on a gradient alone, or it lacks
            a setting that is given.
        ModelError: nothing is trainable.
    """
    if is_exact(name):
        return [_exact(name, model, settings, seed)]
    if name.partition(":")[0] not in OPTIMIZERS and "." not in name:
        raise InputError(
            f"unknown optimizer {name!r}; {nearest_name(name, [*OPTIMIZERS, *EXACT])}; or the "
            "dotted path of an Optimizer class, as pytorch_optimizer.SOAP"
        )
    if "." in name:
        _check_class(name)
    optimizers = build_optimizers(name, model, settings.learning_rate)
    if settings.damping is not None:
        raise InputError(
            f"{name} has no damping; it is an option of {', '.join(EXACT)} (leave --damping out)"
        )
    for option in ("momentum", "weight_decay"):
        value = getattr(settings, option)
        groups = [g for o in optimizers for g in o.param_groups if option in g]
        if value is not None and not groups:
            raise InputError(f"{name} has no {option.replace('_', ' ')}; leave it out")
        for group in groups if value is not None else ():
            group[option] = value
    return optimizers


@cache
def _check_class(path: str) -> None:
    """Try a step of a class on the smallest model, so that no search breaks off in its midst.

    Raises:
        InputError: it is one of the exact ones, or cannot be stepped on a dense gradient alone.
    """
    names = {family: name for name, (family, _) in EXACT.items()}
    model = _smallest()
    for optimizer in build_optimizers(path, model):
        exact = [names[family] for family in type(optimizer).__mro__ if family in names]
        if exact:
            raise InputError(
                f"optimizer {path!r} is stepped on a problem, not on a gradient; train with "
                f"{exact[0]!r}"
            )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own, which it repeats in training
            for parameter in model.parameters():
                nn.init.eye_(parameter)
                parameter.grad = torch.ones_like(parameter)
            try:
                optimizer.step()
            except Exception as error:  # whatever its class raises
                raise InputError(
                    f"optimizer {path!r} cannot be stepped on a dense gradient alone: "
                    f"{type(error).__name__}: {error}; train with one that needs no more "
                    "(no closure, no sparse gradient)"
                ) from error


@contextmanager
def step_errors(optimizer: Optimizer) -> Iterator[None]:
    """Turn whatever an optimizer's step raises into an error that says it was the step.

    Raises:
        DivergedError: a number left the range of its type.
        ModelError: something other than an ngeval or out-of-memory error was raised inside.
    """
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = f"{type(optimizer).__name__}'s step failed: {type(error).__name__}: {error}"
        if isinstance(error, OverflowError) or "overflow" in str(error):
            raise DivergedError(f"training diverged: {what}; lower the learning rate") from error
        raise ModelError(what) from error


def _exact(name: str, model: nn.Module, settings: Settings, seed: int) -> Optimizer:
    family, _, draws = name.partition(":")
    make, rate = EXACT[family]
    options: dict[str, Any] = {
        option: value
        for option in ("damping", "momentum", "weight_decay", "max_norm")
        if (value := getattr(settings, option)) is not None
    }
    if family == "sf":
        options["seed"] = seed
    if draws:
        if family != "sf" or not draws.isdecimal() or not 1 <= int(draws) <= MAX_DRAWS:
            raise InputError(
                f"optimizer {name!r}: only sf takes a number after a colon, that of its sampled "
                "labels, as sf:4"
            )
        options["mc_samples"] = int(draws)
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ModelError("the model has no trainable parameter for an optimizer")
    chosen = rate if settings.learning_rate is None else settings.learning_rate
    optimizer = make(list(named.values()), lr=chosen, **options)  # type: ignore[call-arg]
    optimizer.param_groups[0]["param_names"] = list(named)
    return optimizer


@dataclass
class Stepper(ABC):
    """A model with its optimizers: takes steps on batches.

    Attributes:
        task: whose likelihood it is.
        model: what is trained.
        optimizers: on its parameters.
        device: where it is.
        max_norm: see `Settings`.
        schedulers: of their learning rates.
        steps: taken so far.
    """

    task: Task
    model: nn.Module
    optimizers: list[Optimizer]
    device: str
    max_norm: float | None = None
    schedulers: list[LambdaLR] = field(default_factory=list)
    steps: int = 0

    def schedule(self, name: str, steps: int) -> None:
        """Let the learning rate follow a schedule over so many steps."""
        if name == "constant" or steps == 0:
            return
        factor = SCHEDULES[name]
        self.schedulers = [
            LambdaLR(optimizer, lambda step: factor(min(step / steps, 1.0)))
            for optimizer in self.optimizers
        ]

    def step(self, batch: Batch) -> None:
        """Take a step on a batch.

        Raises:
            DivergedError: outputs or update are not finite.
            ModelError: the model or the optimizer's step failed.
        """
        self.take(batch)
        self.steps += 1
        for scheduler in self.schedulers:
            scheduler.step()

    @abstractmethod
    def take(self, batch: Batch) -> None:
        """The step itself."""

    def ready(self) -> None:
        """Set the mode in which the model is trained, before an epoch's steps."""
        self.model.train()


class GradientStepper(Stepper):
    """Steps along what an optimizer makes of the mean loss's gradient, the model in train mode."""

    def take(self, batch: Batch) -> None:
        """One backward pass, and a step of each optimizer."""
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


class ExactStepper(Stepper):
    """Steps of the methods under study: exact on each batch, the model in eval mode."""

    _problem: Problem | None = None

    def ready(self) -> None:
        """Eval mode, in which alone a sample's outputs are a function of the weights."""
        self.model.eval()

    def take(self, batch: Batch) -> None:
        """One step on the batch's problem; the first one chooses the engine and checks it."""
        inputs, targets = to_device(batch[0], self.device), batch[1].to(self.device)
        try:
            if self._problem is None:
                likelihood, output = self.task.resolved_likelihood(), self.task.output
                self._problem = Problem(self.model, inputs, targets, likelihood, output=output)
            else:
                self._problem = self._problem.with_batch(inputs, targets)
            with step_errors(self.optimizers[0]):
                self.optimizers[0].step(self._problem)  # type: ignore[call-overload]
        except NumericalError as error:
            raise DivergedError(f"training diverged: {error}") from error
        except ModelError:
            with torch.no_grad():
                forward(self.task, self.model, batch, self.device)  # says that it diverged
            raise


def make_stepper(
    name: str, task: Task, model: nn.Module, settings: Settings, seed: int, device: str
) -> Stepper:
    """Put an optimizer by its name on a model."""
    optimizers = build(name, model, settings, seed)
    if is_exact(name):  # which clip their updates themselves
        return ExactStepper(task, model, optimizers, device)
    return GradientStepper(task, model, optimizers, device, settings.max_norm)


def eval_mode_note(names: Sequence[str], model: nn.Module) -> str | None:
    """What a reader must know of exact optimizers on a model whose modes differ, if they do."""
    exact = [name for name in names if is_exact(name)]
    parts = []
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        parts.append("without its dropout")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        parts.append("with batch norm on its running statistics, which stay as they are")
    if not exact or not parts:
        return None
    return f"{', '.join(exact)}: the model trains in eval mode, {' and '.join(parts)}"
