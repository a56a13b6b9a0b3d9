"""``diag-ema``: the diagonal that an optimizer accumulated over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from ngeval.methods.diagonal import DiagonalState
from ngeval.methods.stage import Stage
from ngeval.problem import Problem


@dataclass(frozen=True, eq=False)
class AccumulatedDiagonal:
    """d = g / (v̂ + λ)^ρ with the second moment v̂ in an optimizer's state."""

    optimizer: Optimizer | Sequence[Optimizer]
    exponent: float = 0.5
    reduction: str = "mean"
    name: str = "diag-ema"

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Read v̂."""
        raise NotImplementedError


@dataclass(frozen=True)
class NamedAccumulated:
    """``diag-ema`` and ``diag-ema:ρ`` on the command line: v̂ from a checkpoint's state."""

    name: str
    exponent: float = 0.5
    stage: Stage | None = None

    @classmethod
    def parse(cls, full_name: str, parameter: str) -> NamedAccumulated:
        """From ``diag-ema`` or ``diag-ema:0.5``."""
        return cls(full_name, float(parameter or 0.5))

    needs_stage = True

    def at(self, stage: Stage) -> NamedAccumulated:
        """The method at a checkpoint."""
        raise NotImplementedError

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Read v̂ from the checkpoint's optimizer state."""
        raise NotImplementedError
