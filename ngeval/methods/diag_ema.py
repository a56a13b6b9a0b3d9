"""``diag-ema``: the diagonal of squared gradients that an optimizer accumulated over training.

The second moment v̂ in the state of Adam and its variants is an average of ḡ², the squared gradient
of the training loss, over past batches; FAdam interprets it as the Fisher's diagonal (Hwang, arXiv
2405.12807, §3.4.1). A comparison with ``diag-ef`` shows the effect of the average over the past,
and of the square of a sum in place of a sum of squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.checkpoints import read_optimizer
from ngeval.curvature.kernel import Kernel
from ngeval.errors import CheckpointError, InputError
from ngeval.methods.diag import DiagonalState, parse_exponent
from ngeval.methods.optimizer.build import build_optimizers
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.methods.optimizer.gradients import loss_terms
from ngeval.methods.optimizer.load_state import load_optimizer_state
from ngeval.methods.optimizer.step import as_optimizers
from ngeval.methods.stage import Stage, check_reduction
from ngeval.problem.problem import Problem
from ngeval.utils.text import listed

MOMENTS: dict[tuple[str, str], tuple[str, ...]] = {
    **{("torch", kind): ("exp_avg_sq",) for kind in ("Adam", "AdamW", "NAdam", "RAdam")},
    ("torch", "RMSprop"): ("square_avg",),
    ("torch", "Adadelta"): ("square_avg",),
    ("torch", "Adagrad"): ("sum",),
    ("torch", "Adafactor"): ("row_var", "variance"),
    ("ngeval", "FAdam"): ("fisher",),
    ("pytorch_optimizer", "FAdam"): ("fim",),
}
"""Entries of the state that hold the second moment, by the package and name of the class.

