"""Methods × dampings on one problem: a tidy table.

A method that cannot be computed becomes rows with
``status = "failed"`` and a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.optim import Optimizer

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS
from ngeval.curvature.natural_gradient import (
    has_dense_solver,
)
from ngeval.curvature.updates import SpaceUpdates
from ngeval.dampings import check_dampings
from ngeval.errors import InputError
from ngeval.grading.errors import Perturbations
from ngeval.grading.grade import Grades, grade
from ngeval.grading.natural import with_natural
from ngeval.grading.prepare import (
    Failure,
    Prepared,
    Progress,
    add_note,
    attempt,
    check_request,
    common_columns,
    prepare,
)
from ngeval.methods import Method, get_methods
from ngeval.methods.ng import NaturalGradient
from ngeval.methods.sf import SampledFisher
from ngeval.methods.sgd import Sgd
from ngeval.problem.gamma import gamma_floor
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem

DEFAULT_METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")

NUMBERS = ["gamma", "gamma_error", "decrease", "curvature", "update_norm", "update_error"]
"""The columns of a method's grades."""

TOLERANCE = 1e-2
"""The relative error of γ above which a row is ``uncertain``."""

DAMPING_COLUMNS = ["damping", "damping_absolute", "damping_scale"]
GAMMA_COLUMNS = ["gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_min", "gamma_floor"]
ERROR_COLUMNS = ["gamma_error", "gamma_over_sgd_error", "gamma_over_ng_error", "gamma_min_error"]
BOUND_COLUMNS = ["gamma_ng_lower", "gamma_ng_upper", "iterations"]
UPDATE_COLUMNS = [*NUMBERS[2:], "cosine_sgd", "coverage", "rank"]
PROBLEM_COLUMNS = ["num_samples", "metric_samples", "num_parameters", "loss"]
SETTING_COLUMNS = ["likelihood", "dtype", "engine", "seed"]

