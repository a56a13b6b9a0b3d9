"""Optimizers by name on the command line: ``adamw``, ``adamw:0``, ``adamw:20``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from ngeval.curvature.kernel import Kernel
from ngeval.errors import InputError
from ngeval.methods.base import UndampedState
from ngeval.methods.optimizer.build import build_optimizers, optimizer_class
from ngeval.methods.optimizer.load_state import load_optimizer_state
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.problem.problem import Problem

MAX_BATCHES = 100_000
"""A larger number of warm-up batches is taken for a typing error."""


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer by name, built on the problem's model with the defaults of its class.

    ``adamw`` steps with the state that the training run saved with the checkpoint; ``adamw:0``
    takes a first step, without a state; ``adamw:20`` steps with a state accumulated over 20
    batches at the checkpoint's weights. The ``stage`` is None until the checkpoint is known.
    """

    name: str
    family: str
    warmup_batches: int | None
    stage: Stage | None = None
    # The latest checkpoint and model, with the optimizer on it and notes on its state; `at` copies
    # the method but shares the list.
    _cache: list[tuple[Stage | None, nn.Module, OptimizerStep, tuple[str, ...]]] = field(
        default_factory=list, compare=False, repr=False
    )

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> NamedOptimizer:
        """Build the method from its full name, as ``adamw`` or ``adamw:20``, and its parameter."""
        family = name.partition(":")[0]
        optimizer_class(family)  # an unknown name is an error before any work
        if not parameter:
            return cls(name, family, None)
        if not parameter.isdecimal() or int(parameter) > MAX_BATCHES:
            raise InputError(
                f"method {name!r}: what follows the colon is a number of batches: "
                f"{family}:0 grades the first step, {family}:20 a state accumulated over 20"
            )
        return cls(name, family, int(parameter))

    @property
    def needs_stage(self) -> bool:
        """Whether the method can be prepared only at a checkpoint."""
        return self.warmup_batches != 0

    def at(self, stage: Stage) -> NamedOptimizer:
        """The method at a checkpoint, which must have a saved state if the method needs it."""
        if self.warmup_batches is None:
            others = (
                f"{self.family}:0 (its first step) or {self.family}:20 (state accumulated over 20 "
                "batches at the checkpoint's weights)"
            )
            stage.check_state(self.name, others)
        return replace(self, stage=stage)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> UndampedState:
        """Build the optimizer, load its state, and take the step on copies; see `OptimizerStep`."""
        if self.stage is None and self.needs_stage:
            raise InputError(
                f"{self.name} needs a checkpoint with its run (ngeval's commands have one); in "
                "Python give your optimizer, ngeval.OptimizerStep(optimizer, warmup=...), or "
                f"grade {self.family}:0, its first step"
            )
        step, notes = self._bound(problem.function.model)
        state = step.prepare(problem, kernel, seed)
        return UndampedState(problem, state.step, state.coverage, (*notes, *state.notes))

    def _bound(self, model: nn.Module) -> tuple[OptimizerStep, tuple[str, ...]]:
        """The optimizer on a model with its state, built once for all batches of a checkpoint."""
        count, stage = self.warmup_batches, self.stage
        for known, known_model, step, notes in self._cache:
            if known is stage and known_model is model:
                return step, notes
        options = stage.options if stage else OptimizerOptions()
        optimizers = build_optimizers(self.family, model)
        notes = ()
        if count is None and stage and (path := stage.optimizer_state):
            pickled = options.allow_pickle
            notes = load_optimizer_state(optimizers, model, path, pickled, self.family)
        step = OptimizerStep(
            optimizers,
            reduction=options.reduction,
            weight_decay=options.weight_decay,
            warmup=(lambda: stage.batches(count)) if stage and count else None,
            name=self.name,
            warm={},
        )
        self._cache[:] = [(stage, model, step, notes)]
        return step, notes