Other classes have something else under the same names: SOAP's ``exp_avg_sq`` is in a rotated
basis, Prodigy's is scaled, Adan's is of differences of gradients.
"""

KINDS = ("adamw", "adam", "nadam", "radam", "rmsprop", "adadelta", "adagrad", "adafactor", "fadam")
"""Optimizers with a second moment, in the order in which a file without a name is tried."""


@dataclass(frozen=True, eq=False)
class AccumulatedDiagonal:
    """d(λ) = g / (v̂ + λ)^ρ with the second moment v̂ in an optimizer's state.

    v̂ is converted to the units of the sum-reduced loss: a state accumulated with the mean over N
    samples is multiplied by N² (of the problem's batch), one with the mean over tokens by their
    number squared. See `second_moment` for the supported classes.

    Attributes:
        optimizer: built on the problem's model, with its state; or several.
        exponent: ρ; ½ is the root in Adam and FAdam.
        reduction: of the training loss: ``"mean"``, ``"token-mean"`` or ``"sum"``.
        name: in tables.

    Raises:
        InputError: the optimizer is not one, or there is no such reduction.
    """

    optimizer: Optimizer | Sequence[Optimizer]
    exponent: float = 0.5
    reduction: str = "mean"
    name: str = "diag-ema"

    def __post_init__(self) -> None:
        as_optimizers(self.optimizer)
        check_reduction(self.reduction)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> DiagonalState:
        """Read v̂ from the state; an `InputError` names parameters that have none."""
        names = {id(p): name for name, p in problem.function.model.named_parameters()}
        optimizers = as_optimizers(self.optimizer)
        moments: dict[str, Tensor] = {}
        lacking: dict[str, str] = {}
        for optimizer, group in ((o, group) for o in optimizers for group in o.param_groups):
            for parameter in group["params"]:
                state, name = optimizer.state.get(parameter, {}), names.get(id(parameter), "")
                moment = second_moment(optimizer, state, group)
                if moment is not None:
                    moments[name] = moment.detach().to(torch.float64)
                else:
                    lacking[name] = listed([str(key) for key in state]) or "nothing"
        parameters = problem.function.parameters
        missing = [
            f"{n} (state: {lacking.get(n, 'not held')})" for n in parameters if n not in moments
        ]
        if missing:
            classes = ", ".join(dict.fromkeys(kind for _, kind in MOMENTS))
            unread = sorted({type(each).__name__ for each in optimizers if not _entries(each)})
            whose = f" of {listed(unread)}, which is not read" if unread else ""
            raise InputError(
                f"{self.name}: no second moment in the optimizer's state{whose}, for "
                f"{listed(missing)}; {classes} have one once they have stepped; diag-ef:0.5 is "
                "the diagonal of the batch itself"
            )
        diagonal = torch.cat([moments[name].reshape(-1) for name in parameters]).to(problem.device)
        terms = loss_terms(problem.distribution, self.reduction)
        return DiagonalState(problem, diagonal * terms**2, self.exponent)


def second_moment(
    optimizer: Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor | None:
    """The average of squared gradients in a parameter's state; None if there is none.

    Supported are the classes in `MOMENTS` and their subclasses. An average that starts from zero is
    divided by 1 − βᵗ (Adam's ``exp_avg_sq``, whose β is the second of ``betas``; RMSprop's and
    Adadelta's ``square_avg``). Adagrad's ``sum`` has its initial value subtracted and is divided by
    the number of steps t. FAdam's ``fisher`` is unbiased unless ``debiased_fisher=False``, and so
    are pytorch_optimizer's ``fim`` and Adafactor's average, which is the product of its rows and
    columns.
    """
    entry = next((entry for entry in _entries(optimizer) if entry in state), None)
    steps = float(state.get("step", group.get("step", math.nan)))
    if entry is None:
        return None
    moment: Tensor = state[entry]
    if entry == "exp_avg_sq" or not group.get("debiased_fisher", True):
        moment = moment / (1.0 - float(group["betas"][1]) ** steps)
    elif entry == "square_avg":
        decay = group["alpha"] if "alpha" in group else group["rho"]
        moment = moment / (1.0 - float(decay) ** steps)
    elif entry == "sum":
        initial = torch.full_like(moment, group.get("initial_accumulator_value", 0.0))
        moment = (moment - initial) / steps
    elif entry == "row_var":
        moment = moment @ state["col_var"] / moment.mean(dim=-2, keepdim=True)
    return moment if bool(torch.isfinite(moment).all()) else None


def _entries(optimizer: Optimizer) -> tuple[str, ...]:
    """The entries that can hold the second moment of an optimizer; empty if none is known."""
    classes = [(k.__module__.partition(".")[0], k.__name__) for k in type(optimizer).__mro__]
    return next((MOMENTS[each] for each in classes if each in MOMENTS), ())


@dataclass(frozen=True)
class NamedAccumulated:
    """``diag-ema`` and ``diag-ema:ρ`` on the command line: v̂ from a checkpoint's saved state."""

    name: str
    exponent: float = 0.5
    stage: Stage | None = None
    """The checkpoint; None until it is known."""

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> NamedAccumulated:
        """Build the method from its full name and the text after the colon, ρ."""
        return cls(name, parse_exponent(name, parameter or "0.5"))

    def at(self, stage: Stage) -> NamedAccumulated:
        """The method at a checkpoint, which must have an optimizer's state."""
        stage.check_state(self.name, "diag-ef:0.5, whose diagonal is that of the batch")
        return replace(self, stage=stage)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> DiagonalState:
        """Read v̂ from the checkpoint's file, which must fit one of the optimizers with a v̂."""
        if self.stage is None or self.stage.optimizer_state is None:
            raise InputError(
                f"{self.name} needs a checkpoint with its run (ngeval's commands have one); in "
                "Python give your optimizer to ngeval.AccumulatedDiagonal"
            )
        model, path = problem.function.model, self.stage.optimizer_state
        optimizers = self._loaded(model, path, self.stage)
        reduction = self.stage.options.reduction
        method = AccumulatedDiagonal(optimizers, self.exponent, reduction, self.name)
        return method.prepare(problem, kernel, seed)

    def _loaded(self, model: nn.Module, path: Path, stage: Stage) -> list[Optimizer]:
        """The saved optimizer: that of the recorded name, else the first that the state fits."""
        pickled = stage.options.allow_pickle
        saved = read_optimizer(path, allow_pickle=pickled)
        recorded = saved.name or stage.optimizer or ""
        known = recorded in OPTIMIZERS or "." in recorded
        if not known:
            _check_entries(self.name, path, saved.states)
        reasons = []
        for kind in (recorded,) if known else KINDS:
            optimizers = build_optimizers(kind, model)
            try:
                load_optimizer_state(optimizers, model, path, pickled, kind)
            except CheckpointError as error:
                if known:
                    raise
                reasons.append(str(error))
            else:
                return optimizers
        raise CheckpointError(
            f"{self.name}: the state in {path} fits none of {', '.join(KINDS)}; {reasons[0]}"
        )


def _check_entries(label: str, path: Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Check that a file has an entry with the name of a second moment."""
    present = {
        str(key)
        for state in states
        for entries in state["state"].values()
        if isinstance(entries, Mapping)
        for key in entries
    }
    known = list(dict.fromkeys(chain(*MOMENTS.values())))
    if present.isdisjoint(known):
        raise CheckpointError(
            f"{label}: {path} holds no second moment that is known "
            f"({listed(known)}), but {listed(sorted(present)) or 'nothing'}; "
            "grade diag-ef:0.5, whose diagonal is that of the batch"
        )
