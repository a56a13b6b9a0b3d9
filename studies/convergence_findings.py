"""Findings of *convergence*: Wu et al.'s theorems on iEF (arXiv 2406.06420)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from studies.base import Finding, decide
from studies.statistics import Interval, geometric_interval, mean_interval

ONE_OUTPUT = "squared error, 1 output"
FOUR_OUTPUTS = "squared error, 4 outputs"
CROSS_ENTROPY = "cross-entropy"
REGRESSIONS = (ONE_OUTPUT, FOUR_OUTPUTS)

PAPER = "Wu et al., arXiv 2406.06420, convergence analysis of iEF"

PACE = 0.1
"""EF and SGD take the number of steps that iEF takes at this η."""

CLOSE = 0.1
"""Largest relative error of a fitted rate or exponent."""

INSIDE = 0.99
"""Share of samples and steps between their bounds from which on the prediction holds."""

LATE = 0.25
"""The exponent of a power law is fitted from this part of the time on."""


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One finding for each claim.

    Raises:
        InputError: a loss is missing.
    """
    missing = [kind for kind in (*REGRESSIONS, CROSS_ENTROPY) if kind not in set(rows["kind"])]
    if missing:
        raise InputError(f"the rows lack {', '.join(missing)}; was the run interrupted?")
    return [_linear(rows), _sublinear(rows), _each_sample(rows), _against_others(rows)]


def _linear(rows: pd.DataFrame) -> Finding:
    """The rate of ln L per unit of t for the squared error."""
    outcomes, evidence = [], []
    for kind in REGRESSIONS:
        for rate, part in _trainings(rows, kind):
            expected = 2 * math.log1p(-rate) / rate
            slope = mean_interval([exponential_rate(run) for _, run in part.groupby("seed")])
            outcomes.append(_all_within(slope, expected, CLOSE))
            evidence.append(f"{kind}, η = {rate:g}: {slope.text()}, predicted {expected:.3g}")
    return Finding(
        "With the squared error, iEF converges linearly: ℓ_n(t) = ℓ_n(0)e^(−2t)",
        PAPER,
        decide(outcomes),
        "Slope of ln L against t = η × steps, means over seeds; a step is predicted to multiply "
        "the loss by (1 − η)²: " + "; ".join(evidence) + ".",
        f"the 95 % interval lies within {CLOSE:.0%} of the prediction; a case for each η and "
        "number of outputs",
    )


def _sublinear(rows: pd.DataFrame) -> Finding:
    """The exponent of L as a power of t for the cross-entropy, late."""
    outcomes, evidence = [], []
    for rate, part in _trainings(rows, CROSS_ENTROPY):
        runs = [run for _, run in part.groupby("seed")]
        exponent, low, high = (
            mean_interval([power_exponent(run, column) for run in runs])
            for column in ("loss", "low", "high")
        )
        ends = sorted((low.value, high.value))
        between = Interval(math.nan, ends[0] * (1 + CLOSE), ends[1] * (1 - CLOSE))
        outcomes.append(between.holds(exponent.low) and between.holds(exponent.high))
        evidence.append(
            f"η = {rate:g}: {exponent.text()}, the two curves {low.value:.3g} and {high.value:.3g}"
        )
    return Finding(
        "With softmax cross-entropy, iEF converges sub-linearly, the loss falling like 1/t",
        PAPER,
        decide(outcomes),
        f"Exponent of the mean loss as a power of t over the last {1 - LATE:.0%} of the time, "
        "means over seeds, against those of the two curves between which theory has it: "
        + "; ".join(evidence)
        + ".",
        f"the 95 % interval lies between the curves' exponents, to within {CLOSE:.0%}; a case "
        "for each η",
    )


def _each_sample(rows: pd.DataFrame) -> Finding:
    """The share of samples that stay between their own bounds."""
    outcomes, evidence = [], []
    for kind in (*REGRESSIONS, CROSS_ENTROPY):
        for rate, part in _trainings(rows, kind):
            inside, falling = float(part["within"].mean()), float(part["falling"].mean())
            outcomes.append(inside >= INSIDE)
            evidence.append(f"{kind}, η = {rate:g}: {inside:.1%} ({falling:.1%} falling)")
    return Finding(
        "Under iEF every sample's loss falls by itself, as dℓ_n/dt = −‖u_n‖² has it",
        PAPER,
        decide(outcomes),
        "Share of samples and steps with ℓ_n between the bounds of the flow that starts at ℓ_n(0), "
        "to within 10 %, and of those with less loss than the step before: "
        + "; ".join(evidence)
        + ".",
        f"at least {INSIDE:.0%} are between them; a case for each loss and η",
    )


