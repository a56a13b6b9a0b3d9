"""The quality of each layer of an update: where does an optimizer lose it?

An update d is the sum of the parts d_l of its layers, with every other layer's entries set to 0.
Each part has its γ, and what the whole update buys and spends are sums over layers:
dᵀg = Σ_l d_lᵀg and dᵀFd = Σ_l d_lᵀFd. A layer whose share of dᵀFd is greater than its share of dᵀg
spends more than it buys. For the natural gradient, Fd = g, the two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer

from ngeval.curvature.fisher_blocks import fisher_blocks
from ngeval.curvature.kernel import Kernel
from ngeval.dampings import check_dampings
from ngeval.grading.evaluate import DAMPING_COLUMNS, SETTING_COLUMNS
from ngeval.grading.prepare import (
    NUMERICAL,
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
from ngeval.model.directions import slices
from ngeval.model.parameter_groups import Group, Groups, make_groups
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem

NUMBERS = [
    "gamma",
    "gamma_over_sgd",
    "gamma_over_best",
    "decrease",
    "decrease_share",
    "curvature",
    "curvature_share",
    "excess",
    "own_curvature",
    "update_norm",
    "gamma_total",
    "coverage",
]
"""The columns of a part's grades."""

COLUMNS = [
    "method",
    *DAMPING_COLUMNS,
    "layer",
    "num_parameters",
    *NUMBERS,
    "status",
    "reason",
    "note",
    "num_samples",
    "metric_samples",
    *SETTING_COLUMNS,
]
"""The columns of `layer_table`, in order."""


@dataclass(frozen=True)
class Parts:
    """The quality of the parts of one update: float64, shape ``(groups,)``.

    Attributes:
        gamma_total: γ(d), of the whole update.
        decrease: d_lᵀg.
        curvature: d_lᵀFd, the part's share of dᵀFd with all cross terms.
        own_curvature: d_lᵀFd_l.
        norms: ‖d_l‖.
        gammas: γ(d_l), NaN where d_lᵀg = 0.
    """

    gamma_total: float
    decrease: np.ndarray
    curvature: np.ndarray
    own_curvature: np.ndarray
    norms: np.ndarray
    gammas: np.ndarray


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
        groups: ``"layer"``: parameters of one module together; ``"parameter"``: each alone; a
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
          other layers undo what this layer does), and ``curvature_share``, which adds up to 1;
        - ``excess``: curvature_share − decrease_share = ∂ log γ / ∂ log η_l for a learning rate η_l
          of that layer alone: where it is positive, a smaller step in that layer would lower γ. It
          is 0 in every layer for the natural gradient;
        - ``own_curvature`` d_lᵀFd_l; ``update_norm`` ‖d_l‖; ``gamma_total``: γ of the whole update;
          ``coverage``: the percentage of all parameters that the method treats itself;
        - ``status`` (``"ok"``, ``"undefined"`` or ``"failed"``), ``reason``, ``note``;
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
    check_request(problem, damping_scale, metric)
    resolved, lambdas = get_methods(methods), check_dampings(dampings)
    layers = make_groups({n: p.numel() for n, p in problem.function.parameters.items()}, groups)
    tables = []
    with torch.inference_mode(False):  # tensors made here take part in backward passes
        kernel = Kernel(problem)
        grader = Metric(problem) if metric is None else metric
        sgd = parts_of(grader, problem.gradient(), layers).gammas
        least: np.ndarray | Failure = np.full(len(layers), math.nan)
        if natural and metric is None:
            least = attempt(problem.shards, partial(_least_gammas, kernel, layers), NUMERICAL)
        for method in resolved:
            prepared = attempt(
                problem.shards, partial(prepare, kernel, method, lambdas, damping_scale, seed)
            )
            table = _method_table(method.name, lambdas, prepared, layers, grader)
            table["gamma_over_sgd"] = table["gamma"] / np.tile(sgd, len(lambdas))
            if isinstance(least, Failure):
                table["gamma_over_best"] = math.nan
                table = add_note(table, f"no least γ of layers: {least.reason}")
            else:
                table["gamma_over_best"] = table["gamma"] / np.tile(least, len(lambdas))
            tables.append(table)
            if on_step is not None:
                on_step(method.name)
        columns = common_columns(problem, metric, damping_scale, seed)
    return pd.concat(tables, ignore_index=True).assign(**columns).reindex(columns=COLUMNS)


