"""What a run reports before it starts and after its first unit: size, memory, time, disk."""

from __future__ import annotations

from datetime import timedelta

from torch import nn

from ngeval.curvature.row_space import GramSpace, JacobianSpace, MatrixFree, Strips, choose_form
from ngeval.errors import EngineError
from ngeval.problem.linearized import Sizes
from ngeval.runs.ranks import Ranks
from ngeval.runs.run import Run
from ngeval.utils.text import counted, describe_bytes


def size_note(run: Run, count: int, methods: int, dampings: int) -> str:
    """How many units a run has, how many this start computes, and what is computed of each."""
    batches = counted(run.num_batches, "batch", "batches")
    each = f"{counted(len(run.checkpoints), 'checkpoint')} × {batches}"
    parts = [f"{counted(run.num_units, 'unit')} ({each})"]
    if count < run.num_units:
        parts.append(f"{count} of them in this start")
    if methods:
        times = f" × {counted(dampings, 'damping')}" if dampings else ""
        parts.append(f"{counted(methods, 'method')}{times} in each")
    return ", ".join(parts)


def trainable_note(model: nn.Module) -> str:
    """How many parameters of a model are trainable."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    return f"{trainable:,} of {total:,} parameters trainable"


def memory_note(sizes: Sizes, budget: int, *, exact: bool, pushes: int) -> str:
    """What is kept of the logit kernel of a unit, and how much of a budget in bytes that takes.

    See `choose_form` for ``exact`` and ``pushes``.

    >>> memory_note(Sizes(160, 10, 10_000_000), 2**33, exact=True, pushes=100)
    'a unit: 160 samples × 10 outputs, 10,000,000 parameters; it keeps Θ, which takes about \
97.7 MiB of 8.0 GiB'
    """
    samples, outputs, parameters = sizes
    rows = samples * outputs
    head = f"a unit: {samples:,} samples × {outputs:,} outputs, {parameters:,} parameters"
    try:
        form = choose_form(sizes, budget, exact=exact, pushes=pushes)
    except EngineError as error:
        return f"{head}; methods that need the logit kernel will fail: {error}"
    # The sizes by which `choose_form` decides: of what is kept and of its factorisation.
    part, count = {
        JacobianSpace: ("J", 32 * rows * parameters),
        GramSpace: ("Θ", 40 * rows**2),
        Strips: ("products of Θ", 8 * rows * (4 * samples + 100)),
        MatrixFree: ("Gram matrices of its rows", 40 * samples**2),
    }[form]
    amount = f"about {describe_bytes(count)} of {describe_bytes(budget)}"
    return f"{head}; it keeps {part}, which takes {amount}"


def forecast_note(run: Run, ranks: Ranks, left: int, seconds: float, each: int) -> str:
    """How long the ``left`` units of a run take, from the seconds that the first one took.

    A unit takes ``each`` bytes on the disk; 0 if that is not known.
    """
    at_once = ranks.count if ranks.group is None else 1
    # The first unit also loads parts of torch that later ones find loaded.
    rest = f"the other {left} will take at most about {duration(seconds * -(-left // at_once))}"
    note = f"the first unit took {duration(seconds)}, {rest}"
    if each:
        note += f"; the results will need about {describe_bytes(each * run.num_units)} on the disk"
    return note


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(0.61), duration(75), duration(100_000)
    ('0.6 s', '0:01:15', '1 day, 3:46:40')
    """
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
