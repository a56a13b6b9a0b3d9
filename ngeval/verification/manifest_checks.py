"""Whether a manifest that anybody may have written tells of a run that can be made.

Everything that ``ngeval verify`` reads of one is looked at here before anything is made of it: a
value may be of any kind, a number of any size, and what a table holds may be of another run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pandas as pd

from ngeval.dampings import MAX_COUNT
from ngeval.errors import OutputError
from ngeval.results.journal import Key
from ngeval.runs.options import MAX_SEED, RunOptions, parse_bytes
from ngeval.tasks.base import MOST_SAMPLES
from ngeval.verification.compare import is_number

MOST_UNITS = 10_000_000
"""Checkpoints × batches of a run that is verified."""

MOST_METHODS = 1_000

MOST_CHARACTERS = 100
"""Of an amount of memory."""


def malformed(place: Path, what: str) -> OutputError:
    """The error of a manifest that nothing can be made of."""
    return OutputError(f"{place} is not a manifest that a run can be made of: {what}")


def part(told: Mapping[str, Any], name: str, place: Path) -> dict[str, Any]:
    """An object within a manifest.

    Raises:
        OutputError: there is none.
    """
    found = told.get(name)
    if not isinstance(found, dict):
        raise malformed(place, f"it has no {name!r}; files of older versions have none")
    return found


def members(hint: Any) -> list[Any]:
    """All types within one."""
    return [one for arg in get_args(hint) for one in (arg, *members(arg))]


def check_kind(name: str, value: Any, hint: Any, place: Path) -> None:
    """Refuse a value of another kind than an option has.

    Raises:
        OutputError: it is.
    """
    if not _fits(value, hint):
        raise malformed(place, f"{name} is {repr(value)[:60]}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is what an option takes."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if isinstance(hint, UnionType) or get_origin(hint) is not None:
        return any(_fits(value, one) for one in get_args(hint))
    if hint is NoneType:
        return value is None
    kinds: dict[Any, Any] = {Path: str, float: (int, float), str: str, int: int, bool: bool}
    return isinstance(value, kinds[hint]) and isinstance(value, bool) == (hint is bool)


def check_work_sizes(options: Mapping[str, Any], place: Path) -> None:
    """Bounds on what is made of each unit: methods, dampings, the gap.

    Raises:
        OutputError: there are more than anybody asks for, or a number is none that is computed
            with.
    """
    for name, most in (("methods", MOST_METHODS), ("dampings", MAX_COUNT)):
        count = len(options.get(name, ()))
        if count > most:
            raise malformed(place, f"{count} {name}; at most {most} are verified")
    numbers = [*options.get("dampings", ()), options.get("damping", 0.0)]
    if any(number > sys.float_info.max for number in numbers):
        raise malformed(place, "a damping is too large for a number")
    gap = options.get("gap", 1.0)
    if not 0 < gap <= sys.float_info.max:
        raise malformed(place, f"gap is {repr(gap)[:60]}")
    metric = options.get("metric_batches")
    if isinstance(metric, str) and metric != "all":
        raise malformed(place, f"metric_batches is {metric[:60]!r}")


def check_run_sizes(
    run: RunOptions, options: Mapping[str, Any], found: Mapping[str, Any], place: Path
) -> None:
    """Bounds on a run: samples, batches, units, the seed, memory.

    Args:
        run: the options of the run.
        options: of what is made of each unit.
        found: the run's identity.
        place: the manifest.

    Raises:
        OutputError: a number is not what the manifest tells elsewhere, or beyond its bound.
    """
    if run.batch_size < 1:
        raise malformed(place, f"batch_size is {run.batch_size}")
    metric = options.get("metric_batches")
    for name, count in (("num_batches", run.num_batches), ("metric_batches", metric)):
        if not isinstance(count, int):
            continue
        if count < 1:
            raise malformed(place, f"{name} is {count}")
        if run.batch_size * count > MOST_SAMPLES:
            raise malformed(
                place,
                f"{name} × batch_size is {run.batch_size * count:.1e} samples; at most "
                f"{MOST_SAMPLES:.0e} are verified",
            )
    batches = found.get("batches")
    if not isinstance(batches, list) or len(batches) != run.num_batches:
        raise malformed(place, f"it does not tell of {run.num_batches} batches")
    if len(found["checkpoints"]) * len(batches) > MOST_UNITS:
        raise malformed(place, f"it tells of more than {MOST_UNITS} units")
    if not 0 <= run.seed <= MAX_SEED:
        raise malformed(place, f"seed is {run.seed}")
    if run.memory is not None and len(run.memory) > MOST_CHARACTERS:
        raise malformed(place, f"memory is {run.memory[:60]!r}")
    parse_bytes(run.memory)


def read_end(
    told: Mapping[str, Any], found: Mapping[str, Any], place: Path
) -> tuple[bool, frozenset[Key]]:
    """How the run ended: whether it came to its end, and its units that failed.

    Raises:
        OutputError: units that there are not.
    """
    finished, failed = "complete" in told, told.get("failed_units", [])
    if finished and not isinstance(told["complete"], bool):
        raise malformed(place, f"complete is {repr(told['complete'])[:60]}")
    if not _fits(failed, list[list[int]]):
        raise malformed(place, f"failed_units is {repr(failed)[:60]}")
    ends = (len(found["checkpoints"]), len(found["batches"]))
    units = set[Key]()
    for key in failed:
        if len(key) != len(ends) or not all(0 <= i < n for i, n in zip(key, ends, strict=True)):
            raise malformed(place, f"a failed unit is {repr(key)[:60]}, which there is not")
        units.add((key[0], key[1]))
    if finished and told["complete"] == bool(units):
        raise malformed(place, f"complete is {told['complete']}, with {len(units)} failed units")
    return finished, frozenset(units)


def check_table(table: pd.DataFrame, found: Mapping[str, Any], path: Path) -> None:
    """Refuse a table of other units than the manifest tells of.

    Raises:
        OutputError: it is one, or holds none.
    """
    if not table.columns.is_unique:
        raise OutputError(f"{path} has a column twice")
    ends = {"stage": len(found["checkpoints"]), "batch": len(found["batches"])}
    for name, end in ends.items():
        values = table[name] if name in table else pd.Series([math.nan])
        whole = is_number(values) and bool((values % 1 == 0).all())
        if not whole or not bool(values.between(0, end - 1).all()):
            raise OutputError(
                f"{path} and its manifest are of different runs: its column {name!r} does not tell "
                f"one of {end}"
            )
    if table.empty:
        raise OutputError(f"{path} has no rows, so that there is nothing to verify")
