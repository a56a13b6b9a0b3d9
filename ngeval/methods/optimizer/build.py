"""Optimizers built by name, or by the path of their class, on a model's trainable parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ngeval.errors import DependencyError, InputError, ModelError, foreign_errors, nearest_name
from ngeval.fadam.optimizer import FAdam
from ngeval.methods.optimizer.catalogue import OPTIMIZERS

DEFAULT_RATE = 1e-3
"""The learning rate of a class that has no default."""

Named = Mapping[str, nn.Parameter]


def build_optimizers(
    name: str, model: nn.Module, learning_rate: float | None = None
) -> list[Optimizer]:
    """Build what a name stands for: one optimizer, or two that share the parameters.

    The parameter groups record the parameters' names. The learning rate is for the mean loss; None
    takes the default of the table or of the class.

    Raises:
        InputError: there is no such optimizer, or it cannot be built on these parameters.
        DependencyError: its package is not installed.
        ModelError: no parameter is trainable.
    """
    kind = optimizer_class(name)
    named = trainable_parameters(model)
    if name not in OPTIMIZERS:
        return [_third_party(name, kind, named, learning_rate)]
    entry = OPTIMIZERS[name]
    rate = entry.learning_rate if learning_rate is None else learning_rate
    if name == "muon":
        return _muon_and_adamw(named, rate)
    return [built(kind, named, lr=rate, **entry.options)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer holds, by name; a `ModelError` if there are none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ModelError("the model has no trainable parameter for an optimizer")
    return named


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of an optimizer by its name or dotted path, e.g. ``torch.optim.SGD``."""
    if name == "fadam":
        return FAdam
    if name in OPTIMIZERS:
        kind: type[Optimizer] = getattr(torch.optim, OPTIMIZERS[name].kind)
        return kind
    if "." not in name:
        raise InputError(
            f"unknown optimizer {name!r}; {nearest_name(name, OPTIMIZERS)}; or the dotted path of "
            "an Optimizer class, as pytorch_optimizer.SOAP"
        )
    module_name, _, class_name = name.rpartition(".")
    with foreign_errors(InputError, f"optimizer {name!r}: {module_name} cannot be imported"):
        try:
            named = getattr(importlib.import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            missing = error.name or module_name
            raise DependencyError(
                f"optimizer {name!r}: {missing} is not installed; pip install "
                f"{missing.split('.')[0]} (or, where it differs, the package that has this module)"
            ) from error
    if not (isinstance(named, type) and issubclass(named, Optimizer)):
        what = "is not a class of a torch.optim.Optimizer" if named else f"is not in {module_name}"
        raise InputError(f"optimizer {name!r}: {class_name} {what}")
    return named


def _third_party(
    path: str, kind: type[Optimizer], named: Named, learning_rate: float | None
) -> Optimizer:
    rate: Any = learning_rate
    known = inspect.signature(kind).parameters
    if rate is None and "lr" in known:
        rate = known["lr"].default
        if rate is inspect.Parameter.empty:
            rate = DEFAULT_RATE
        elif not isinstance(rate, int | float):
            rate = None  # the class computes its own, as Adafactor's relative steps
    failure = f"optimizer {path!r} cannot be built on parameters and a learning rate alone"
    advice = "; in Python, build it yourself and give it to ngeval.OptimizerStep"
    with foreign_errors(InputError, failure, advice):
        return built(kind, named, lr=rate)


def _muon_and_adamw(named: Named, rate: float) -> list[Optimizer]:
    """Muon for matrices and AdamW for the other parameters."""
    matrices = {name: p for name, p in named.items() if p.ndim == 2}
    others = {name: p for name, p in named.items() if p.ndim != 2}
    if not matrices:
        raise InputError("muon: the model has no trainable matrix, and Muon is for matrices only")
    optimizers: list[Optimizer] = [
        # With this scale the learning rate of an AdamW serves both.
        built(torch.optim.Muon, matrices, lr=rate, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        optimizers.append(built(torch.optim.AdamW, others, lr=rate))
    return optimizers


def built(kind: Callable[..., Optimizer], named: Named, **options: Any) -> Optimizer:
    """An optimizer whose groups record the parameters' names; None is a default."""
    options = {name: value for name, value in options.items() if value is not None}
    optimizer = kind(list(named.values()), **options)
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer
