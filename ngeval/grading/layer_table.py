"""What each layer of an update is worth: where does an optimizer lose its quality?

An update d falls into the parts d_l of its layers, with every other layer's entries set to 0.
Each part has a γ of its own, and since d = Σ_l d_l, what the whole update buys and spends are sums
over layers: dᵀg = Σ_l d_lᵀg and dᵀFd = Σ_l d_lᵀFd. A layer whose share of dᵀFd is greater than its
share of dᵀg spends more than it buys. For the natural gradient, Fd = g, the two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer

from ngeval.curvature.fisher_blocks import fisher_blocks
from ngeval.curvature.kernel import Kernel
from ngeval.dampings import check_dampings, check_scale
from ngeval.errors import InputError, NgevalError
from ngeval.grading.evaluate import Progress
from ngeval.grading.prepare import Prepared, failure_reason, prepare
from ngeval.methods import Method, get_methods
from ngeval.model.parameter_groups import Group, Groups, make_groups
from ngeval.model.tangents import slices
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem

COLUMNS = [
    *("method", "damping", "damping_absolute", "damping_scale", "layer", "num_parameters"),
    *("gamma", "gamma_over_sgd", "gamma_over_best", "decrease", "decrease_share"),
    *("curvature", "curvature_share", "excess", "own_curvature", "update_norm", "gamma_total"),
    *("coverage", "status", "reason"),
    *("num_samples", "metric_samples", "likelihood", "dtype", "engine", "seed"),
]
"""The columns of `layer_table`, in order."""

NUMBERS = COLUMNS[6 : COLUMNS.index("status")]


@dataclass(frozen=True)
class Parts:
    """What the parts of one update are worth: float64, shape ``(groups,)``.

    Attributes:
        decrease: d_lᵀg.
        curvature: d_lᵀFd, the part's share of dᵀFd with all cross terms.
        own_curvature: d_lᵀFd_l.
        norms: ‖d_l‖.
        gammas: γ(d_l), NaN where d_lᵀg = 0.
        gamma_total: γ(d).
    """

    decrease: np.ndarray
    curvature: np.ndarray
    own_curvature: np.ndarray
    norms: np.ndarray
    gammas: np.ndarray
    gamma_total: float


def layer_table(
    problem: Problem,
    methods: Iterable[str | Method | Optimizer],
    dampings: Iterable[float] = (1e-3,),
    *,
    groups: Groups = "layer",
    damping_scale: str = "absolute",
    seed: int = 0,
    metric: Metric | None = None,
    natural: bool = True,
    on_step: Progress | None = None,
) -> pd.DataFrame:
    """What each layer's part of each update buys and spends.

    A JVP for every layer, method and damping.

    Args:
        problem: the model, batch and likelihood.
        methods: names or objects, as in `ngeval.evaluate`.
        dampings: λ ≥ 0.
        groups: ``"layer"``: parameters of one module together; ``"parameter"``: each by itself; a
            whole number k: those whose names agree in the first k components (2 puts
            ``encoder.3.attention.weight`` into ``encoder.3``); a mapping from group to parameter
            names (the others are in ``(rest)``); or a function from name to group.
        damping_scale: what λ multiplies, as in `ngeval.evaluate`.
        seed: for sampled labels.
        metric: the batch whose F and g grade; None for the problem's own.
        natural: also each layer's least γ, from the layer's exact Fisher. Not for another metric.
        on_step: called with the names of methods that are done.

    Returns:
        One row per (method, damping, layer), layers in the model's order, with columns

        - ``method, damping, damping_absolute, damping_scale, layer, num_parameters``;
        - ``gamma``: γ(d_l) of the update restricted to the layer; ``gamma_over_sgd``: over the γ
          of the gradient restricted to it; ``gamma_over_best``: over the least γ of any update of
          that layer alone, (g_lᵀF_ll⁺g_l)^(−1/2), which ``block-ng`` has at λ = 0 (≥ 1; NaN where
          the layer's exact Fisher is out of reach);
        - ``decrease`` d_lᵀg and ``decrease_share``, which adds up to 1 over layers;
        - ``curvature`` d_lᵀFd, with cross terms, so that it adds up to dᵀFd (it is negative where
          other layers undo what this one does), and ``curvature_share``, which adds up to 1;
        - ``excess``: curvature_share − decrease_share = ∂ log γ / ∂ log η_l for a learning rate η_l
          of that layer alone: where it is positive, a smaller step in that layer would lower γ. It
          is 0 in every layer for the natural gradient;
        - ``own_curvature`` d_lᵀFd_l; ``update_norm`` ‖d_l‖; ``gamma_total``: γ of the whole update;
          ``coverage``: the percentage of all parameters that the method treats itself;
        - ``status`` (``"ok"``, ``"undefined"`` or ``"failed"``), ``reason``;
        - ``num_samples, metric_samples, likelihood, dtype, engine, seed``.

    Raises:
        InputError: unknown method, scale or parameter, a parameter in two groups, or a damping
            that is negative or not a number.
        ModelError: the model was changed since the problem was made.

    Example:
        >>> import torch, ngeval
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> problem = ngeval.Problem(model, torch.eye(3), torch.tensor([0, 1, 1]), "categorical")
        >>> table = ngeval.layer_table(problem, ["sgd", "ief"], [1e-3])
        >>> table["layer"].unique().tolist()
        ['0', '2']
        >>> [round(float(share), 4) for share in table.groupby("method")["decrease_share"].sum()]
        [1.0, 1.0]
    """
    if not isinstance(problem, Problem):
        raise InputError(f"layer_table takes an ngeval.Problem, not {type(problem).__name__}")
    resolved = get_methods(methods)
    lambdas = check_dampings(dampings)
    check_scale(damping_scale)
    if metric is not None and metric.problem is not problem:
        raise InputError("the metric was made for another problem; make one for this one")
    chosen = make_groups({n: p.numel() for n, p in problem.function.parameters.items()}, groups)
    problem.shards.synchronized(problem.function.check_unchanged)
    done = on_step or (lambda _: None)
    with torch.inference_mode(False):  # tensors made here take part in backward passes
        kernel = Kernel(problem)
        graded = Metric(problem) if metric is None else metric
        plain = parts_of(graded, problem.gradient(), chosen).gammas
        least, missing = _least_gammas(kernel, chosen, wanted=natural and metric is None)
        tables = []
        for method in resolved:
            rows = _method_rows(kernel, graded, method, lambdas, chosen, (damping_scale, seed))
            for row in rows:
                table = pd.DataFrame(row)
                ratios = {"gamma_over_sgd": plain, "gamma_over_best": least}
                table = table.assign(**{name: table["gamma"] / by for name, by in ratios.items()})
                tables.append(_noted(table, missing))
            done(method.name)
        samples = problem.num_samples if metric is None else metric.totals.num_samples
    table = pd.concat(tables, ignore_index=True).assign(
        damping_scale=damping_scale,
        num_samples=problem.num_samples,
        metric_samples=samples,
        likelihood=problem.likelihood.name,
        dtype=str(problem.dtype).removeprefix("torch."),
        engine=problem.engine,
        seed=seed,
    )
    return table.reindex(columns=COLUMNS)


def parts_of(metric: Metric, direction: Tensor, groups: Sequence[Group]) -> Parts:
    """What the parts of an update are worth.

    They go through the model at unit length, as many at a time as there is room for, each time
    with the whole update beside them.

    Args:
        metric: whose F and g.
        direction: d, shape ``(P,)``.
        groups: that d falls into.

    Raises:
        InputError: the direction does not fit or is not finite.
    """
    wide = metric.problem.as_vector(direction).to(torch.float64)
    # Before anything is squared: d(λ) grows as 1/λ.
    size = torch.linalg.vector_norm(wide, math.inf).clamp_min(1e-300)
    wide = wide / size
    norms = torch.stack([torch.cat([wide[p] for p in group.places]).norm() for group in groups])
    own, cross, decrease = (torch.zeros_like(norms) for _ in range(3))
    total = math.nan
    for chosen in _chunks(metric.problem, len(groups)):
        forms = metric.forms(_unit_rows(metric.problem, wide, groups[chosen], norms[chosen]))
        own[chosen] = forms.curvature.diagonal()[1:].clamp_min(0)
        cross[chosen] = forms.curvature[0, 1:]
        decrease[chosen] = forms.decrease[1:]
        total = float(_gammas(forms.curvature[0, 0].clamp_min(0), forms.decrease[0]))
    part, whole = norms * size, wide.norm() * size
    return Parts(
        decrease=_numbers(decrease * part),
        curvature=_numbers(cross * part * whole),
        own_curvature=_numbers(own * part.square()),
        norms=_numbers(part),
        gammas=_numbers(_gammas(own, decrease)),
        gamma_total=total,
    )


def _numbers(column: Tensor) -> np.ndarray:
    return column.cpu().numpy()


def _gammas(curvature: Tensor, decrease: Tensor) -> Tensor:
    """√(dᵀFd) / |dᵀg|, NaN where dᵀg = 0."""
    return torch.where(decrease != 0, curvature.sqrt() / decrease.abs(), math.nan)


def _chunks(problem: Problem, count: int) -> Iterator[slice]:
    """As many parts as fit in the memory budget beside the whole."""
    room = problem.rows.memory // (problem.num_parameters * problem.dtype.itemsize)
    return slices(count, max(1, room - 1))


def _unit_rows(problem: Problem, wide: Tensor, groups: Sequence[Group], norms: Tensor) -> Tensor:
    """The update and its parts at unit length, in the model's dtype: shape ``(1 + groups, P)``."""
    rows = torch.zeros(1 + len(groups), len(wide), dtype=problem.dtype, device=wide.device)
    rows[0] = wide / wide.norm().clamp_min(1e-300)
    for row, group, norm in zip(rows[1:], groups, norms, strict=True):
        for place in group.places:
            row[place] = wide[place] / norm.clamp_min(1e-300)
    return rows


def _least_gammas(
    kernel: Kernel, groups: Sequence[Group], *, wanted: bool
) -> tuple[np.ndarray, str]:
    """Each layer's least γ, and why there is none where there is none."""
    nothing = np.full(len(groups), math.nan)
    if not wanted:
        return nothing, ""
    try:
        shards = kernel.problem.shards
        found = shards.synchronized(lambda: fisher_blocks(kernel, groups).least_gammas())
    except (NgevalError, RuntimeError, MemoryError) as error:  # LAPACK's are RuntimeErrors
        return nothing, f"no least γ of layers: {failure_reason(error)}"
    least = np.array([found[group.name] for group in groups])
    return np.where(np.isfinite(least), least, math.nan), ""


def _noted(table: pd.DataFrame, note: str) -> pd.DataFrame:
    """Add a note to rows that are not failures."""
    if not note:
        return table
    joined = [f"{reason}; {note}" if reason else note for reason in table["reason"]]
    return table.assign(reason=np.where(table["status"] == "ok", joined, table["reason"]))


def _method_rows(
    kernel: Kernel,
    metric: Metric,
    method: Method,
    dampings: Sequence[float],
    groups: Sequence[Group],
    options: tuple[str, int],
) -> list[dict[str, Any]]:
    """The columns of every λ; a method that cannot be computed is data too."""
    scale, seed = options
    common = {
        "method": method.name,
        "layer": [group.name for group in groups],
        "num_parameters": [group.num_parameters for group in groups],
    }
    absolute = [math.nan] * len(dampings)
    shards = metric.problem.shards
    try:
        prepared = shards.synchronized(lambda: prepare(kernel, method, dampings, scale, seed))
        absolute = prepared.absolute
        found = shards.synchronized(
            lambda: [
                _part_columns(parts_of(metric, prepared.updates.direction(i), groups), prepared)
                for i in range(prepared.updates.count)
            ]
        )
    except Exception as error:  # a method may be anybody's; its failure is data
        missing = dict.fromkeys(NUMBERS, math.nan)
        found = [{**missing, "status": "failed", "reason": failure_reason(error)}]
    if len(found) == 1:
        found *= len(dampings)
    return [
        {**common, "damping": damping, "damping_absolute": used, **columns}
        for damping, used, columns in zip(dampings, absolute, found, strict=True)
    ]


def _part_columns(parts: Parts, prepared: Prepared) -> dict[str, Any]:
    """The columns of one update."""
    decrease_share, curvature_share = _shares(parts.decrease), _shares(parts.curvature)
    defined = np.isfinite(parts.gammas)
    nothing = np.where(parts.norms > 0, "d_lᵀg = 0", "the update is 0 in this layer")
    return {
        "gamma": parts.gammas,
        "decrease": parts.decrease,
        "decrease_share": decrease_share,
        "curvature": parts.curvature,
        "curvature_share": curvature_share,
        "excess": curvature_share - decrease_share,
        "own_curvature": parts.own_curvature,
        "update_norm": parts.norms,
        "gamma_total": parts.gamma_total,
        "coverage": prepared.coverage,
        "status": np.where(defined, "ok", "undefined").astype(object),
        "reason": np.where(defined, prepared.remarks, nothing).astype(object),
    }


def _shares(parts: np.ndarray) -> np.ndarray:
    """Parts of a sum that is not 0, NaN otherwise."""
    total = parts.sum()
    return parts / (total if total != 0 else math.nan)
