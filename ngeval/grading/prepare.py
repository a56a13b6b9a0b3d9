"""A method on a problem at many dampings, and the guard that makes its failure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ngeval.curvature.bounds import Bounds
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import Updates
from ngeval.dampings import check_scale
from ngeval.errors import InputError, NgevalError
from ngeval.methods import Method
from ngeval.model.sharding import Shards
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem
from ngeval.utils.memory import OUT_OF_MEMORY, is_out_of_memory
from ngeval.utils.text import encodable

T = TypeVar("T")

Progress = Callable[[str], None]
"""Called with the name of what is done."""

NUMERICAL = (NgevalError, RuntimeError, MemoryError)
"""What ngeval's own computations may raise; LAPACK's errors are RuntimeErrors."""


@dataclass(frozen=True)
class Failure:
    """Why something could not be computed: the ``reason`` in a table."""

    reason: str


@dataclass(frozen=True)
class Prepared:
    """A method's updates at every λ.

    Attributes:
        absolute: λ as it is added to the sum-reduced curvature; NaN where λ does not enter.
        updates: those of every λ.
        coverage: the part of the parameters that the method treats, in percent.
        remarks: what a reader of its results should know.
        rank: of the method's curvature, where a λ is 0 and the method knows it; otherwise NaN.
        gaps: how far γ may be from that of an exact solution, relative, for every λ.
        bounds: on the γ of an exact solution by the same batch, where the method has them.
        largest: the curvature's largest eigenvalue, where λ is relative to it; otherwise NaN.
    """

    absolute: list[float]
    updates: Updates
    coverage: float
    remarks: str
    rank: float
    gaps: np.ndarray
    bounds: Bounds | None
    largest: float


def attempt(
    shards: Shards,
    compute: Callable[[], T],
    expected: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> T | Failure:
    """The result of a computation, or why it failed; all ranks succeed, or all fail.

    Args:
        shards: of the problem.
        compute: the computation.
        expected: the exceptions that are failures. By default all: a method may be anybody's code.
    """
    try:
        return shards.synchronized(compute)
    except expected as error:
        return Failure(failure_reason(error))


def prepare(
    kernel: Kernel, method: Method, dampings: Sequence[float], scale: str, seed: int
) -> Prepared:
    """Do all work of a method that does not depend on λ.

    Raises:
        InputError: a relative damping of a method that has no curvature to scale it.
        Exception: whatever the method raises; see `attempt`.
    """
    state = method.prepare(kernel.problem, kernel, seed)
    if scale == "relative":  # only then: the largest eigenvalue may have to be computed
        factor = state.largest_curvature
    else:
        factor = float(kernel.problem.num_samples) if scale == "mean" else 1.0
    absolute = [factor * damping for damping in dampings]  # NaN for sgd, which has no curvature
    updates = state.updates([0.0 if math.isnan(value) else value for value in absolute])
    if math.isnan(absolute[0]) and updates.count > 1:
        raise InputError(f"{method.name} has no curvature for a relative damping to scale")
    coverage = float(getattr(state, "coverage", 100.0))
    rank = float(getattr(state, "rank", math.nan)) if 0 in absolute else math.nan
    notes = "; ".join(getattr(state, "notes", ()))
    # After the updates, which a run has to be long enough for.
    bounds = state.bounds(absolute) if hasattr(state, "bounds") else None
    gaps = np.zeros(len(dampings)) if bounds is None else bounds.gaps
    if hasattr(state, "gaps"):
        gaps = np.asarray(state.gaps(absolute))
    largest = factor if scale == "relative" else math.nan
    return Prepared(absolute, updates, coverage, notes, rank, gaps, bounds, largest)


def failure_reason(error: Exception) -> str:
    """The reason that a table gives for a failure."""
    if isinstance(error, NgevalError):
        return encodable(str(error))
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY} ({str(error).partition(chr(10))[0][:100]})"
    return encodable(f"{type(error).__name__}: {error}")


def lost_memory(table: pd.DataFrame) -> str:
    """Which methods of a unit's table ran out of memory, or nothing.

    Other failures would repeat; with more memory these would not, so the unit is graded again.
    """
    if "reason" not in table:
        return ""
    texts = table["reason"].where(table["reason"] != "", table["note"])
    lost = texts.str.contains(OUT_OF_MEMORY, regex=False, na=False)
    pairs = zip(table["method"][lost], texts[lost], strict=True)
    return "; ".join(dict.fromkeys(f"{method}: {text}" for method, text in pairs))


def check_request(problem: Problem, damping_scale: str, metric: Metric | None) -> None:
    """Raise unless updates of a problem can be graded as requested.

    Raises:
        InputError: not a problem, an unknown scale, or a metric of a different problem.
        ModelError: the model was changed since the problem was made.
    """
    if not isinstance(problem, Problem):
        raise InputError(f"problem must be an ngeval.Problem, not {type(problem).__name__}")
    check_scale(damping_scale)
    if metric is not None and not isinstance(metric, Metric):
        raise InputError(
            f"metric must be an ngeval.Metric(problem, batches), not {type(metric).__name__}"
        )
    if metric is not None and metric.problem is not problem:
        raise InputError("the metric was made for a different problem; make one for this problem")
    # Results that are in memory already would not notice.
    problem.shards.synchronized(problem.function.check_unchanged)


def common_columns(
    problem: Problem, metric: Metric | None, damping_scale: str, seed: int
) -> dict[str, Any]:
    """The columns of every table that depend on neither method nor damping."""
    return {
        "damping_scale": damping_scale,
        "num_samples": problem.num_samples,
        "metric_samples": problem.num_samples if metric is None else metric.totals.num_samples,
        "likelihood": problem.likelihood.name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "engine": problem.engine,
        "seed": seed,
    }


def add_note(table: pd.DataFrame, note: str, where: pd.Series[bool] | bool = True) -> pd.DataFrame:
    """Append a note to those of rows that have not failed."""
    if not note:
        return table
    notes = table["note"].to_numpy()
    joined = [f"{before}; {note}" if before else note for before in notes]
    return table.assign(note=np.where((table["status"] != "failed") & where, joined, notes))
