"""Optimizers by name on the command line: ``adamw``, ``adamw:0``, ``adamw:20``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ngeval.curvature.kernel import Kernel
from ngeval.errors import CheckpointError, InputError
from ngeval.methods.base import UndampedState
from ngeval.methods.optimizer.build import build_optimizers, optimizer_class
from ngeval.methods.optimizer.clone import Clones
from ngeval.methods.optimizer.load_state import load_optimizer_state
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.problem.problem import Problem

MAX_BATCHES = 100_000
"""A larger number of warm-up batches is taken for a typing error."""

CACHED_SHARE = 16
"""Warm copies are cached if they take at most 1/16 of the memory budget."""


@dataclass(frozen=True, eq=False)
class _Bound(OptimizerStep):
    """An optimizer on a checkpoint's model, which caches the state accumulated at a θ.

    Attributes:
        stage: the checkpoint; None if there is none.
        notes: on the state.
    """

    stage: Stage | None = None
    notes: tuple[str, ...] = ()
    _warm: dict[Any, tuple[Clones, list[str]]] = field(default_factory=dict, repr=False)

    def warmed(
        self, dtype: torch.dtype | None, problem: Problem, names: dict[int, str]
    ) -> tuple[Clones, list[str]]:
        """Copies of those that were warmed up before at this θ and in this dtype, if any."""
        if self.warmup is None:
            return super().warmed(dtype, problem, names)
        key = (dtype, problem.dtype, *problem.function.versions.items())
        if key not in self._warm:
            clones, notes = super().warmed(dtype, problem, names)
            if clones.num_bytes > problem.rows.memory // CACHED_SHARE:
                return clones, notes
            self._warm.clear()
            self._warm[key] = clones, notes
        clones, notes = self._warm[key]
        return clones.again(), [*notes]


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer by name, built on the problem's model with the defaults of its class.

    ``adamw`` steps with the state that the training run saved with the checkpoint; ``adamw:0``
    takes a first step, without a state; ``adamw:20`` steps with a state accumulated over 20
    batches at the checkpoint's weights.

    Attributes:
        name: in tables.
        family: the name without the parameter.
        warmup_batches: K after the colon; None takes the state saved with the checkpoint.
        stage: the checkpoint; None until it is known.
    """

    name: str
    family: str
    warmup_batches: int | None
    stage: Stage | None = None
    # The latest checkpoint's model and optimizer; `at` copies the method but shares the list.
    _cache: list[tuple[nn.Module, _Bound]] = field(default_factory=list, compare=False, repr=False)

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
        """The method at a checkpoint.

        Raises:
            CheckpointError: the method needs the optimizer's saved state, and there is none.
        """
        if self.warmup_batches is None and stage.optimizer_state is None:
            raise CheckpointError(
                f"{self.name}: no optimizer state beside {stage.name}; give --optimizer-state, or "
                f"grade {self.family}:0 (its first step) or {self.family}:20 (state accumulated "
                "over 20 batches at the checkpoint's weights)"
            )
        return replace(self, stage=stage)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> UndampedState:
        """Build the optimizer, load its state, and take the step on copies.

        Raises:
            InputError: a checkpoint is needed; see also `OptimizerStep.prepare`.
            CheckpointError: the saved state does not fit.
        """
        if self.stage is None and self.needs_stage:
            raise InputError(
                f"{self.name} needs a checkpoint with its run (ngeval's commands have one); in "
                "Python give your optimizer, ngeval.OptimizerStep(optimizer, warmup=...), or "
                f"grade {self.family}:0, its first step"
            )
        bound = self._bound(problem.function.model)
        state = bound.prepare(problem, kernel, seed)
        return UndampedState(problem, state.step, state.coverage, (*bound.notes, *state.notes))

    def _bound(self, model: nn.Module) -> _Bound:
        """The optimizer on a model with its state, built once for all batches of a checkpoint."""
        count, stage = self.warmup_batches, self.stage
        for known, bound in self._cache:
            if known is model and bound.stage is stage:
                return bound
        options = stage.options if stage else OptimizerOptions()
        optimizers = build_optimizers(self.family, model)
        notes: tuple[str, ...] = ()
        if count is None and stage and (path := stage.optimizer_state):
            pickled = options.allow_pickle
            notes = load_optimizer_state(optimizers, model, path, pickled, self.family)
        bound = _Bound(
            optimizers,
            reduction=options.reduction,
            weight_decay=options.weight_decay,
            warmup=(lambda: stage.batches(count)) if stage and count else None,
            name=self.name,
            stage=stage,
            notes=notes,
        )
        self._cache[:] = [(model, bound)]
        return bound
