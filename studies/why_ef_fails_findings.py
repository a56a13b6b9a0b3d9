"""Findings of *why EF fails*: the claims of Wu et al. (arXiv 2406.06420)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from studies.base import Finding, decide
from studies.statistics import (
    Interval,
    at_best_damping,
    geometric_intervals,
    rank_correlation,
    slope_interval,
)

PAPER = "Wu et al., arXiv 2406.06420"
SMALL = 1e-7
"""The near-zero λ at which updates are compared."""

EQUAL = 0.01
"""Largest relative difference of numbers that should be equal."""

ROBUST = 1.1
"""A method is robust up to this γ at the near-zero λ over γ at the best λ."""


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One finding for each claim.

    Raises:
        InputError: a part of the rows is missing.
    """
    parts = {name: rows[rows["part"] == name] for name in ("toy", "gamma", "samples")}
    missing = [name for name, part in parts.items() if part.empty]
    if missing:
        raise InputError(f"the rows lack the part {', '.join(missing)}; was the run interrupted?")
    samples, gammas = parts["samples"], parts["gamma"]
    return [
        *_of_samples(samples),
        _of_imbalance(gammas),
        _closer(gammas, each_at_best=False),
        _closer(gammas, each_at_best=True),
        _of_damping(gammas),
        _of_toy(parts["toy"]),
    ]


def _of_samples(samples: pd.DataFrame) -> list[Finding]:
    """What EF and iEF do to each sample, against ℓ, s and ‖g‖."""
    stages = list(dict.fromkeys(samples["epoch"]))
    by_stage = {
        name: [
            samples[(samples["method"] == name) & (samples["epoch"] == stage)] for stage in stages
        ]
        for name in ("ef", "ief", "sgd")
    }
    spread = [rows["loss_change"].min() / rows["loss_change"].max() for rows in by_stage["ef"]]
    squares = [rows["residual_square"] for rows in by_stage["ef"]]
    spans = [values.max() / values.min() for values in squares]
    ratios = [-rows["loss_change"] / rows["residual_square"] for rows in by_stage["ief"]]
    errors = [float((ratio - 1).abs().max()) for ratio in ratios]
    slopes = {
        name: [
            slope_interval(np.log(rows["gradient_norm"]), np.log(rows["projection"].abs()))
            for rows in by_stage[name]
        ]
        for name in by_stage
    }
    ef = [slope.value for slope in slopes["ef"]]
    medians = {
        name: f"{np.median([slope.value for slope in slopes[name]]):.2f}" for name in ("ief", "sgd")
    }
    places = f"{len(stages)} stages of training, N = {samples['sample'].nunique()}"
    return [
        Finding(
            "EF at λ → 0 lowers every sample's loss by the same amount, however well it is learnt",
            f"{PAPER}, inversely-scaled projection issue",
            decide([abs(value) <= 1 + EQUAL and value > 0 for value in spread]),
            f"Largest over smallest first-order fall of ℓ_n under EF: at most {max(spread):.6g} in "
            f"{places}, while s_n = ‖u_n‖² spans a factor of up to {max(spans):.2g} in a batch.",
            f"at every stage within {EQUAL:.0%} of 1",
        ),
        Finding(
            "iEF at λ → 0 lowers every sample's loss in proportion to s_n = ‖u_n‖²",
            f"{PAPER}, improved empirical Fisher",
            decide([value <= EQUAL for value in errors]),
            "Largest relative departure of the fall of ℓ_n from s_n under iEF: "
            f"{max(errors):.2g} in {places}.",
            f"at every stage at most {EQUAL:.0%}",
        ),
        Finding(
            "EF's update has the projection 1/‖g_n‖ on the gradient direction of sample n",
            f"{PAPER}, inversely-scaled projection issue",
            decide([abs(value + 1) <= EQUAL for value in ef]),
            f"Slope of log projection on log ‖g_n‖ under EF: {min(ef):.6g} to {max(ef):.6g} in "
            f"{places}; median slope of iEF {medians['ief']}, of SGD {medians['sgd']}.",
            f"slope within {EQUAL:.0%} of −1 at every stage",
        ),
    ]


def _of_imbalance(gammas: pd.DataFrame) -> Finding:
    """The rank correlation of the imbalance with γ/γ_SGD at the near-zero λ."""
    near = near_zero(gammas)
    correlations = {}
    for method in ("ef", "sf", "ief"):
        rows = near[near["method"] == method]
        groups = list(zip(rows["training_seed"], rows["epoch"], strict=True))
        correlations[method] = rank_correlation(rows["imbalance"], rows["gamma_over_sgd"], groups)
    ranges = near.groupby("method")["gamma_over_sgd"].agg(["min", "max"])
    spans = ", ".join(
        f"{m} {ranges['min'][m]:.2g} to {ranges['max'][m]:.2g}" for m in ("ef", "sf", "ief")
    )
    return Finding(
        "EF's approximation gets worse with the imbalance max‖g_n‖/min‖g_n‖ of gradient norms",
        f"{PAPER}, experiment on approximation quality",
        decide([correlations["ef"].is_above(0)]),
        f"Spearman's ρ of the imbalance with γ/γ_SGD at λ = {SMALL:g} over "
        f"{len(near[near['method'] == 'ef'])} batches: EF "
        f"{correlations['ef'].text('.2f')}, SF {correlations['sf'].text('.2f')}, iEF "
        f"{correlations['ief'].text('.2f')}. γ/γ_SGD runs over {spans}.",
        "the 95 % bootstrap interval (drawing checkpoints) of EF's ρ lies above 0",
    )


