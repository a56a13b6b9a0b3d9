"""Methods × dampings on one problem, and over batches and checkpoints: tidy tables.

Nothing here stops a run: a method that cannot be computed becomes rows with
``status = "failed"`` and a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch

from ngeval.errors import InputError, NgevalError, nearest_name
from ngeval.methods import Method, State, get_methods
from ngeval.methods.gradient import Sgd
from ngeval.metrics import gamma_floor, gamma_min, quadratics
from ngeval.problem import Problem

DEFAULT_METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")
DAMPING_SCALES = ("absolute", "mean", "relative")

Progress = Callable[[str], None]


def evaluate(
    problem: Problem,
    methods: Iterable[str | Method] = DEFAULT_METHODS,
    dampings: Iterable[float] = (1e-6, 1e-3, 1.0),
    *,
    damping_scale: str = "absolute",
    seed: int = 0,
    on_step: Progress | None = None,
) -> pd.DataFrame:
    """Grade updates by γ at every damping.

    The model is passed through once for the logit kernel (and the diagonal methods'
    preparation); every damping is then a rescaling.

    Args:
        problem: the model, batch and likelihood.
        methods: names (``"ief"``, ``"sf:4"``, ``"diag-ef:0.5"``) or objects with ``prepare``.
        dampings: λ ≥ 0; 0 is the pseudo-inverse.
        damping_scale: what λ multiplies. ``"absolute"``: added to the sum-reduced curvature.
            ``"mean"``: λ of a mean-reduced loss and Fisher, λ_abs = Nλ. ``"relative"``: times the
            largest eigenvalue of each method's own curvature.
        seed: for sampled labels.
        on_step: called with a method's name (or ``"gamma_min"``) when it is done.

    Returns:
        One row per (method, damping), with columns

        - ``method, damping, damping_absolute, damping_scale``: λ as given, and as used;
        - ``gamma``; ``gamma_over_sgd``; ``gamma_over_ng`` (≥ 1, over γ_min); ``gamma_min``;
          ``gamma_floor`` (the closed-form bound, ≤ γ_min);
        - ``decrease`` dᵀg; ``curvature`` dᵀFd; ``update_norm`` ‖d‖; ``cosine_sgd``, the cosine
          between d and g;
        - ``status`` (``"ok"``, ``"undefined"`` or ``"failed"``) and ``reason``;
        - ``num_samples, num_parameters, loss`` (mean ℓ_n, nats), ``likelihood, dtype, engine,
          seed``.

    Raises:
        InputError: unknown method or scale, or a damping that is negative or not a number.

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
    if damping_scale not in DAMPING_SCALES:
        raise InputError(
            f"unknown damping scale {damping_scale!r}; "
            f"{nearest_name(str(damping_scale), DAMPING_SCALES)}"
        )
    done = on_step or (lambda _: None)
    frames = []
    with torch.inference_mode(False):  # tensors made here take part in backward passes
        shared = _shared_columns(problem, damping_scale, seed)
        done("gamma_min")
        for method in resolved:
            frames.append(_grade(problem, method, lambdas, damping_scale, seed))
            done(method.name)
    return pd.concat(frames, ignore_index=True).assign(**shared)[COLUMNS]


COLUMNS = [
    *("method", "damping", "damping_absolute", "damping_scale"),
    *("gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_min", "gamma_floor"),
    *("decrease", "curvature", "update_norm", "cosine_sgd", "status", "reason"),
    *("num_samples", "num_parameters", "loss", "likelihood", "dtype", "engine", "seed"),
]
"""The columns of `evaluate`, in order."""


SUMMARIZED = ("gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_floor")
"""The columns that `summarize` needs besides ``status``."""


def check_dampings(dampings: Iterable[float]) -> list[float]:
    """Turn dampings into a list of distinct floats.

    Raises:
        InputError: none given, or one is negative, NaN, infinite or no number.
    """
    if isinstance(dampings, str):
        raise InputError(f"dampings is the text {dampings!r}; give a list of numbers")
    try:
        values = [float(damping) for damping in dampings]
    except (TypeError, ValueError) as error:
        raise InputError(f"dampings must be numbers: {error}") from error
    if not values:
        raise InputError("no damping given; λ = 0 asks for the pseudo-inverse")
    for value in values:
        if not math.isfinite(value) or value < 0:
            raise InputError(f"damping {value} is not allowed; λ must be finite and ≥ 0")
    return list(dict.fromkeys(values))


def absolute_dampings(
    problem: Problem, state: State, dampings: Sequence[float], scale: str
) -> list[float]:
    """λ as it is added to the sum-reduced curvature of a prepared method.

    A method without curvature (sgd) has no relative scale: NaN, and λ does not enter it.
    """
    factor = {
        "absolute": 1.0,
        "mean": float(problem.num_samples),
        "relative": state.largest_curvature,
    }[scale]
    return [factor * damping for damping in dampings]


def _shared_columns(problem: Problem, damping_scale: str, seed: int) -> dict[str, Any]:
    """The columns that do not depend on the method, and γ_min with its reason to be missing."""
    try:
        least, reason = gamma_min(problem), ""
    except (NgevalError, RuntimeError) as error:  # LAPACK's failures are RuntimeErrors
        least, reason = math.nan, str(error)
    gradient_norm = float(problem.gradient().to(torch.float64).norm())
    return {
        "damping_scale": damping_scale,
        "gamma_min": least,
        "gamma_floor": gamma_floor(problem),
        "gamma_over_ng": lambda table: (
            table["gamma"] / (least if math.isfinite(least) else math.nan)
        ),
        "gamma_over_sgd": lambda table: table["gamma"] / _gamma_sgd(problem),
        "cosine_sgd": lambda table: table["decrease"] / (table["update_norm"] * gradient_norm),
        "reason": lambda table: table["reason"].where(table["reason"] != "", reason),
        "num_samples": problem.num_samples,
        "num_parameters": problem.num_parameters,
        "loss": float(problem.loss.mean()),
        "likelihood": problem.likelihood.name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "engine": problem.engine,
        "seed": seed,
    }