COLUMNS = [
    "method",
    *DAMPING_COLUMNS,
    *GAMMA_COLUMNS,
    *ERROR_COLUMNS,
    *BOUND_COLUMNS,
    *UPDATE_COLUMNS,
    "status",
    "reason",
    "note",
    *PROBLEM_COLUMNS,
    *SETTING_COLUMNS,
]
"""The columns of `evaluate`, in order."""


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
    tolerance: float = TOLERANCE,
    on_step: Progress | None = None,
) -> pd.DataFrame:
    """Grade updates by γ at every damping.

    Each factorisation takes one pass through the model; every damping is then a rescaling.

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
        natural: also γ_min and the bounds on the exact natural gradient's γ, the expensive part of
            a large problem. Not with a metric.
        gap: where the logit kernel is out of reach: the relative gap between those bounds at which
            the Krylov run stops.
        max_iterations: and where it stops at the latest (a JVP and a VJP for each).
        tolerance: the relative error of γ above which a row is ``uncertain``.
        on_step: called with the names of methods (or ``"gamma_min"``) that are done.

    Returns:
        One row per (method, damping), with columns

        - ``method, damping, damping_absolute, damping_scale``: λ as given, and as used;
        - ``gamma``; ``gamma_over_sgd``; ``gamma_over_ng`` (≥ 1, over γ_min); ``gamma_min``;
          ``gamma_floor`` (the closed-form bound, ≤ γ_min); the first four also with ``_error``, an
          estimate of the relative error by rounding;
        - ``gamma_ng_lower, gamma_ng_upper``: bounds on the γ of the exact (F + λI)⁻¹g at the row's
          λ (the γ of ``ng`` itself is that of the update that was computed, within their gap);
          ``iterations`` of the Krylov run behind them, 0 for a factorisation;
        - ``decrease`` dᵀg; ``curvature`` dᵀFd; ``update_norm`` ‖d‖; ``update_error``, an estimate
          of the relative error of dᵀg and ‖d‖; ``cosine_sgd``, the cosine between d and g: g and F
          are the metric's;
        - ``coverage``: the part of the parameters that the method's own curvature or optimizer
          covers, in %; ``note`` says how the rest is treated;
        - ``rank``, of the method's curvature, by which its pseudo-inverse at λ = 0 was taken;
        - ``status``: ``"ok"``; ``"uncertain"``, where γ's error is above the tolerance;
          ``"ascent"``, where dᵀg < 0; ``"undefined"``, where there is no γ; or ``"failed"``;
          ``reason`` says why it is not ok, ``note`` what to know of a row that has numbers;
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
    check_request(problem, damping_scale, metric)
    _check_limits(gap, max_iterations)
    resolved, lambdas = get_methods(methods), check_dampings(dampings)
    exact_names = [method.name for method in resolved if isinstance(method, NaturalGradient)]
    exact = (natural or bool(exact_names)) and metric is None
    kernel = Kernel(problem, exact=exact, pushes=len(resolved) * len(lambdas))
    request = _Request(
        kernel,
        lambdas,
        damping_scale,
        seed,
        metric,
        tolerance,
        Perturbations(kernel, seed, metric),
    )
    reported = {*(method.name for method in resolved), "gamma_min"}  # not an added sgd

    def report(name: str) -> None:
        if on_step is not None and name in reported:
            on_step(name)

    with torch.inference_mode(False):  # tensors made here take part in backward passes
        sgd = next((i for i, method in enumerate(resolved) if isinstance(method, Sgd)), None)
        limited = [
            replace(m, gap=gap, max_iterations=max_iterations)
            if isinstance(m, NaturalGradient)
            else m
            for m in resolved
        ]
        extended = limited if sgd is not None else [*limited, Sgd()]
        outcomes, errors = _grade_all(request, extended, exact, report)
        baseline = outcomes[-1 if sgd is None else sgd]
        pairs = zip(resolved, outcomes, strict=False)
        parts = [_method_columns(method.name, outcome, request) for method, outcome in pairs]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        # One frame at once: a column added to a frame costs as much as an update.
        table = pd.DataFrame({**columns, **_other_columns(request, columns, baseline)})
        if exact:
            table = with_natural(table, kernel, gap, max_iterations, errors)
            report("gamma_min")
        elif metric is not None:
            table = add_note(table, "γ_min is not computed for another metric batch")
        table = add_note(table, _no_ratio(request, baseline))
        table = add_note(table, "; ".join(problem.notes))
    return table.reindex(columns=COLUMNS)


def _check_limits(gap: float, max_iterations: int) -> None:
    if not (isinstance(gap, int | float) and gap > 0):
        raise InputError(f"gap must be a positive number, not {gap!r}")
    if not (isinstance(max_iterations, int) and max_iterations > 0):
        raise InputError(f"max_iterations must be a positive whole number, not {max_iterations!r}")


Outcome = tuple[Prepared, Grades] | Failure
_Status = tuple[str, str]


@dataclass(frozen=True)
class _Request:
    """What the updates of every method are graded with."""

    kernel: Kernel
    dampings: list[float]
    scale: str
    seed: int
    metric: Metric | None
    tolerance: float
    perturbations: Perturbations


def _grade_all(
    request: _Request, methods: Sequence[Method], exact: bool, done: Progress
) -> tuple[list[Outcome], dict[float, float]]:
    """Each method's updates and their grades, or why there are none.

    And if ``exact``, the errors of the exact natural gradient's γ, by λ.
    """
    kernel, shards = request.kernel, request.kernel.problem.shards
    arguments = request.dampings, request.scale, request.seed
    # The vectors of sampled labels include the residual, so that one space has the rows of both.
    order = sorted(range(len(methods)), key=lambda i: not isinstance(methods[i], SampledFisher))
    attempts = {i: attempt(shards, partial(prepare, kernel, methods[i], *arguments)) for i in order}
    prepared = {i: p for i, p in sorted(attempts.items()) if isinstance(p, Prepared)}
    outcomes: dict[int, Outcome] = {i: p for i, p in attempts.items() if isinstance(p, Failure)}
    for i in outcomes:
        done(methods[i].name)
    noise = None if request.metric is not None else request.perturbations.of_logits
    for group in _groups(request, prepared):
        updates = [prepared[i].updates for i in group]
        result = attempt(shards, partial(grade, kernel, updates, request.metric, noise))
        for place, i in enumerate(group):
            outcomes[i] = result if isinstance(result, Failure) else (prepared[i], result[place])
            done(methods[i].name)
    graded = {i: each for i, each in outcomes.items() if not isinstance(each, Failure)}
    # γ_min belongs to λ = 0, whatever the dampings.
    absolute = {0.0, *(value for each, _ in graded.values() for value in each.absolute)}
    finite = sorted(value for value in absolute if not math.isnan(value))
    dampings = finite if exact and has_dense_solver(kernel) else []
    members = [(methods[i], *each) for i, each in graded.items()]
    grades, errors = request.perturbations.errors(members, dampings)
    for i, each in zip(graded, grades, strict=True):
        outcomes[i] = graded[i][0], each
    return [outcomes[i] for i in range(len(methods))], dict(zip(dampings, errors, strict=True))


def _groups(request: _Request, prepared: dict[int, Prepared]) -> list[list[int]]:
    """What is graded together: updates in one space, if they are pushed through the model."""
    groups: dict[object, list[int]] = {}
    for i, each in prepared.items():
        together = isinstance(each.updates, SpaceUpdates) and (
            request.metric is not None or not request.kernel.is_dense
        )
        key = id(each.updates.space) if together and isinstance(each.updates, SpaceUpdates) else -i
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _method_columns(name: str, outcome: Outcome, request: _Request) -> dict[str, np.ndarray]:
    """The columns that depend on the method."""
    dampings = request.dampings
    count = len(dampings)
    columns = {
        "method": np.full(count, name, object),
        "damping": np.array(dampings),
        "damping_absolute": np.full(count, math.nan),
    }
    if isinstance(outcome, Failure):
        missing = dict.fromkeys((*NUMBERS, "coverage", "rank"), np.full(count, math.nan))
        status, reason = np.full(count, "failed", object), np.full(count, outcome.reason, object)
        texts = {"status": status, "reason": reason, "note": np.full(count, "", object)}
        return {**columns, **missing, **texts}
    prepared, grades = outcome
    tensors = (
        grades.gammas,
        grades.errors + torch.from_numpy(prepared.gaps).to(grades.errors),
        grades.decrease,
        grades.curvature,
        grades.norms,
        grades.update_errors,
    )
    numbers = [column.expand(count).cpu().numpy() for column in tensors]
    gammas, errors, slopes, _, norms, _ = numbers
    rows = zip(gammas, errors, prepared.gaps, slopes, norms, strict=True)
    pairs = [_status(request, *row) for row in rows]
    return {
        **columns,
        "damping_absolute": np.array(prepared.absolute),
        **dict(zip(NUMBERS, numbers, strict=True)),
        "coverage": np.full(count, prepared.coverage),
        "rank": np.where(np.array(prepared.absolute) == 0, prepared.rank, math.nan),
        "status": np.array([status for status, _ in pairs], object),
        "reason": np.array([reason for _, reason in pairs], object),
        "note": np.full(count, prepared.remarks, object),
    }


def _status(
    request: _Request, gamma: float, error: float, gap: float, slope: float, norm: float
) -> _Status:
    if not math.isfinite(gamma):
        reason = "the update is 0" if norm == 0 else "dᵀg or dᵀFd is 0 to rounding, or not finite"
        return "undefined", reason
    if not error <= request.tolerance:
        return "uncertain", _uncertainty(request, gap)
    if slope < 0:
        return "ascent", "dᵀg < 0: a step along −d goes uphill"
    return "ok", ""


def _uncertainty(request: _Request, gap: float) -> str:
    if not gap <= request.tolerance:
        return (
            f"its bounds on γ are more than {request.tolerance:g} apart; a larger λ helps, and for "
            "a Krylov run more max_iterations or memory"
        )
    in_double = request.kernel.problem.dtype == torch.float64
    return (
        f"rounding may change γ by more than {request.tolerance:g} of itself; "
        f"{'a larger λ' if in_double else 'dtype float64 or a larger λ'} helps"
    )


def _no_ratio(request: _Request, baseline: Outcome) -> str:
    """Why there is no γ/γ_SGD, or nothing."""
    if isinstance(baseline, Failure):
        return f"no gamma_over_sgd: {baseline.reason}"
    gamma, norm = float(baseline[1].gammas[0]), float(baseline[1].norms[0])
    status, reason = _status(request, gamma, 0.0, 0.0, 1.0, norm)
    return f"no gamma_over_sgd: for the gradient, {reason}" if status == "undefined" else ""


def _other_columns(
    request: _Request, columns: dict[str, np.ndarray], baseline: Outcome
) -> dict[str, Any]:
    """γ/γ_SGD, the cosine with g, and what depends on neither method nor damping."""
    problem, metric = request.kernel.problem, request.metric
    if metric is None:
        floor = gamma_floor(problem)
        norm = float(torch.linalg.vector_norm(problem.gradient(), dtype=torch.float64))
    else:
        floor, norm = metric.totals.floor, metric.totals.gradient_norm
    gamma = error = np.float64(math.nan)
    if not isinstance(baseline, Failure):
        gamma = np.float64(baseline[1].gammas[0])
        error = np.float64(baseline[1].errors[0])
    with np.errstate(divide="ignore", invalid="ignore"):  # of updates that vanish
        ratios = {
            "gamma_over_sgd": columns["gamma"] / gamma,
            "gamma_over_sgd_error": columns["gamma_error"] + error,
            "cosine_sgd": columns["decrease"] / (columns["update_norm"] * norm),
        }
    return {
        **ratios,
        **common_columns(problem, metric, request.scale, request.seed),
        "gamma_floor": floor,
        "num_parameters": problem.num_parameters,
        "loss": float(problem.loss.mean()),
    }
