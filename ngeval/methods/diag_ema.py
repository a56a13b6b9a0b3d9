"""``diag-ema``: the diagonal of squared gradients that an optimizer accumulated over training.

The second moment v̂ in the state of Adam and its kin is an average of ḡ², the squared gradient of
the training loss, over past batches; FAdam takes it for the Fisher's diagonal (Hwang, arXiv
2405.12807, §3.4.1). Beside ``diag-ef`` it shows what the average over the past, and the square of a
sum in place of a sum of squares, do to an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
"""Classes whose second moment is read, by package and name, and where in the state it is.

Others keep something else under the same names: SOAP's ``exp_avg_sq`` is in a rotated basis,
Prodigy's is scaled, Adan's is of differences of gradients.
"""

KINDS = (
    *("adamw", "adam", "nadam", "radam", "rmsprop", "adadelta", "adagrad", "adafactor", "fadam"),
)
"""Optimizers with a second moment, as a file that does not say which it is of is tried."""


@dataclass(frozen=True, eq=False)
class AccumulatedDiagonal:
    """d(λ) = g / (v̂ + λ)^ρ with the second moment v̂ in an optimizer's state.

    v̂ is brought to the units of the sum-reduced loss: a state accumulated with the mean over N
    samples is multiplied by N² (of the problem's batch), one with the mean over tokens by their
    number squared. See `second_moment` for what is read.

    Attributes:
        optimizer: built on the problem's model, with its state; or several.
        exponent: ρ; ½ is the root in Adam and FAdam.
        reduction: how the training loss was reduced: ``"mean"``, ``"token-mean"`` or ``"sum"``.
        name: in tables.
    """

    optimizer: Optimizer | Sequence[Optimizer]
    exponent: float = 0.5
    reduction: str = "mean"
    name: str = "diag-ema"

    def __post_init__(self) -> None:
        """Refuse what is no optimizer, and an unknown reduction.

        Raises:
            InputError: it says what to give instead.
        """
        as_optimizers(self.optimizer)
        check_reduction(self.reduction)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> DiagonalState:
        """Read v̂; nothing is computed.

        Raises:
            InputError: a parameter has no second moment.
        """
        names = {id(p): name for name, p in problem.function.model.named_parameters()}
        found: dict[str, Tensor] = {}
        without: dict[str, str] = {}
        unread: set[str] = set()
        for optimizer in as_optimizers(self.optimizer):
            if _entries(optimizer) == ():
                unread.add(type(optimizer).__name__)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state, name = optimizer.state.get(parameter, {}), names.get(id(parameter), "")
                    moment = second_moment(optimizer, state, group)
                    if moment is not None:
                        found[name] = moment.detach().to(torch.float64)
                    else:
                        without[name] = listed([str(key) for key in state]) or "nothing"
        parameters = problem.function.parameters
        missing = [
            f"{n} (state: {without.get(n, 'not held')})" for n in parameters if n not in found
        ]
        if missing:
            classes = ", ".join(dict.fromkeys(kind for _, kind in MOMENTS))
            whose = f" of {listed(sorted(unread))}, which is not read" if unread else ""
            raise InputError(
                f"{self.name}: no second moment in the optimizer's state{whose}, for "
                f"{listed(missing)}; {classes} have one once they have stepped; diag-ef:0.5 is "
                "the diagonal of the batch itself"
            )
        moments = torch.cat([found[name].reshape(-1) for name in parameters]).to(problem.device)
        terms = loss_terms(problem.distribution, self.reduction)
        return DiagonalState(problem, moments * terms**2, self.exponent)


def second_moment(
    optimizer: Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor | None:
    """The average of squared gradients in a parameter's state; None if it has none.

    Only of the classes in `MOMENTS` and what is derived from them. An average that starts from
    zero is divided by 1 − βᵗ (Adam's ``exp_avg_sq``, whose β is the second of ``betas``; RMSprop's
    and Adadelta's ``square_avg``). Of Adagrad's ``sum`` the value that it started from is taken
    off, and it is divided by its steps t. FAdam's ``fisher`` is unbiased as it is, unless made with
    ``debiased_fisher=False``; so are pytorch_optimizer's ``fim`` and Adafactor's, which is put
    together from its rows and columns.
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
        started = torch.full_like(moment, group.get("initial_accumulator_value", 0.0))
        moment = (moment - started) / steps
    elif entry == "row_var":
        moment = moment @ state["col_var"] / moment.mean(dim=-2, keepdim=True)
    return moment if bool(torch.isfinite(moment).all()) else None


def _entries(optimizer: Optimizer) -> tuple[str, ...]:
    """Where a class keeps its second moment; nothing if it is none of `MOMENTS`."""
    for kind in type(optimizer).__mro__:
        found = MOMENTS.get((kind.__module__.partition(".")[0], kind.__name__))
        if found is not None:
            return found
    return ()


@dataclass(frozen=True)
class NamedAccumulated:
    """``diag-ema`` and ``diag-ema:ρ`` on the command line: v̂ from a checkpoint's saved state.

    Attributes:
        name: as asked for.
        exponent: ρ.
        stage: the checkpoint, once it is known.
    """

    name: str
    exponent: float = 0.5
    stage: Stage | None = None

    needs_stage = True
    """It means nothing without a checkpoint."""

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> NamedAccumulated:
        """Build the method from its full name and the text after the colon, ρ.

        Raises:
            InputError: ρ cannot be read.
        """
        return cls(name, parse_exponent(name, parameter or "0.5"))

    def at(self, stage: Stage) -> NamedAccumulated:
        """The method at a checkpoint.

        Raises:
            CheckpointError: there is no optimizer's state.
        """
        if stage.optimizer_state is None:
            raise CheckpointError(
                f"{self.name}: no optimizer state beside {stage.name}; give --optimizer-state, or "
                "grade diag-ef:0.5, whose diagonal is that of the batch"
            )
        return replace(self, stage=stage)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> DiagonalState:
        """Read v̂ from the checkpoint's file.

        Raises:
            InputError: no checkpoint, or an optimizer without a second moment.
            CheckpointError: the file cannot be read, or fits none of the optimizers.
        """
        if self.stage is None:
            raise InputError(
                f"{self.name} needs a checkpoint with its run (ngeval's commands have one); in "
                "Python give your optimizer to ngeval.AccumulatedDiagonal"
            )
        optimizers = self._loaded(problem.function.model, self.stage)
        reduction = self.stage.options.reduction
        method = AccumulatedDiagonal(optimizers, self.exponent, reduction, self.name)
        return method.prepare(problem, kernel, seed)

    def _loaded(self, model: nn.Module, stage: Stage) -> list[Optimizer]:
        """The saved optimizer, by its name where that is known."""
        path, pickled = stage.optimizer_state, stage.options.allow_pickle
        if path is None:
            raise CheckpointError(f"{self.name}: no optimizer state beside {stage.name}")
        saved = read_optimizer(path, allow_pickle=pickled)
        known = saved.name or stage.optimizer
        if known is not None and (known in OPTIMIZERS or "." in known):
            optimizers = build_optimizers(known, model)
            load_optimizer_state(optimizers, model, path, pickled, known)
            return optimizers
        _check_known(self.name, path, saved.states)
        reasons = []
        for kind in KINDS:
            optimizers = build_optimizers(kind, model)
            try:
                load_optimizer_state(optimizers, model, path, pickled, kind)
            except CheckpointError as error:
                reasons.append(str(error))
            else:
                return optimizers
        raise CheckpointError(
            f"{self.name}: the state in {path} fits none of {', '.join(KINDS)}; {reasons[0]}"
        )


def _check_known(label: str, path: Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a file that has no entry by the name of a second moment.

    Raises:
        CheckpointError: says what it has instead.
    """
    present = {
        str(key)
        for state in states
        for entries in state["state"].values()
        if isinstance(entries, Mapping)
        for key in entries
    }
    known = [entry for entries in MOMENTS.values() for entry in entries]
    if not present & set(known):
        raise CheckpointError(
            f"{label}: {path} holds no second moment that is known "
            f"({listed(list(dict.fromkeys(known)))}), but {listed(sorted(present)) or 'nothing'}; "
            "grade diag-ef:0.5, whose diagonal is that of the batch"
        )