def _closer(gammas: pd.DataFrame, *, each_at_best: bool) -> Finding:
    """γ_iEF against γ_EF and γ_SF at every stage of training."""
    rows = (
        at_best_damping(gammas, ["epoch"], "gamma_over_sgd") if each_at_best else near_zero(gammas)
    )
    where = "With each method at its best λ" if each_at_best else f"At λ = {SMALL:g}"
    ratios = {other: _ratio(rows, "ief", other) for other in ("ef", "sf", "sgd")}
    outcomes = [i.is_below(1) for other in ("ef", "sf") for i in ratios[other].values()]
    evidence = []
    for other, by_epoch in ratios.items():
        above = [f"{epoch:g}" for epoch, interval in by_epoch.items() if not interval.is_below(1)]
        first, last = min(by_epoch), max(by_epoch)
        evidence.append(
            f"γ_iEF/γ_{other.upper()} {by_epoch[first].text()} at epoch {first:g}, "
            f"{by_epoch[last].text()} at epoch {last:g}; below 1 at every epoch"
            + (f" but {', '.join(above)}" if above else "")
        )
    return Finding(
        "iEF approximates the natural gradient consistently better than EF and SF"
        + (", also where each is given its best damping" if each_at_best else " at near-zero λ"),
        f"{PAPER}, experiment on approximation quality",
        decide(outcomes),
        f"{where}, geometric means over trainings and batches: " + "; ".join(evidence) + ".",
        "the 95 % interval of γ_iEF/γ_EF and of γ_iEF/γ_SF lies below 1, at every epoch",
    )


def _of_damping(gammas: pd.DataFrame) -> Finding:
    """γ at the near-zero λ against γ at the best λ."""
    keys = ["training_seed", "epoch", "batch", "method"]
    near = near_zero(gammas).set_index(keys)["gamma"]
    cost = (near / usable(gammas).groupby(keys)["gamma"].min()).rename("cost").reset_index()
    worst: dict[str, tuple[float, Interval]] = {}
    for method in ("ef", "sf", "ief"):
        by_epoch = geometric_intervals(cost[cost["method"] == method], "epoch", "cost")
        epoch = max(by_epoch, key=lambda key: by_epoch[key].value)
        worst[method] = epoch, by_epoch[epoch]
    sensitive = [worst[name][1].is_above(ROBUST) for name in ("ef", "sf")]
    outcomes = [*sensitive, worst["ief"][1].is_below(ROBUST)]
    evidence = "; ".join(f"{n} {i.text()} (epoch {epoch:g})" for n, (epoch, i) in worst.items())
    return Finding(
        "EF and SF are highly sensitive to damping, iEF is robust with near-zero damping",
        f"{PAPER}, experiment on the impact of damping",
        decide(outcomes),
        f"γ at λ = {SMALL:g} over γ at the best λ of those tried, at each method's worst epoch: "
        f"{evidence}.",
        f"the interval lies above {ROBUST:g} for EF and for SF, and below it for iEF",
    )


def _of_toy(toy: pd.DataFrame) -> Finding:
    """Whether iEF is the natural gradient on the toy, and where EF ends."""
    lowest = toy.groupby(["method", "start"])["loss"].min()
    last = toy[toy["step"] == toy["step"].max()].set_index(["method", "start"])["loss"]
    same = float(toy[toy["method"] == "ief"]["cosine_ng"].min())
    other = float(toy[toy["method"] == "ef"]["cosine_ng"].mean())
    starts = list(last["ef"].index)
    settled = [bool(last["ef"][s] > last["ief"][s]) for s in starts]
    jump = max(float(last["ef"][s] / lowest["ef"][s]) for s in starts)
    return Finding(
        "On linear least squares iEF takes the path of the natural gradient, EF a distorted one",
        f"{PAPER}, figure on two parameters and two data",
        decide([same > 1 - 1e-6, other < 1 - EQUAL, *settled]),
        f"Cosine with the natural gradient on the paths: iEF at least {same:.9f}, EF {other:.2f} "
        f"on average. Largest loss after {toy['step'].max():g} steps, {len(starts)} starts: iEF "
        f"{last['ief'].max():.2g}, SGD {last['sgd'].max():.2g}, EF {last['ef'].max():.2g}, up to "
        f"{jump:.2g} times the least that EF had met with on its way.",
        "iEF's cosine is 1 to 10⁻⁶, EF's mean cosine below 0.99, and EF's last loss above iEF's "
        "from every start",
    )


def usable(gammas: pd.DataFrame) -> pd.DataFrame:
    """The rows that could be computed."""
    return gammas[gammas["status"] == "ok"]


def near_zero(gammas: pd.DataFrame) -> pd.DataFrame:
    """The rows at λ = `SMALL`.

    Raises:
        InputError: no row has this λ.
    """
    rows = usable(gammas)
    rows = rows[np.isclose(rows["damping"], SMALL, rtol=1e-6, atol=0)]
    if rows.empty:
        raise InputError(f"the rows have none at λ = {SMALL:g}")
    return rows


def _ratio(rows: pd.DataFrame, method: str, other: str) -> dict[float, Interval]:
    """γ of one method over γ of another on the same batch: geometric means by epoch."""
    keys = ["training_seed", "epoch", "batch"]
    table = rows.pivot_table(index=keys, columns="method", values="gamma_over_sgd")
    ratio = (table[method] / table[other]).rename("ratio").reset_index()
    return geometric_intervals(ratio, "epoch", "ratio")
