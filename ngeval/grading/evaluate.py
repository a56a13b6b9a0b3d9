"""Methods × dampings on one problem, and over batches and checkpoints: tidy tables.

Nothing here stops a run: a method that cannot be computed becomes rows with
``status = "failed"`` and a reason.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.optim import Optimizer

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS, Bounds
from ngeval.curvature.logit_kernel import DenseKernel
from ngeval.curvature.natural_gradient import (
    LOST,
    NaturalGradientSolver,
    lost_to_rounding,
    natural_solver,
)
from ngeval.curvature.updates import Updates
from ngeval.dampings import check_dampings, check_scale
from ngeval.errors import EngineError, InputError, NgevalError
from ngeval.grading.grade import Grades, families, grade
from ngeval.grading.prepare import failure_reason, prepare
from ngeval.methods import Method, get_methods
from ngeval.methods.ng import NaturalGradient
from ngeval.methods.sf import SampledFisher
from ngeval.methods.sgd import Sgd
from ngeval.problem.gamma import gamma_floor
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem

DEFAULT_METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")
Progress = Callable[[str], None]


def evaluate(
    problem: Problem,
    methods: Iterable[str | Method | Optimizer] = DEFAULT_METHODS,
    dampings: Iterable[float] = (1e-6, 1e-3, 1.0),
    *,
    damping_scale: str = "absolute",
    seed: int = 0,
    metric: Metric | None = None,
    natural: bool = True,
    gap: float = GAP,
    max_iterations: int = MAX_ITERATIONS,
    on_step: Progress | None = None,
) -> pd.DataFrame:
    """Grade updates by γ at every damping.

    The model is passed through once for each factorisation; every damping is then a rescaling.

    Args:
        problem: the model, batch and likelihood.
        methods: names (``"ief"``, ``"sf:4"``, ``"kfac:pi"``), optimizers, or objects with
            ``prepare``.
        dampings: λ ≥ 0; 0 is the pseudo-inverse.
        damping_scale: what λ multiplies. ``"absolute"``: added to the sum-reduced curvature.
            ``"mean"``: λ of a mean-reduced loss and Fisher, λ_abs = Nλ. ``"relative"``: times the
            largest eigenvalue of each method's own curvature.
        seed: for sampled labels.
        metric: the batch whose Fisher and gradient grade, where it is not the problem's own: see
            `Metric`. Updates are still made from the problem's batch.
        natural: also γ_min and the bounds on the exact natural gradient's γ, the dear part of a
            large problem. Not for another metric.
        gap: where the logit kernel is out of reach: the relative gap between those bounds at which
            the Krylov run stops.
        max_iterations: and where it stops at the latest (a JVP and a VJP for each).
        on_step: called with the names of methods (or ``"gamma_min"``) that are done.

    Returns:
        One row per (method, damping), with columns

        - ``method, damping, damping_absolute, damping_scale``: λ as given, and as used;
        - ``gamma``; ``gamma_over_sgd``; ``gamma_over_ng`` (≥ 1, over γ_min); ``gamma_min``;
          ``gamma_floor`` (the closed-form bound, ≤ γ_min);
        - ``gamma_ng_lower, gamma_ng_upper``: bounds on the γ of the exact (F + λI)⁻¹g at the row's
          λ (the γ of ``ng`` itself is that of the update that was found, within the gap of them);
          ``iterations`` of the Krylov run behind them, 0 for a factorisation;
        - ``decrease`` dᵀg; ``curvature`` dᵀFd; ``update_norm`` ‖d‖; ``cosine_sgd``, the cosine
          between d and g: g and F are the metric's;
        - ``coverage``: the part of the parameters that the method's own curvature or optimizer
          covers, in %; ``reason`` says what becomes of the rest;
        - ``status`` (``"ok"``, ``"undefined"`` or ``"failed"``) and ``reason``, which also holds
          what is to be known of a row that is ok;
        - ``num_samples, metric_samples, num_parameters, loss`` (mean ℓ_n of the problem's batch,
          nats), ``likelihood, dtype, engine, seed``.

    Raises:
        InputError: unknown method or scale, or a damping that is negative or not a number.
        ModelError: the model was changed since the problem was made.

    Example:
        >>> import torch, ngeval
        >>> model = torch.nn.Linear(3, 2)
        >>> problem = ngeval.Problem(model, torch.eye(3), torch.tensor([0, 1, 1]), "categorical")
        >>> table = ngeval.evaluate(problem, ["sgd", "ng"], [1e-6])
        >>> bool((table["gamma_over_ng"] > 1 - 1e-6).all())
        True
    """
    if not isinstance(problem, Problem):
        raise InputError(f"evaluate takes an ngeval.Problem, not {type(problem).__name__}")
    resolved = get_methods(methods)
    lambdas = check_dampings(dampings)
    check_scale(damping_scale)
    _check_options(problem, metric, gap, max_iterations)
    # What is graded from memory would not notice.
    problem.shards.synchronized(problem.function.check_unchanged)
    done = on_step or (lambda _: None)
    asked = any(isinstance(method, NaturalGradient) for method in resolved)
    exact = (natural or asked) and metric is None
    kernel = Kernel(problem, exact=exact, pushes=len(resolved) * len(lambdas))
    with torch.inference_mode(False):  # tensors made here take part in backward passes
        rated = [_Rated(method, lambdas) for method in resolved]
        plain = next((one for one in rated if isinstance(one.method, Sgd)), _Rated(Sgd(), lambdas))
        everyone = rated if plain in rated else [*rated, plain]
        # Sampled vectors include the residual, which then need not be captured again.
        for one in sorted(everyone, key=lambda one: not isinstance(one.method, SampledFisher)):
            one.prepare(kernel, damping_scale, seed, (gap, max_iterations))
        for group in _groups(kernel, everyone, metric):
            _grade(kernel, group, metric)
            for one in group:
                if one in rated:
                    done(one.method.name)
        own = [one.columns() for one in rated]
        columns = {name: np.concatenate([part[name] for part in own]) for name in own[0]}
        shared = _shared_columns(problem, metric, damping_scale, seed)
        # Made at once: a column added to a frame costs as much as an update.
        table = pd.DataFrame({**_with_ratios(columns, plain, problem, metric), **shared})
        if exact:
            table = _with_natural(table, kernel, gap, max_iterations)
            names = [one.method.name for one in rated if isinstance(one.method, NaturalGradient)]
            table = _without_lost(table, problem, names)
            done("gamma_min")
        elif metric is not None:
            table = _noted(table, "γ_min is not computed for another metric batch")
        if plain not in rated and plain.grades is None:
            table = _noted(table, f"no gamma_over_sgd: {plain.reason}")
        table = _noted(table, "; ".join(problem.notes))
    return table.reindex(columns=COLUMNS)


def _check_options(
    problem: Problem, metric: Metric | None, gap: float, max_iterations: int
) -> None:
    if not (isinstance(gap, int | float) and gap > 0):
        raise InputError(f"gap must be a positive number, not {gap!r}")
    if not (isinstance(max_iterations, int) and max_iterations > 0):
        raise InputError(f"max_iterations must be a positive whole number, not {max_iterations!r}")
    if metric is not None and not isinstance(metric, Metric):
        raise InputError(
            f"metric must be an ngeval.Metric(problem, batches), not {type(metric).__name__}"
        )
    if metric is not None and metric.problem is not problem:
        raise InputError("the metric was made for another problem; make one for this one")


COLUMNS = [
    *("method", "damping", "damping_absolute", "damping_scale"),
    *("gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_min", "gamma_floor"),
    *("gamma_ng_lower", "gamma_ng_upper", "iterations"),
    *("decrease", "curvature", "update_norm", "cosine_sgd", "coverage", "status", "reason"),
    *(
        "num_samples",
        "metric_samples",
        "num_parameters",
        "loss",
        "likelihood",
        "dtype",
        "engine",
        "seed",
    ),
]
"""The columns of `evaluate`, in order."""


class _Rated:
    """A method on its way to its rows."""

    def __init__(self, method: Method, dampings: list[float]) -> None:
        self.method = method
        self.dampings = dampings
        self.absolute = [math.nan] * len(dampings)
        self.updates: Updates | None = None
        self.grades: Grades | None = None
        self.reason = ""
        self.coverage = 100.0

    def prepare(self, kernel: Kernel, scale: str, seed: int, limits: tuple[float, int]) -> None:
        """The method's updates, or the reason why there are none."""
        method = self.method
        if isinstance(method, NaturalGradient):
            method = replace(method, gap=limits[0], max_iterations=limits[1])
        try:
            prepared = kernel.problem.shards.synchronized(
                lambda: prepare(kernel, method, self.dampings, scale, seed)
            )
            self.absolute, self.updates = prepared.absolute, prepared.updates
            self.coverage, self.reason = prepared.coverage, prepared.remarks
        except Exception as error:  # a method may be anybody's; its failure is data
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Keep the reason."""
        self.updates = None
        self.absolute = [math.nan] * len(self.dampings)
        self.reason = failure_reason(error)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that depend on the method."""
        count = len(self.dampings)
        names = ("gamma", "decrease", "curvature", "update_norm")
        if self.grades is None:
            numbers, self.coverage = [np.full(count, math.nan)] * len(names), math.nan
            status, reason = np.full(count, "failed", object), np.full(count, self.reason, object)
        else:
            parts = self.grades.quadratics
            norms = self.grades.squared_norms.clamp_min(0).sqrt()
            tensors = (parts.gammas, parts.decrease, parts.curvature, norms)
            numbers = [column.expand(count).cpu().numpy() for column in tensors]
            defined = np.isfinite(numbers[0])
            status = np.where(defined, "ok", "undefined").astype(object)
            undefined = np.where(
                numbers[3] == 0, "the update is 0", "dᵀg = 0 to rounding, or not finite"
            ).astype(object)
            if self.reason:
                undefined = undefined + f"; {self.reason}"
            reason = np.where(defined, self.reason, undefined).astype(object)
        return {
            "method": np.full(count, self.method.name, object),
            "damping": np.array(self.dampings),
            "damping_absolute": np.array(self.absolute),
            **dict(zip(names, numbers, strict=True)),
            "coverage": np.full(count, self.coverage),
            "status": status,
            "reason": reason,
        }


