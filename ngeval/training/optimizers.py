"""Optimizers by name for training, built with their settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ngeval.errors import InputError, check_choice, foreign_errors, nearest_name
from ngeval.fadam.state_checks import Range, number_in
from ngeval.methods.optimizer.build import build_optimizers, built, trainable_parameters
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


RANGES = {
    "learning_rate": Range(lambda x: 0 < x < math.inf, "positive"),
    "damping": Range(lambda x: 0 <= x < math.inf, "≥ 0 and finite"),
    "momentum": Range(lambda x: 0 <= x < 1, "in [0, 1)"),
    "weight_decay": Range(lambda x: 0 <= x < math.inf, "≥ 0 and finite"),
    "max_norm": Range(lambda x: 0 < x < math.inf, "positive"),
}


@dataclass(frozen=True, kw_only=True)
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

    def check_ranges(self) -> None:
        """Check that every setting is in its range."""
        for name, numbers in RANGES.items():
            if (value := getattr(self, name)) is not None:
                number_in(value, f"the {name.replace('_', ' ')}", numbers)
        check_choice("schedule", self.schedule, SCHEDULES)


def is_exact(name: str) -> bool:
    """Whether a name is that of an exact optimizer: ef, ief, sf, sf:4, ng."""
    return name.partition(":")[0] in EXACT


def resolved(name: str, settings: Settings) -> Settings:
    """The settings with the optimizer's defaults in place of None; each is checked."""
    settings.check_ranges()
    group = build(name, _smallest(), settings)[0].param_groups[0]
    if settings.schedule != "constant" and "lr" not in group:
        raise InputError(f"{name} has no learning rate that a {settings.schedule} schedule sets")
    keys = {"learning_rate": "lr"} | {key: key for key in ("damping", "momentum", "weight_decay")}
    numbers = {name: float(group[key]) for name, key in keys.items() if group.get(key) is not None}
    return Settings(**numbers, max_norm=settings.max_norm, schedule=settings.schedule)


def _smallest() -> nn.Module:
    """A model on which every optimizer can be built, including those of matrices alone."""
    # Not initialised, because that would draw from the caller's random numbers.
    model: nn.Module = nn.utils.skip_init(nn.Linear, 2, 2, bias=False)
    return model


def build(name: str, model: nn.Module, settings: Settings, seed: int = 0) -> list[Optimizer]:
    """Optimizers on a model's trainable parameters, whose groups know the parameters' names.

    The name is a key of `EXACT`, one in `ngeval.methods.optimizer.catalogue.OPTIMIZERS`, or the
    dotted path of a class; the seed is for the labels that ``sf`` draws.

    Raises:
        InputError: the optimizer is unknown, cannot be stepped on a gradient alone, or does not
            have one of the settings.
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
    """Take a step on the smallest model, to fail before training if a gradient is not enough."""
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
            with foreign_errors(
                InputError,
                f"optimizer {path!r} cannot be stepped on a dense gradient alone",
                "; train with one that needs neither a closure nor sparse gradients",
            ):
                optimizer.step()


def _exact(name: str, model: nn.Module, settings: Settings, seed: int) -> Optimizer:
    family, _, draws = name.partition(":")
    optimizer_class, rate = EXACT[family]
    options: dict[str, Any] = {name: getattr(settings, name) for name in RANGES}
    options["lr"] = options.pop("learning_rate") or rate
    if family == "sf":
        options["seed"] = seed
    if draws:
        if family != "sf" or not draws.isdecimal() or not 1 <= int(draws) <= MAX_DRAWS:
            raise InputError(
                f"optimizer {name!r}: only sf takes a number after a colon, the number of its "
                "sampled labels, as sf:4"
            )
        options["mc_samples"] = int(draws)
    return built(optimizer_class, trainable_parameters(model), **options)
