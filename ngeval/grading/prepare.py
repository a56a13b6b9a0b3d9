"""A method on a problem at many dampings: where every table of updates starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import Updates
from ngeval.errors import InputError, NgevalError
from ngeval.methods import Method, State
from ngeval.problem.problem import Problem
from ngeval.utils.memory import OUT_OF_MEMORY, is_out_of_memory
from ngeval.utils.text import encodable


@dataclass(frozen=True)
class Prepared:
    """A method's updates at every λ.

    Attributes:
        absolute: λ as it is added to the sum-reduced curvature; NaN where λ does not enter.
        updates: those of every λ.
        coverage: the part of the parameters that the method treats, in percent.
        remarks: what is to be known of its results.
    """

    absolute: list[float]
    updates: Updates
    coverage: float
    remarks: str


def prepare(
    kernel: Kernel, method: Method, dampings: Sequence[float], scale: str, seed: int
) -> Prepared:
    """Do all work of a method that does not depend on λ.

    Raises:
        InputError: a relative damping of a method that has no curvature to scale it.
        Exception: whatever the method raises, which may be anybody's; see `failure_reason`.
    """
    problem = kernel.problem
    state = method.prepare(problem, kernel, seed)
    absolute = _absolute_dampings(problem, state, dampings, scale)
    updates = state.updates([0.0 if math.isnan(value) else value for value in absolute])
    if math.isnan(absolute[0]) and updates.count > 1:
        raise InputError(f"{method.name} has no curvature for a relative damping to scale")
    coverage = float(getattr(state, "coverage", 100.0))
    return Prepared(absolute, updates, coverage, "; ".join(getattr(state, "notes", ())))


def failure_reason(error: Exception) -> str:
    """What a table says of a method that failed."""
    if isinstance(error, NgevalError):
        return encodable(str(error))
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY} ({str(error).partition(chr(10))[0][:100]})"
    return encodable(f"{type(error).__name__}: {error}")


def lost_memory(table: pd.DataFrame) -> str:
    """Why a unit that was graded is to be done again: what it had no memory for, or nothing.

    A method that cannot be computed would fail again; with more memory this would not.
    """
    if "reason" not in table:
        return ""
    lost = table[table["reason"].str.contains(OUT_OF_MEMORY, regex=False, na=False)]
    told = zip(lost["method"], lost["reason"], strict=True)
    return "; ".join(dict.fromkeys(f"{method}: {reason}" for method, reason in told))


def _absolute_dampings(
    problem: Problem, state: State, dampings: Sequence[float], scale: str
) -> list[float]:
    """λ as it is added to the sum-reduced curvature of a prepared method.

    A method without curvature (sgd) has no relative scale: NaN, and λ does not enter it.
    """
    if scale == "relative":  # asked for only then: it may have to be computed
        factor = state.largest_curvature
    else:
        factor = float(problem.num_samples) if scale == "mean" else 1.0
    return [factor * damping for damping in dampings]
