"""What a run says of itself before it starts and after its first unit: size, memory, time, disk."""

from __future__ import annotations

from datetime import timedelta

from ngeval.runs.ranks import Ranks
from ngeval.runs.run import Run
from ngeval.runs.tables import Work
from ngeval.utils.text import describe_bytes


def size_note(run: Run, work: Work, count: int) -> str:
    """How many units a run has, and what is computed of each.

    Args:
        run: the run.
        work: what is computed of each unit.
        count: the units that this start computes.
    """
    checkpoints, batches = len(run.checkpoints), run.num_batches
    parts = [f"{run.num_units} units ({checkpoints} checkpoints × {batches} batches)"]
    if count < run.num_units:
        parts.append(f"{count} of them in this start")
    methods = len(work.methods)
    if dampings := work.options.get("dampings"):
        parts.append(f"{methods} methods × {len(dampings)} dampings in each")
    elif methods:
        parts.append(f"{methods} methods in each")
    return ", ".join(parts)


def forecast_note(run: Run, ranks: Ranks, left: int, seconds: float, each: int) -> str:
    """How long the rest of a run takes, from its first unit.

    Args:
        run: the run.
        ranks: the processes that share it.
        left: the units that are left.
        seconds: that the first unit took.
        each: the bytes that a unit takes on the disk, 0 if that is not known.
    """
    at_once = ranks.count if ranks.group is None else 1
    rest = f"the other {left} will take about {duration(seconds * -(-left // at_once))}"
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
