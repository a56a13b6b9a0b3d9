"""Where in a training run a problem stands: what a method may need beside the model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ngeval.errors import InputError, nearest_name
from ngeval.model.checks import Inputs

REDUCTIONS = ("mean", "token-mean", "sum")
"""How a training loss can be reduced."""


@dataclass(frozen=True)
class OptimizerOptions:
    """How an optimizer's step is taken; see `ngeval.OptimizerStep`.

    Attributes:
        reduction: how the training loss was reduced: ``"mean"``, ``"sum"`` or ``"token-mean"``.
        weight_decay: with the optimizer's weight decay.
        allow_pickle: unpickle state files with code; only for files that you trust.
    """

    reduction: str = "mean"
    weight_decay: bool = True
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Refuse a reduction that is none."""
        check_reduction(self.reduction)


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a run, as methods see it.

    A method with ``at(stage) → method`` is asked for the method at this checkpoint before it is
    prepared on the checkpoint's problems.

    Attributes:
        name: the checkpoint's.
        optimizer_state: the file with the optimizer's state, None where there is none.
        optimizer: the name of the optimizer that the run was made with, where it is known.
        batches: gives K batches ``(inputs, targets)`` of the training data, others than those
            that are graded.
        options: how an optimizer's step is taken.
    """

    name: str
    optimizer_state: Path | None
    optimizer: str | None
    batches: Callable[[int], Iterable[tuple[Inputs, Tensor]]]
    options: OptimizerOptions = field(default_factory=OptimizerOptions)


def check_reduction(reduction: str) -> None:
    """Raise unless a training loss can be reduced like this.

    Raises:
        InputError: it cannot.
    """
    if reduction not in REDUCTIONS:
        raise InputError(
            f"unknown reduction {reduction!r} of the training loss; "
            f"{nearest_name(str(reduction), REDUCTIONS)}"
        )