def _gamma_sgd(problem: Problem) -> float:
    return float(quadratics(problem, Sgd().prepare(problem).tangents([0.0]).values).gammas[0])


def _grade(
    problem: Problem, method: Method, dampings: list[float], scale: str, seed: int
) -> pd.DataFrame:
    """The columns of one method that depend on it."""
    table = pd.DataFrame({"method": method.name, "damping": dampings})
    try:
        state = method.prepare(problem, seed)
        absolute = absolute_dampings(problem, state, dampings, scale)
        tangents = state.tangents([0.0 if math.isnan(value) else value for value in absolute])
        parts = quadratics(problem, tangents.values)
        columns = {
            "damping_absolute": absolute,
            "gamma": parts.gammas.tolist(),
            "decrease": parts.decrease.tolist(),
            "curvature": parts.curvature.tolist(),
            "update_norm": tangents.squared_norms.clamp_min(0).sqrt().tolist(),
        }
    except Exception as error:  # a method may be anybody's; its failure is data
        reason = (
            str(error) if isinstance(error, NgevalError) else f"{type(error).__name__}: {error}"
        )
        names = ("damping_absolute", "gamma", "decrease", "curvature", "update_norm")
        return table.assign(**dict.fromkeys(names, math.nan), status="failed", reason=reason)
    table = table.assign(**columns)
    defined = np.isfinite(table["gamma"])
    return table.assign(
        status=np.where(defined, "ok", "undefined"),
        reason=np.where(defined, "", "dᵀg = 0 to rounding, or not finite"),
    )


def summarize(
    table: pd.DataFrame,
    by: Sequence[str] = ("checkpoint", "method", "damping"),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and geometric mean of the γ ratios over batches, with bootstrap intervals.

    Args:
        table: rows of `evaluate` for several batches; only rows with ``status == "ok"`` count.
        by: the columns that define a group; those absent from the table are left out.
        confidence: coverage of the percentile bootstrap intervals.
        resamples: number of bootstrap resamples.
        seed: for the resampling.

    Raises:
        InputError: a column is missing.

    Returns:
        One row per group in order of appearance, with ``batches`` and, for each ratio r in
        (``gamma_over_sgd``, ``gamma_over_ng``): ``r_mean, r_mean_low, r_mean_high, r_geomean,
        r_geomean_low, r_geomean_high``; and ``floor_over_sgd``, the geometric mean of the floor
        over γ_SGD. Intervals of fewer than two batches are NaN.
    """
    if not (0 < confidence < 1) or resamples < 1:
        raise InputError("confidence must lie between 0 and 1, and resamples be at least 1")
    by = [by] if isinstance(by, str) else list(dict.fromkeys(by))
    keys = [key for key in by if key in table.columns]
    if not keys:
        raise InputError(f"none of the columns {list(by)} is in the table")
    missing = [name for name in ("status", *SUMMARIZED) if name not in table.columns]
    if missing:
        raise InputError(f"the table has no column {', '.join(missing)}; is it evaluate's?")
    usable = table[table["status"] == "ok"]
    grouped = usable.groupby(keys, sort=False, dropna=False)
    summary = grouped.size().rename("batches").reset_index()
    floors = usable["gamma_floor"] * usable["gamma_over_sgd"] / usable["gamma"]
    with np.errstate(divide="ignore"):  # a floor of 0 (an overflowing uᵀH⁺u) has log −∞
        usable = usable.assign(log_floor=np.log(floors))
    floor_groups = usable.groupby(keys, sort=False, dropna=False)
    summary["floor_over_sgd"] = np.exp(floor_groups["log_floor"].mean().to_numpy())
    for ratio in ("gamma_over_sgd", "gamma_over_ng"):
        values = [group.dropna().to_numpy(dtype=float) for _, group in grouped[ratio]]
        for suffix, transform, back in (
            ("mean", np.asarray, np.asarray),
            ("geomean", np.log, np.exp),
        ):
            means, low, high = _intervals(
                [transform(v) for v in values], confidence, resamples, seed
            )
            name = f"{ratio}_{suffix}"
            summary[name] = back(means)
            summary[f"{name}_low"], summary[f"{name}_high"] = back(low), back(high)
    return summary


def _intervals(
    groups: list[np.ndarray], confidence: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and percentile bootstrap interval of every group; groups of one length together."""
    means = np.array([group.mean() if len(group) else math.nan for group in groups])
    low, high = np.full((2, len(groups)), math.nan)
    for length in sorted({len(group) for group in groups} - {0, 1}):
        chosen = [i for i, group in enumerate(groups) if len(group) == length]
        # Through the package, so that scipy.stats (a second to import) is loaded when needed.
        result = scipy.stats.bootstrap(
            (np.stack([groups[i] for i in chosen]),),
            np.mean,
            axis=-1,
            confidence_level=confidence,
            n_resamples=resamples,
            method="percentile",
            vectorized=True,
            batch=100,
            rng=np.random.default_rng(seed),
        )
        low[chosen], high[chosen] = result.confidence_interval
    return means, low, high
