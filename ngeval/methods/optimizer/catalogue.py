"""Optimizers by name: those of torch, and any other by the path of its class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ngeval.errors import DependencyError, InputError, ModelError, nearest_name

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class OptimizerEntry:
    """One line of the table of optimizers.

    Attributes:
        make: builds the optimizers on parameters by name, with a learning rate; None takes the
            class's own.
        learning_rate: what is taken where none is given, for the mean loss; None is the class's
            own.
        description: the update, in one line.
    """

    make: Callable[[Named, float | None], list[Optimizer]]
    learning_rate: float | None
    description: str

    def build(self, model: nn.Module, learning_rate: float | None = None) -> list[Optimizer]:
        """Optimizers on a model's trainable parameters, whose groups know the parameters' names.

        Raises:
            ModelError: nothing is trainable.
            InputError: the optimizer cannot be built on these parameters.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ModelError("the model has no trainable parameter for an optimizer")
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.make(named, rate)


def _built(make: Callable[..., Optimizer], named: Named, **options: Any) -> Optimizer:
    """An optimizer that knows its parameters' names, whether or not its class takes them."""
    options = {name: value for name, value in options.items() if value is not None}
    optimizer = make(list(named.values()), **options)
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer


def _of(make: Callable[..., Optimizer], rate: float, description: str, **options: Any) -> Any:
    return OptimizerEntry(
        lambda named, lr: [_built(make, named, lr=lr, **options)], rate, description
    )


def _muon(named: Named, rate: float | None) -> list[Optimizer]:
    """Muon for matrices and AdamW for the rest, at one learning rate for both."""
    matrices = {name: p for name, p in named.items() if p.ndim == 2}
    rest = {name: p for name, p in named.items() if p.ndim != 2}
    if not matrices:
        raise InputError("muon: the model has no trainable matrix, which alone it is made for")
    found: list[Optimizer] = [
        # With this scale an AdamW's learning rate serves both.
        _built(torch.optim.Muon, matrices, lr=rate, adjust_lr_fn="match_rms_adamw")
    ]
    return [*found, _built(torch.optim.AdamW, rest, lr=rate)] if rest else found


def _fadam(named: Named, rate: float | None) -> list[Optimizer]:
    """FAdam, imported only now: `ngeval.optim` is made of methods, as this module is of theirs."""
    return [_built(importlib.import_module("ngeval.fadam.optimizer").FAdam, named, lr=rate)]


_O = torch.optim
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": _of(_O.SGD, 0.1, "ḡ"),
    "momentum": _of(_O.SGD, 0.05, "m, with m ← 0.9 m + ḡ", momentum=0.9),
    "nesterov": _of(_O.SGD, 0.05, "ḡ + 0.9 m", momentum=0.9, nesterov=True),
    "adam": _of(_O.Adam, 1e-3, "m̂ / (√v̂ + ε)"),
    "adamw": _of(_O.AdamW, 1e-3, "m̂ / (√v̂ + ε), decoupled weight decay"),
    "nadam": _of(_O.NAdam, 2e-3, "as adam, with Nesterov's momentum"),
    "radam": _of(_O.RAdam, 1e-3, "as adam, its second moment trusted by degrees"),
    "adamax": _of(_O.Adamax, 2e-3, "m̂ / max of past |ḡ|"),
    "adagrad": _of(_O.Adagrad, 1e-2, "ḡ / (√Σ ḡ² + ε)"),
    "adadelta": _of(_O.Adadelta, 1.0, "ḡ √(EMA of steps²) / √(EMA of ḡ²)"),
    "rmsprop": _of(_O.RMSprop, 1e-3, "ḡ / (√v + ε)"),
    "rprop": _of(_O.Rprop, 1e-3, "sign ḡ, with step sizes of their own"),
    "asgd": _of(_O.ASGD, 0.1, "ḡ, with averaged weights"),
    "adafactor": _of(_O.Adafactor, 1e-2, "ḡ / √(rank-one v̂), clipped"),
    "fadam": OptimizerEntry(_fadam, 1e-3, "EMA of ḡ / (√v̂ + ε), clipped; its weight decay over √v̂"),
    "muon": OptimizerEntry(_muon, 1e-3, "matrices: m orthogonalised; the rest: adamw"),
}
"""Optimizers by name; ḡ the gradient of the training loss, m and v its running moments."""


def optimizer_entry(name: str) -> OptimizerEntry:
    """An optimizer by its name, or by the dotted path of its class, e.g. ``torch.optim.SGD``.

    Raises:
        InputError: no such optimizer, or the path names something else.
        DependencyError: the package is not installed.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." not in name:
        raise InputError(
            f"unknown optimizer {name!r}; {nearest_name(name, OPTIMIZERS)}; or the dotted path of "
            "an Optimizer class, as pytorch_optimizer.SOAP"
        )
    return _third_party(name)


def _third_party(path: str) -> OptimizerEntry:
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise DependencyError(
            f"optimizer {path!r}: {missing} is not installed; pip install "
            f"{missing.split('.')[0]} (or, where it differs, the package that has this module)"
        ) from error
    except Exception as error:  # a package may raise anything while it is imported
        raise InputError(
            f"optimizer {path!r}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        what = "is no class of a torch.optim.Optimizer" if found else f"is not in {module_name}"
        raise InputError(f"optimizer {path!r}: {class_name} {what}")
    known = inspect.signature(found).parameters
    rate = known["lr"].default if "lr" in known else None
    if rate is inspect.Parameter.empty:
        rate = 1e-3
    elif not isinstance(rate, int | float):
        rate = None  # the class has its own way, as Adafactor's relative steps

    def make(named: Named, lr: float | None) -> list[Optimizer]:
        try:
            return [_built(found, named, lr=lr)]
        except Exception as error:  # whatever its class raises
            raise InputError(
                f"optimizer {path!r} cannot be built on parameters and a learning rate alone: "
                f"{type(error).__name__}: {error}; in Python, build it yourself and give it to "
                "ngeval.OptimizerStep"
            ) from error

    return OptimizerEntry(make, rate, f"the step of {path}")
