"""FAdam against Adam: which trains better, which correction matters, is ½ the right exponent?

Every contender has the same number of trainings to find its learning rate, by the validation loss;
then it is trained from several other seeds, which all contenders share, and tested. Source of the
claims: Hwang, "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher
information" (arXiv 2405.12807).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ngeval.fadam.optimizer import CORRECTIONS, FAdam
from ngeval.grading.evaluate import evaluate
from ngeval.methods import Method, get_methods
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.problem.problem import Problem
from studies.base import Advance, Size, Study
from studies.fadam_figure import figure
from studies.fadam_findings import findings
from studies.fadam_models import Subject, language, regression, vq_vae

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Values of ρ."""

DECAY = 0.01
"""Weight decay of AdamW and FAdam."""

SEARCH_SEED = 500
"""Seed of the trainings that find learning rates; the trainings that are compared have others."""

DAMPING = 1e-10
"""λ of the graded diagonals, relative to the largest entry: negligible."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options, except the learning rate.

    Attributes:
        optimizer: ``"adamw"``, ``"fadam"`` or ``"momentum"``.
        without: the correction of FAdam that is switched off; empty for none.
        exponent: ρ.
    """

    optimizer: str
    without: str = ""
    exponent: float = 0.5

    def build(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
        """Build the optimizer on some parameters."""
        if self.optimizer == "momentum":
            return SGD(parameters, learning_rate, momentum=0.9)
        if self.optimizer == "adamw":
            return AdamW(parameters, learning_rate, weight_decay=DECAY, foreach=True)
        off = CORRECTIONS.get(self.without, {})
        return FAdam(parameters, learning_rate, weight_decay=DECAY, exponent=self.exponent, **off)


ADAM, FISHER, MOMENTUM = Contender("adamw"), Contender("fadam"), Contender("momentum")
ABLATED = tuple(Contender("fadam", without=name) for name in CORRECTIONS)
POWERS = tuple(Contender("fadam", exponent=rho) for rho in EXPONENTS if rho != 0.5)


@dataclass(frozen=True)
class Plan:
    """The extent of a size.

    Attributes:
        seeds: trainings of every contender at its best learning rate.
        rates: learning rates to try with Adam and FAdam, and as many to try with SGD.
        steps: of a training of the language model, of a regression and of the VQ-VAE.
        ablated: contenders with a correction switched off.
        powers: contenders with other exponents.
        graded: fractions of a training after which γ is measured.
        samples: N of the graded batches: sequences, points.
    """

    seeds: int
    rates: tuple[tuple[float, ...], tuple[float, ...]]
    steps: tuple[int, int, int]
    ablated: tuple[Contender, ...]
    powers: tuple[Contender, ...]
    graded: tuple[float, ...]
    samples: tuple[int, int]


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        2,
        ((3e-3, 1e-2), (1e-2, 3e-2)),
        (10, 20, 16),
        ABLATED[3:4],
        POWERS[-1:],
        (1.0,),
        (2, 16),
    ),
    "full": Plan(
        5,
        ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
        (200, 400, 300),
        ABLATED,
        POWERS,
        (0.04, 0.2, 0.6),
        (8, 64),
    ),
}


def run(size: Size, seed: int, progress: Advance) -> Iterator[pd.DataFrame]:
    """All trainings, and γ along some of them.

    The column ``part`` distinguishes the rows: ``training``, one for each training (see `train`),
    and ``gamma``, rows of `ngeval.evaluate`.
    """
    plan = PLANS[size]
    for subject, steps, contenders in entries(plan):
        total = len(contenders) * (len(plan.rates[0]) + plan.seeds)
        for contender in contenders:
            rates = plan.rates[contender.optimizer == "momentum"]
            trials = []
            for rate in rates:
                row = train(subject, contender, rate, seed + SEARCH_SEED, steps)
                trials.append({**row, "phase": "search"})
                progress(subject.name, total)
            best = min(trials, key=lambda row: row["validation_loss"])["learning_rate"]
            yield pd.DataFrame(trials).assign(part="training")
            for number in range(plan.seeds):
                gammas: list[pd.DataFrame] = []
                grade = _grading(subject, contender, plan, gammas)
                stops = {round(part * steps) for part in plan.graded} if grade else ()
                row = train(subject, contender, best, seed + number, steps, grade, stops)
                progress(subject.name, total)
                final = {**row, "phase": "final", "at_edge": best in (rates[0], rates[-1])}
                yield pd.DataFrame([final]).assign(part="training")
                for table in gammas:
                    yield table.assign(part="gamma", seed=seed + number)


def entries(plan: Plan) -> list[tuple[Subject, int, Sequence[Contender]]]:
    """The subjects with their numbers of steps and their contenders."""
    pair = (ADAM, FISHER)
    regressing = (MOMENTUM, ADAM, FISHER)
    return [
        (language(), plan.steps[0], (*pair, *plan.ablated, *plan.powers)),
        (vq_vae(), plan.steps[2], (*pair, *plan.ablated)),
        (regression("continuous"), plan.steps[1], regressing),
        (regression("discrete"), plan.steps[1], regressing),
    ]


