"""Optimizers by name on the command line: ``adamw``, ``adamw:0``, ``adamw:20``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ngeval.errors import InputError
from ngeval.methods.optimizer.step import OptimizerState
from ngeval.methods.stage import Stage
from ngeval.problem import Problem


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer that is built on a problem's model.

    Attributes:
        name: as asked for.
        family: the name without the parameter.
        warmup_batches: K after the colon; None takes the checkpoint's real state.
        stage: the checkpoint, once it is known.
    """

    name: str
    family: str
    warmup_batches: int | None
    stage: Stage | None = None

    @classmethod
    def parse(cls, full_name: str, family: str, parameter: str) -> NamedOptimizer:
        """From ``adamw`` or ``adamw:20``."""
        if parameter and not parameter.isdecimal():
            raise InputError(f"method {full_name!r}: the number of batches must be a whole number")
        return cls(full_name, family, int(parameter) if parameter else None)

    @property
    def needs_stage(self) -> bool:
        """Whether it must be told of a checkpoint first."""
        return self.warmup_batches != 0

    def at(self, stage: Stage) -> NamedOptimizer:
        """The method at a checkpoint."""
        return replace(self, stage=stage)

    def prepare(self, problem: Problem, seed: int = 0) -> OptimizerState:
        """Build the optimizer, give it its state, take the step on clones."""
        raise NotImplementedError