def parts_of(metric: Metric, direction: Tensor, groups: Sequence[Group]) -> Parts:
    """Grade the parts of an update.

    They are pushed through the model at unit length, as many at a time as fit in memory, each time
    together with the whole update.

    Args:
        metric: whose F and g.
        direction: d, shape ``(P,)``.
        groups: of parameters, one for each part.

    Raises:
        InputError: the direction does not fit or is not finite.
    """
    wide = metric.problem.as_vector(direction).to(torch.float64)
    # Before anything is squared: d(λ) grows as 1/λ.
    size = torch.linalg.vector_norm(wide, math.inf).clamp_min(1e-300)
    wide = wide / size
    norms = torch.stack([torch.cat([wide[p] for p in group.places]).norm() for group in groups])
    squares, cross, decrease = (torch.zeros_like(norms) for _ in range(3))
    total = math.nan
    # As many parts as fit in the memory budget beside the whole.
    room = metric.problem.rows.memory // (len(wide) * metric.problem.dtype.itemsize)
    for chosen in slices(len(groups), max(1, room - 1)):
        forms = metric.forms(_unit_rows(metric.problem, wide, groups[chosen], norms[chosen]))
        squares[chosen] = forms.curvature.diagonal()[1:].clamp_min(0)
        cross[chosen] = forms.curvature[0, 1:]
        decrease[chosen] = forms.decrease[1:]
        total = float(_gammas(forms.curvature[0, 0], forms.decrease[0]))
    part, whole = norms * size, wide.norm() * size
    gammas = _gammas(squares, decrease)
    columns = (decrease * part, cross * part * whole, squares * part.square(), part, gammas)
    return Parts(total, *(column.cpu().numpy() for column in columns))


def _gammas(squares: Tensor, decrease: Tensor) -> Tensor:
    return torch.where(decrease != 0, squares.clamp_min(0).sqrt() / decrease.abs(), math.nan)


def _unit_rows(problem: Problem, wide: Tensor, groups: Sequence[Group], norms: Tensor) -> Tensor:
    """The update and its parts at unit length, in the model's dtype: shape ``(1 + groups, P)``."""
    rows = torch.zeros(1 + len(groups), len(wide), dtype=problem.dtype, device=wide.device)
    rows[0] = wide / wide.norm().clamp_min(1e-300)
    for row, group, norm in zip(rows[1:], groups, norms, strict=True):
        for place in group.places:
            row[place] = wide[place] / norm.clamp_min(1e-300)
    return rows


def _least_gammas(kernel: Kernel, layers: Sequence[Group]) -> np.ndarray:
    """Each layer's least γ, NaN where its gradient is 0."""
    gammas = fisher_blocks(kernel, layers).least_gammas()
    least = np.array([gammas[layer.name] for layer in layers])
    return np.where(np.isfinite(least), least, math.nan)


def _method_table(
    name: str,
    dampings: Sequence[float],
    prepared: Prepared | Failure,
    layers: Sequence[Group],
    metric: Metric,
) -> pd.DataFrame:
    """The rows of one method: every layer at the first λ, then at the next."""
    count = len(dampings)
    parts: list[dict[str, Any]] | Failure
    if isinstance(prepared, Failure):
        absolute, parts = [math.nan] * count, prepared
    else:
        absolute, updates = prepared.absolute, prepared.updates
        parts = attempt(
            metric.problem.shards,
            lambda: [  # one direction in memory at a time
                _part_columns(parts_of(metric, updates.direction(i), layers), prepared)
                for i in range(updates.count)
            ],
        )
    if isinstance(parts, Failure):
        missing = dict.fromkeys(NUMBERS, math.nan)
        parts = [{**missing, "status": "failed", "reason": parts.reason, "note": ""}]
    if len(parts) == 1:
        parts = parts * count
    common = {
        "method": name,
        "layer": [layer.name for layer in layers],
        "num_parameters": [layer.num_parameters for layer in layers],
    }
    rows = [
        pd.DataFrame({**common, "damping": damping, "damping_absolute": used, **columns})
        for damping, used, columns in zip(dampings, absolute, parts, strict=True)
    ]
    return pd.concat(rows, ignore_index=True)


def _part_columns(parts: Parts, prepared: Prepared) -> dict[str, Any]:
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
        "reason": np.where(defined, "", nothing).astype(object),
        "note": prepared.remarks,
    }


def _shares(parts: np.ndarray) -> np.ndarray:
    """Parts of a sum that is not 0, NaN otherwise."""
    total = parts.sum()
    return parts / (total if total != 0 else math.nan)
