"""γ_min, γ/γ_min and the bounds on the exact natural gradient's γ, in a table of grades."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ngeval.curvature.bounds import Bounds
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.natural_gradient import NaturalGradientSolver, natural_solver
from ngeval.grading.prepare import NUMERICAL, Failure, add_note, attempt
from ngeval.problem.gamma import gamma_floor


def with_natural(
    table: pd.DataFrame,
    kernel: Kernel,
    gap: float,
    max_iterations: int,
    rounding: dict[float, float],
) -> pd.DataFrame:
    """γ_min, γ/γ_min and bounds on γ_NG at every row's λ, or why they are missing."""
    problem = kernel.problem
    # γ_min belongs to λ = 0, whatever the dampings.
    dampings = sorted({0.0, *table["damping_absolute"].dropna()})

    def solved() -> tuple[NaturalGradientSolver, Bounds, float, float]:
        solver = natural_solver(kernel, gap, max_iterations)
        solver.updates(dampings)
        bounds, floor = solver.bounds(dampings), gamma_floor(problem)
        least = max(solver.gamma_min(), floor)  # equal but for rounding, or above
        if not rounding:  # a Krylov run
            return solver, bounds, least, float(bounds.gaps[0])
        errors = np.array([rounding[damping] for damping in dampings])
        lower = np.fmax(bounds.lower / (1 + errors), floor)
        error = float(errors[0]) + 2 * solver.whitening_error
        return solver, Bounds(lower, bounds.upper * (1 + errors)), least, error

    result = attempt(problem.shards, solved, NUMERICAL)
    if isinstance(result, Failure):
        missing = dict.fromkeys(("gamma_min", "gamma_over_ng"), math.nan)
        return add_note(table.assign(**missing), result.reason)
    solver, bounds, least, error = result
    known = table["gamma"][table["status"].isin(["ok", "ascent"])].min()
    if known * (1 + error) < least:  # every update's γ is an upper bound
        least, error = known, max(error, known / max(gamma_floor(problem), 1e-300) - 1)
    table = table.assign(
        gamma_min=least,
        gamma_min_error=error,
        gamma_over_ng=table["gamma"] / (least if math.isfinite(least) else math.nan),
        gamma_over_ng_error=table["gamma_error"] + error,
        gamma_ng_lower=table["damping_absolute"].map(pd.Series(bounds.lower, dampings)),
        gamma_ng_upper=table["damping_absolute"].map(pd.Series(bounds.upper, dampings)),
        iterations=solver.iterations,
    )
    if not solver.iterations:
        return table
    after = f"after {solver.iterations} iterations (asked for {gap:.1e}; see max_iterations)"
    apart = table["gamma_ng_upper"] / table["gamma_ng_lower"] - 1
    for value in apart[apart > gap].unique():
        note = f"bounds on γ_NG are {value:.1e} apart {after}"
        table = add_note(table, note, apart == value)
    low, high = bounds.lower[0], bounds.upper[0]
    if high / low - 1 > gap:
        table = add_note(table, f"γ_min is known to lie between {low:.4g} and {high:.4g} {after}")
    return table