def _groups(kernel: Kernel, rated: Sequence[_Rated], metric: Metric | None) -> list[list[_Rated]]:
    """What is graded in one go: alone where Θ is kept, else with all that is made of its rows."""
    left = [one for one in rated if one.updates is not None]
    with contextlib.suppress(EngineError):  # updates of rows have failed, then
        if metric is None and issubclass(kernel.form, DenseKernel):
            return [[one] for one in left]
    kinds = families([one.updates for one in left if one.updates is not None])
    return [[left[i] for i in kind] for kind in kinds]


def _grade(kernel: Kernel, group: Sequence[_Rated], metric: Metric | None) -> None:
    try:
        updates = [one.updates for one in group if one.updates is not None]
        found = kernel.problem.shards.synchronized(lambda: grade(kernel, updates, metric))
        for one, grades in zip(group, found, strict=True):
            one.grades = grades
    except Exception as error:  # a method may be anybody's; its failure is data
        for one in group:
            one.fail(error)


def _shared_columns(
    problem: Problem, metric: Metric | None, damping_scale: str, seed: int
) -> dict[str, Any]:
    """The columns that depend on neither method nor damping."""
    return {
        "damping_scale": damping_scale,
        "gamma_floor": gamma_floor(problem) if metric is None else metric.totals.floor,
        "num_samples": problem.num_samples,
        "metric_samples": problem.num_samples if metric is None else metric.totals.num_samples,
        "num_parameters": problem.num_parameters,
        "loss": float(problem.loss.mean()),
        "likelihood": problem.likelihood.name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "engine": problem.engine,
        "seed": seed,
    }


