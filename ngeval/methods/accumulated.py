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
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.checkpoints import listed, read_optimizer
from ngeval.errors import CheckpointError, InputError
from ngeval.methods.diagonal import DiagonalState
from ngeval.methods.optimizer import OPTIMIZERS, load_optimizer_state, optimizer_entry
from ngeval.methods.optimizer.gradients import loss_terms
from ngeval.methods.optimizer.step import as_optimizers
from ngeval.methods.stage import Stage, check_reduction
from ngeval.problem import Problem

KINDS = ("adamw", "adam", "nadam", "radam", "rmsprop", "adadelta", "adagrad", "adafactor")
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

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Read v̂; nothing is computed.

        Raises:
            InputError: a parameter has no second moment.
        """
        names = {id(p): name for name, p in problem.function.model.named_parameters()}
        found: dict[str, Tensor] = {}
        without: dict[str, str] = {}
        for optimizer in as_optimizers(self.optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state, name = optimizer.state.get(parameter, {}), names.get(id(parameter), "")
                    moment = second_moment(state, group)
                    if moment is not None:
                        found[name] = moment.detach().to(torch.float64)
                    else:
                        without[name] = listed([str(key) for key in state]) or "nothing"
        parameters = problem.function.parameters
        missing = [
            f"{n} (state: {without.get(n, 'not held')})" for n in parameters if n not in found
        ]
        if missing:
            raise InputError(
                f"{self.name}: no second moment in the optimizer's state for {listed(missing)}; "
                "Adam and its kin, FAdam, RMSprop, Adadelta, Adagrad and Adafactor have one once "
                "they have stepped"
            )
        moments = torch.cat([found[name].reshape(-1) for name in parameters]).to(problem.device)
        terms = loss_terms(problem.distribution, self.reduction)
        return DiagonalState(problem, moments * terms**2, self.exponent)


def second_moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """The average of squared gradients in a parameter's state; None if it has none.

    An average that starts from zero is divided by 1 − βᵗ (Adam's ``exp_avg_sq``, whose β is the
    second of ``betas``; RMSprop's and Adadelta's ``square_avg``), Adagrad's ``sum`` by its steps t.
    FAdam's ``fim`` is unbiased as it is, and so is Adafactor's, which is put together from its
    rows and columns.
    """
    steps = float(state.get("step", group.get("step", math.nan)))
    moment: Tensor
    if "exp_avg_sq" in state:
        moment = state["exp_avg_sq"] / (1.0 - float(group["betas"][1]) ** steps)
    elif "square_avg" in state:
        decay = group["alpha"] if "alpha" in group else group["rho"]
        moment = state["square_avg"] / (1.0 - float(decay) ** steps)
    elif "sum" in state:
        moment = state["sum"] / steps
    elif "fim" in state:
        moment = state["fim"]
    elif "row_var" in state and "col_var" in state:
        rows, columns = state["row_var"], state["col_var"]
        moment = rows @ columns / rows.mean(dim=-2, keepdim=True)
    elif "variance" in state:
        moment = state["variance"]
    else:
        return None
    return moment if bool(torch.isfinite(moment).all()) else None


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
    def parse(cls, full_name: str, parameter: str) -> NamedAccumulated:
        """From the parts of ``diag-ema`` or ``diag-ema:1``.

        Raises:
            InputError: ρ cannot be read.
        """
        try:
            exponent = float(parameter or 0.5)
        except ValueError:
            exponent = math.nan
        if not math.isfinite(exponent):
            raise InputError(
                f"method {full_name!r}: the exponent must be a number, as in diag-ema:0.5"
            )
        return cls(full_name, exponent)

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

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Read v̂ from the checkpoint's file.

        Raises:
            InputError: no checkpoint, or an optimizer without a second moment.
            CheckpointError: the file cannot be read, or fits none of the optimizers.
        """
        if self.stage is None:
            raise InputError(
                f"{self.name} needs a checkpoint with its run (ngeval's commands have one); in "
                "Python give your optimizer to ngeval.methods.AccumulatedDiagonal"
            )
        optimizers = self._loaded(problem.function.model, self.stage)
        reduction = self.stage.options.reduction
        method = AccumulatedDiagonal(optimizers, self.exponent, reduction, self.name)
        return method.prepare(problem, seed)

    def _loaded(self, model: nn.Module, stage: Stage) -> list[Optimizer]:
        """The saved optimizer, by its name where that is known."""
        path, pickled = stage.optimizer_state, stage.options.allow_pickle
        if path is None:
            raise CheckpointError(f"{self.name}: no optimizer state beside {stage.name}")
        known = read_optimizer(path, allow_pickle=pickled).name or stage.optimizer
        if known is not None and (known in OPTIMIZERS or "." in known):
            optimizers = optimizer_entry(known).build(model)
            load_optimizer_state(optimizers, model, path, pickled, known)
            return optimizers
        reasons = []
        for kind in KINDS:
            optimizers = optimizer_entry(kind).build(model)
            try:
                load_optimizer_state(optimizers, model, path, pickled, kind)
            except CheckpointError as error:
                reasons.append(str(error))
            else:
                return optimizers
        raise CheckpointError(
            f"{self.name}: the state in {path} fits none of {', '.join(KINDS)}; {reasons[0]}"
        )
