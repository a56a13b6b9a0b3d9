"""How full-batch iEF converges on a network with more parameters than samples.

At λ → 0, with linearly independent per-sample gradients, iEF's flow lowers each sample's loss
independently of the others, dℓ_n/dt = −s_n with s_n = ‖u_n‖² and t = η × steps. For the squared
error (σ² = 1) s_n = 2ℓ_n, so ℓ_n(t) = ℓ_n(0)e^{−2t}: linear convergence. For softmax cross-entropy,
with p = e^{−ℓ_n} the probability of the label, s_n lies between (1 − p)²C/(C − 1), where the other
classes are equally likely, and 2(1 − p)², where one of them has all the rest: ℓ_n falls like 1/t,
sub-linearly. Source: Wu et al. (arXiv 2406.06420), the two theorems on the convergence of iEF; the
curves are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from scipy.special import wrightomega
from torch import Tensor, nn

from ngeval.errors import NgevalError
from ngeval.model.inputs import map_tensors
from ngeval.optim import EF, iEF
from ngeval.problem.problem import Problem
from ngeval.tasks import get_task
from studies.base import Advance, Size, Study
from studies.convergence_figure import figure
from studies.convergence_findings import (
    CROSS_ENTROPY,
    FOUR_OUTPUTS,
    ONE_OUTPUT,
    PACE,
    REGRESSIONS,
    findings,
)

T = TypeVar("T")

DAMPING = 1e-12
"""λ, negligible against the diagonal of K, which is about 10 s_n for these networks."""

TOLERANCE = 0.1
"""Largest relative distance of a loss from its bounds: steps are not a flow."""

PIXELS = 64

THINNED = 5
"""Every fifth step of EF and SGD has a row."""


@dataclass(frozen=True)
class Fit:
    """A problem to fit.

    Attributes:
        task: the source of the data.
        likelihood: name of the likelihood.
        outputs: C; a regression with fewer outputs than the task has takes the last ones.
    """

    task: str
    likelihood: str
    outputs: int


FITS = {
    ONE_OUTPUT: Fit("digits-regression", "gaussian:1", 1),
    FOUR_OUTPUTS: Fit("digits-regression", "gaussian:1", 4),
    CROSS_ENTROPY: Fit("digits-mlp", "categorical", 10),
}


@dataclass(frozen=True)
class Plan:
    """The extent of a size.

    Attributes:
        seeds: number of seeds, of weights and samples.
        samples: N, the whole batch.
        width: of the hidden layer.
        times: η × steps up to which theory and training are compared, by loss.
        rates: η of iEF, by loss; the first three are compared with theory, which is of a flow.
        contrast: η of EF, and of SGD for the mean loss.
    """

    seeds: int
    samples: int
    width: int
    times: dict[str, float]
    rates: dict[str, tuple[float, ...]]
    contrast: dict[str, tuple[float, ...]]


def _by_loss(regression: T, classification: T) -> dict[str, T]:
    return dict.fromkeys(REGRESSIONS, regression) | {CROSS_ENTROPY: classification}


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        2,
        16,
        64,
        _by_loss(1.5, 3.0),
        _by_loss((PACE, 0.3), (PACE, 0.3)),
        {"ef": (0.01, 0.1), "sgd": (0.03, 0.1)},
    ),
    "full": Plan(
        5,
        48,
        256,
        _by_loss(6.0, 20.0),
        _by_loss((0.03, PACE, 0.3, 0.5, 0.7, 0.9), (0.03, PACE, 0.3, 1.0, 3.0, 10.0)),
        {
            "ef": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
            "sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        },
    ),
}


def predicted(initial: Tensor, time: float, kind: str, classes: int) -> tuple[Tensor, Tensor]:
    """The least and the largest ℓ_n(t) of the flow, from the ℓ_n(0).

    Squared error: ℓ_n(0)e^{−2t}, both. Cross-entropy: dp/dt = k p(1 − p)² with k = 2 and
    k = C/(C − 1) has ln(p/(1 − p)) + 1/(1 − p) = kt + const, so that p/(1 − p) = ω(c + kt) with
    Wright's function ω(c) + ln ω(c) = c, and ℓ = ln(1 + 1/ω).

    Args:
        initial: ℓ_n(0) > 0 in nats, float64.
        time: t = η × steps.
        kind: of the loss, a key of `FITS`.
        classes: C.
    """
    if kind in REGRESSIONS:
        return (initial * math.exp(-2 * time),) * 2
    odds = 1 / torch.expm1(initial)
    start = odds + odds.log()
    bounds = [
        torch.log1p(1 / torch.from_numpy(wrightomega((start + k * time).numpy())))
        for k in (2.0, classes / (classes - 1))
    ]
    return bounds[0], bounds[1]


def flow_time(kind: str, rate: float, step: int) -> float:
    """The time t of the flow that corresponds to k steps on a model linear in its weights.

    A step of iEF with the squared error multiplies every residual by 1 − η, so t = −k ln(1 − η),
    which is ηk for small η. For the cross-entropy t = ηk.
    """
    return -step * math.log1p(-rate) if kind in REGRESSIONS else rate * step


def run(size: Size, seed: int, progress: Advance) -> Iterator[pd.DataFrame]:
    """One table for each loss, optimizer, learning rate and seed, one row for each step.

    Columns ``kind, method, learning_rate, seed, step, time`` (η × steps), ``loss`` (mean ℓ_n less
    its least value, nats), ``status, reason``; for iEF also ``low, high`` (means of `predicted` at
    `flow_time`), ``within``, the share of the samples between their bounds to within `TOLERANCE`,
    and ``falling``, the share of those whose loss is less than one step before; NaN where there is
    no prediction.
    """
    plan = PLANS[size]
    for kind in FITS:
        settings = [("ief", rate) for rate in plan.rates[kind]]
        settings += [(name, rate) for name, rates in plan.contrast.items() for rate in rates]
        for start in range(seed, seed + plan.seeds):
            for method, rate in settings:
                steps = round(plan.times[kind] / (min(rate, PACE) if method == "ief" else PACE))
                rows = descend(kind, method, rate, steps, plan, start)
                yield rows.assign(kind=kind, method=method, learning_rate=rate, seed=start)
                progress(kind, plan.seeds * len(settings))


def descend(kind: str, method: str, rate: float, steps: int, plan: Plan, seed: int) -> pd.DataFrame:
    """One full-batch training, which stops early where a loss becomes NaN or infinite."""
    fit = FITS[kind]
    batch, targets = next(get_task(fit.task).batches(plan.samples, 1, seed))
    inputs = map_tensors(batch, Tensor.double)
    if kind in REGRESSIONS:
        targets = targets[:, -fit.outputs :].double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(PIXELS, plan.width), nn.Tanh(), nn.Linear(plan.width, fit.outputs)
        )
    model = model.double().eval()
    problem = Problem(model, inputs, targets, fit.likelihood)
    advance = _stepper(method, rate, model)
    initial = before = excess_losses(problem, kind)
    is_flow = method == "ief" and rate in plan.rates[kind][:3]
    records = []
    for step in range(steps + 1):
        losses = excess_losses(problem, kind)
        record = {"step": step, "time": rate * step, "loss": float(losses.mean())}
        if is_flow and rate * step <= plan.times[kind] * (1 + 1e-9):
            low, high = predicted(initial, flow_time(kind, rate, step), kind, fit.outputs)
            inside = (losses >= low * (1 - TOLERANCE)) & (losses <= high * (1 + TOLERANCE))
            record |= {"low": float(low.mean()), "high": float(high.mean())}
            record["within"] = float(inside.double().mean())
            record["falling"] = float((losses < before).double().mean()) if step else 1.0
        records.append(record)
        before = losses
        try:
            if step < steps:
                advance(problem)
                problem = problem.with_batch(inputs, targets)
        except NgevalError as error:
            return pd.DataFrame(records).assign(status="diverged", reason=str(error))
    rows = pd.DataFrame(records).assign(status="ok", reason="")
    return (
        rows if method == "ief" else rows[(rows["step"] % THINNED == 0) | (rows["step"] == steps)]
    )


def excess_losses(problem: Problem, kind: str) -> Tensor:
    """ℓ_n less its least value: for a Gaussian ½‖z − y‖², without the constant ½C ln 2π."""
    if kind in REGRESSIONS:
        return 0.5 * problem.residual.square().sum(1)
    return problem.loss


def _stepper(method: str, rate: float, model: nn.Module) -> Callable[[Problem], object]:
    """The step of EF, of iEF, or along the gradient of the mean loss."""
    if method in ("ef", "ief"):
        make = EF if method == "ef" else iEF
        optimizer = make(model.parameters(), rate, damping=DAMPING)
        return optimizer.step

    def descend_gradient(problem: Problem) -> None:
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        weights = weights - rate / problem.num_samples * problem.gradient()
        with torch.no_grad():
            nn.utils.vector_to_parameters(weights, model.parameters())

    return descend_gradient


STUDY = Study(
    "convergence",
    "How full-batch iEF converges: linearly for squared error, sub-linearly for cross-entropy",
    run,
    figure,
    findings,
    minutes=4,
)