def train(
    subject: Subject,
    contender: Contender,
    learning_rate: float,
    seed: int,
    steps: int,
    grade: Callable[[int, nn.Module, Optimizer], None] | None = None,
    stops: Iterable[int] = (),
) -> dict[str, Any]:
    """Train once, with a learning rate that decays linearly to 0.

    Args:
        subject: the model with its data.
        contender: the optimizer.
        learning_rate: η of the first step.
        seed: of the initial weights and the batches.
        steps: number of steps.
        grade: called with the step, the model and the optimizer after each of ``stops``.
        stops: numbers of steps.

    Returns:
        ``subject, optimizer, without, exponent, learning_rate, seed, step``; ``train_loss`` (mean
        of the last tenth of the steps), ``validation_loss`` and ``test_loss`` (see
        `Subject.held_out`); ``status``, ``"ok"`` or ``"diverged"`` with losses ∞.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = subject.build()
    optimizer = contender.build(model.parameters(), learning_rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    stops, late = set(stops), []
    for step, batch in enumerate(islice(subject.batches(steps, seed), steps), 1):
        optimizer.zero_grad()
        loss = subject.loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step > 0.9 * steps:
            late.append(float(loss.detach()))
        if grade is not None and step in stops:
            grade(step, model, optimizer)
    with torch.no_grad():
        held_out = {kind: subject.held_out(model, kind) for kind in ("validation", "test")}
    ok = all(map(math.isfinite, (*late, *held_out.values())))
    return {
        "subject": subject.name,
        **vars(contender),
        "learning_rate": learning_rate,
        "seed": seed,
        "step": steps,
        "train_loss": sum(late) / len(late) if ok else math.inf,
        **{f"{kind}_loss": value if ok else math.inf for kind, value in held_out.items()},
        "status": "ok" if ok else "diverged",
    }


def _grading(
    subject: Subject, contender: Contender, plan: Plan, tables: list[pd.DataFrame]
) -> Callable[[int, nn.Module, Optimizer], None] | None:
    """A function that appends γ along a training to ``tables``; None where γ is not measured.

    It grades every ρ along FAdam's training of the GPT, and the empirical and the exact diagonal
    along Adam's training of the regressions.
    """
    texts = subject.name == "character GPT"
    if contender != (FISHER if texts else ADAM) or subject.name == "VQ-VAE":
        return None

    def grade(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        samples = plan.samples[0 if texts else 1]
        inputs, targets = next(subject.batches(1, 10_000 + step))
        likelihood = "gaussian:0.04" if targets.is_floating_point() else "categorical"
        problem = Problem(model, inputs[:samples], targets[:samples], likelihood)
        methods = graded_powers(optimizer) if texts else graded_diagonals(optimizer)
        table = evaluate(problem, methods, [DAMPING], damping_scale="relative", natural=not texts)
        tables.append(table[GAMMA_COLUMNS].assign(subject=subject.name, step=step))

    return grade


GAMMA_COLUMNS = ["method", "gamma", "gamma_over_sgd", "gamma_over_ng", "status", "reason"]


def graded_powers(optimizer: Optimizer) -> list[Method]:
    """The gradient over the batch's empirical diagonal, and over FAdam's f, to every power ρ."""
    diagonals = get_methods([f"diag-ef:{rho:g}" for rho in EXPONENTS])
    return [*diagonals, *(_natural_gradient(optimizer, rho) for rho in EXPONENTS)]


def _natural_gradient(optimizer: Optimizer, exponent: float) -> Method:
    """FAdam's ḡ with its current f and a different ρ, before clipping and momentum.

    As in training, f is updated with the batch first: where f is 0, ḡ would be unbounded.
    """
    [group] = optimizer.param_groups
    betas = 0.0, group["betas"][1]
    other = FAdam(group["params"], betas=betas, weight_decay=0.0, clip=None, exponent=exponent)
    for parameter, state in optimizer.state.items():
        other.state[parameter] = {key: value.clone() for key, value in state.items()}
    return OptimizerStep(other, reduction="token-mean", name=f"fisher:{exponent:g}")


def graded_diagonals(optimizer: Optimizer) -> list[Method]:
    """The empirical and the exact diagonal, their roots, and the optimizer's step."""
    names = ["sgd", "diag", "diag-ef", "diag:0.5", "diag-ef:0.5"]
    return [*get_methods(names), OptimizerStep(optimizer, weight_decay=False, name="step")]


STUDY = Study(
    "fadam",
    "FAdam against Adam: training, corrections, exponents, discrete and continuous outputs",
    run,
    figure,
    findings,
    minutes=9,
)