def _against_others(rows: pd.DataFrame) -> Finding:
    """The loss of iEF against EF's and SGD's after the same steps, each at its best η."""
    outcomes, evidence = [], []
    for kind in (*REGRESSIONS, CROSS_ENTROPY):
        best = compared(rows, kind)
        ief = best.pop("ief")
        for name, other in best.items():
            ratio = geometric_interval((_last_losses(ief) / _last_losses(other)).dropna())
            outcomes.append(ratio.is_below(1))
            rates = [_rate_text(rows, part) for part in (other, ief)]
            evidence.append(
                f"{kind}, {name.upper()} (η = {rates[0]}, iEF {rates[1]}): {ratio.text()}"
            )
    tried = rows.groupby(["kind", "method"])["learning_rate"].nunique()
    return Finding(
        "iEF's training loss is below EF's and SGD's after as many full-batch steps",
        f"{PAPER}; abstract (faster convergence)",
        decide(outcomes),
        f"Loss of iEF over that of the other, each at the best of the {tried.min()} learning rates "
        "tried for it (*: the least or the largest), geometric means over seeds: "
        + "; ".join(evidence)
        + ".",
        "the 95 % interval of the ratio lies below 1; a case for each loss and other optimizer",
    )


def _rate_text(rows: pd.DataFrame, best: pd.DataFrame) -> str:
    """The best η, marked with a star where it is the least or the largest of those tried."""
    kind, method, rate = (best[key].iloc[0] for key in ("kind", "method", "learning_rate"))
    tried = rows.loc[(rows["kind"] == kind) & (rows["method"] == method), "learning_rate"]
    return f"{rate:g}" + "*" * (rate in (tried.min(), tried.max()))


def exponential_rate(rows: pd.DataFrame) -> float:
    """The slope of ln L against t, over losses that are larger than rounding errors."""
    rows = rows[rows["loss"] > 1e-12 * rows["loss"].max()]
    return float(np.polyfit(rows["time"], np.log(rows["loss"]), 1)[0])


def power_exponent(rows: pd.DataFrame, column: str = "loss") -> float:
    """The slope of ln L against ln t late in a training."""
    rows = rows[rows["time"] >= LATE * rows["time"].max()]
    return float(np.polyfit(np.log(rows["time"]), np.log(rows[column]), 1)[0])


def compared(rows: pd.DataFrame, kind: str) -> dict[str, pd.DataFrame]:
    """The trainings of iEF, EF and SGD with one loss, over the same steps, each at its best η."""
    rows = rows[rows["kind"] == kind]
    rows = rows[rows["step"] <= rows.loc[rows["method"] != "ief", "step"].max()]
    return {name: _at_best_rate(rows[rows["method"] == name]) for name in ("ief", "ef", "sgd")}


def _at_best_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """An optimizer's trainings at the η with the least loss at the end.

    An η at which a training diverged is not the best, unless trainings diverged at every η.
    """
    scores = {}
    for rate in rows["learning_rate"].unique():
        part = rows[rows["learning_rate"] == rate]
        last = np.log(_last_losses(part))
        ended = bool((part["status"] == "ok").all() and np.isfinite(last).all())
        scores[rate] = float(last.mean()) if ended else math.inf
    best = min(scores, key=lambda rate: scores[rate])
    trainings: pd.DataFrame = rows[rows["learning_rate"] == best]
    return trainings


def _trainings(rows: pd.DataFrame, kind: str) -> list[tuple[float, pd.DataFrame]]:
    """The trainings of iEF with one loss by η, over the steps that have a prediction."""
    rows = rows[(rows["kind"] == kind) & (rows["method"] == "ief") & rows["low"].notna()]
    return [(rate, rows[rows["learning_rate"] == rate]) for rate in rows["learning_rate"].unique()]


def _last_losses(rows: pd.DataFrame) -> pd.Series[float]:
    last = rows[rows["step"] == rows["step"].max()]
    return pd.Series(last["loss"].to_numpy(dtype=float), index=last["seed"])


def _all_within(interval: Interval, expected: float, tolerance: float) -> bool:
    """Whether both ends are that close to a number; False where they are NaN."""
    return max(abs(end / expected - 1) for end in interval[1:]) <= tolerance
