"""``OptimizerStep``: the step that an optimizer would take now, as a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from ngeval.checks import Inputs
from ngeval.methods.base import ParameterState
from ngeval.problem import Problem

Batches = Iterable[tuple[Inputs, Tensor]]


class OptimizerState(ParameterState):
    """d = θ − θ′ of one step; λ does not enter."""

    coverage: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """The step that an optimizer would take now, d = θ − θ′."""

    optimizer: Optimizer | Sequence[Optimizer]
    reduction: str = "mean"
    weight_decay: bool = True
    warmup: Batches | Callable[[], Batches] | None = None
    name: str = ""

    def prepare(self, problem: Problem, seed: int = 0) -> OptimizerState:
        """Take the step on clones."""
        raise NotImplementedError
