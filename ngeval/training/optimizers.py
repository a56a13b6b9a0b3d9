"""Optimizers by name for training, built with their settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ngeval.errors import InputError, ModelError, nearest_name
from ngeval.methods.optimizer.build import build_optimizers
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.optim import EF, NG, SF, iEF

EXACT: dict[str, tuple[type[Optimizer], float]] = {
    "ef": (EF, 0.03),
    "ief": (iEF, 0.3),
    "sf": (SF, 0.1),
    "ng": (NG, 0.1),
}
"""The optimizers that are exact on every batch, with their default learning rates.

To first order, a step of EF lowers each sample's loss by the rate (in nats), and a step of iEF by
the rate times s_n; the full natural gradient step (``sf``, ``ng``) has rate 1."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}
"""The factor of the learning rate as a function of the fraction of the steps so far."""

MAX_DRAWS = 10_000
"""More sampled labels are taken for a typing error."""


@dataclass(frozen=True)
class Settings:
    """The settings of an optimizer; None is the optimizer's default.

    Attributes:
        learning_rate: for the mean loss; see `EXACT` for the exact optimizers.
        damping: λ, absolute, added to the sum-reduced curvature; of ef, ief, sf and ng alone.
        momentum: of the optimizers that have one.
        weight_decay: decoupled for the exact optimizers; for the others as their classes do it.
        max_norm: the largest norm over all parameters of an exact optimizer's update (before
            momentum and the learning rate), or of the mean gradient for the others; anything
            longer is scaled down.
        schedule: of the learning rate, step by step: constant, or linear or cosine decay to 0.
    """

    learning_rate: float | None = None
    damping: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    max_norm: float | None = None
    schedule: str = "constant"

    def check(self) -> None:
        """Check that every setting is in its range.

        Raises:
            InputError: a setting is not.
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
    name: str, value: float | None, allowed: str, *, zero: bool, below: float = math.inf
) -> None:
    if value is not None and not ((value >= 0 if zero else value > 0) and value < below):
        raise InputError(f"the {name} must be {allowed}, not {value}")


def is_exact(name: str) -> bool:
    """Whether a name is that of an exact optimizer: ef, ief, sf, sf:4, ng."""
    return name.partition(":")[0] in EXACT


def resolved(name: str, settings: Settings) -> Settings:
    """The settings with the optimizer's defaults in place of None.

    Raises:
        InputError: the optimizer is unknown, or a setting is out of range or not one of its own.
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
    """A model on which every optimizer can be built, including those of matrices alone."""
    # Not initialised, because that would draw from the caller's random numbers.
    model: nn.Module = nn.utils.skip_init(nn.Linear, 2, 2, bias=False)
    return model


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def build(name: str, model: nn.Module, settings: Settings, seed: int = 0) -> list[Optimizer]:
    """Optimizers on a model's trainable parameters, whose groups know the parameters' names.

    Args:
        name: a key of `EXACT`, a name in `ngeval.methods.optimizer.catalogue.OPTIMIZERS`, or the
            dotted path of a class.
        model: the model.
        settings: the settings of the optimizer.
        seed: for the labels that ``sf`` draws.

    Raises:
        InputError: the optimizer is unknown, cannot be stepped on a gradient alone, or does not
            have one of the settings.
        ModelError: no parameter is trainable.
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
    """Take a step with a class on the smallest model, to fail before any training.

    Raises:
        InputError: the class is an exact optimizer, or cannot be stepped on a dense gradient alone.
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
            warnings.simplefilter("ignore")  # the optimizer repeats its warnings in training
            for parameter in model.parameters():
                nn.init.eye_(parameter)
                parameter.grad = torch.ones_like(parameter)
            try:
                optimizer.step()
            except Exception as error:  # a class of another package can raise anything
                raise InputError(
                    f"optimizer {path!r} cannot be stepped on a dense gradient alone: "
                    f"{type(error).__name__}: {error}; train with one that needs neither "
                    "a closure nor sparse gradients"
                ) from error


def _exact(name: str, model: nn.Module, settings: Settings, seed: int) -> Optimizer:
    family, _, draws = name.partition(":")
    optimizer_class, rate = EXACT[family]
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
                f"optimizer {name!r}: only sf takes a number after a colon, the number of its "
                "sampled labels, as sf:4"
            )
        options["mc_samples"] = int(draws)
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ModelError("the model has no trainable parameter for an optimizer")
    rate = rate if settings.learning_rate is None else settings.learning_rate
    # The classes share these arguments, which their base class Optimizer does not have.
    optimizer = optimizer_class(list(named.values()), lr=rate, **options)  # type: ignore[call-arg]
    optimizer.param_groups[0]["param_names"] = list(named)
    return optimizer