def _with_ratios(
    columns: dict[str, np.ndarray], plain: _Rated, problem: Problem, metric: Metric | None
) -> dict[str, np.ndarray]:
    """γ/γ_SGD and the cosine with g."""
    norm = float(torch.linalg.vector_norm(problem.gradient(), dtype=torch.float64))
    norm = norm if metric is None else metric.totals.gradient_norm
    gamma = np.float64(plain.grades.quadratics.gammas[0] if plain.grades else math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # of updates that vanish
        return {
            **columns,
            "gamma_over_sgd": columns["gamma"] / gamma,
            "cosine_sgd": columns["decrease"] / (columns["update_norm"] * norm),
        }


def _with_natural(
    table: pd.DataFrame, kernel: Kernel, gap: float, max_iterations: int
) -> pd.DataFrame:
    """γ_min, γ/γ_min and bounds on γ_NG at every row's λ, or why they are missing."""
    problem = kernel.problem
    # γ_min belongs to λ = 0, whatever is asked for.
    dampings = sorted({0.0, *table["damping_absolute"].dropna()})

    def solved() -> tuple[NaturalGradientSolver, Bounds, float]:
        solver = natural_solver(kernel, gap, max_iterations)
        solver.updates(dampings)
        least = max(solver.gamma_min(), gamma_floor(problem))  # equal but for rounding, or above
        return solver, solver.bounds(dampings), least

    try:
        solver, found, least = problem.shards.synchronized(solved)
    except (NgevalError, RuntimeError, MemoryError) as error:  # LAPACK's are RuntimeErrors
        missing = dict.fromkeys(("gamma_min", "gamma_over_ng"), math.nan)
        return _noted(table.assign(**missing), failure_reason(error))
    table = table.assign(
        gamma_min=least,
        gamma_over_ng=table["gamma"] / (least if math.isfinite(least) else math.nan),
        gamma_ng_lower=table["damping_absolute"].map(dict(zip(dampings, found.lower, strict=True))),
        gamma_ng_upper=table["damping_absolute"].map(dict(zip(dampings, found.upper, strict=True))),
        iterations=solver.iterations,
    )
    after = f"after {solver.iterations} iterations (asked for {gap:.1e}; see max_iterations)"
    apart = table["gamma_ng_upper"] / table["gamma_ng_lower"] - 1
    for value in apart[apart > gap].unique():
        note = f"bounds on γ_NG are {value:.1e} apart {after}"
        table = _noted(table, note, apart == value)
    low, high = found.lower[0], found.upper[0]
    if solver.iterations and high / low - 1 > gap:
        table = _noted(table, f"γ_min is known to lie between {low:.4g} and {high:.4g} {after}")
    return table


def _without_lost(table: pd.DataFrame, problem: Problem, names: list[str]) -> pd.DataFrame:
    """The natural gradient's rows fail where its γ is not what the factorisation says it is.

    Improbable labels leave γ_min and the bounds their digits, but not the update at small λ.
    """
    if not names or "gamma_ng_upper" not in table:
        return table
    off = table["gamma"] > (1 + LOST) * table["gamma_ng_upper"]
    off &= table["method"].isin(names) & (table["status"] == "ok") & (table["iterations"] == 0)
    reason = str(lost_to_rounding(problem, "the update"))
    return table.assign(
        status=table["status"].mask(off, "failed"), reason=table["reason"].mask(off, reason)
    )


def _noted(table: pd.DataFrame, note: str, where: pd.Series[bool] | bool = True) -> pd.DataFrame:
    """Add a note to rows that are not failures with a reason of their own."""
    if not note:
        return table
    known = table["reason"].to_numpy()
    free = (table["status"] == "ok") | (table["reason"] == "")
    joined = [f"{reason}; {note}" if reason else note for reason in known]
    return table.assign(reason=np.where(free & where, joined, known))
