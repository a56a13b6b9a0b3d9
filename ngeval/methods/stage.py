"""The checkpoint of a run, for methods that need more than the model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ngeval.errors import CheckpointError, check_choice
from ngeval.model.inputs import Inputs

REDUCTIONS = ("mean", "token-mean", "sum")
"""The reductions of a training loss."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of an optimizer's step; see `ngeval.OptimizerStep`.

    ``allow_pickle`` unpickles state files with code, only for files that you trust.
    """

    reduction: str = "mean"
    weight_decay: bool = True
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check_reduction(self.reduction)


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a run, as methods see it.

    If a method has ``at(stage) → method``, the method that it returns is prepared on the
    checkpoint's problems.

    Attributes:
        name: of the checkpoint.
        optimizer_state: the file with the optimizer's state; None if there is none.
        optimizer: the name of the run's optimizer; None if it is not recorded.
        batches: returns K batches ``(inputs, targets)`` of the training data, which are not those
            that are graded.
        options: of an optimizer's step.
    """

    name: str
    optimizer_state: Path | None
    optimizer: str | None
    batches: Callable[[int], Iterable[tuple[Inputs, Tensor]]]
    options: OptimizerOptions = field(default_factory=OptimizerOptions)

    def check_state(self, method: str, instead: str) -> None:
        """Refuse a checkpoint without an optimizer's state, and advise to grade ``instead``."""
        if self.optimizer_state is None:
            raise CheckpointError(
                f"{method}: no optimizer state beside {self.name}; give --optimizer-state, or "
                f"grade {instead}"
            )


def check_reduction(reduction: str) -> None:
    """Check that a training loss can be reduced in this way."""
    check_choice("reduction of the training loss", reduction, REDUCTIONS)
