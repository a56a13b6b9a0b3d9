"""When is a diagonal enough? γ/γ_min of diagonals and of KFAC over depth and width.

FAdam (Hwang, arXiv 2405.12807) holds that the diagonal of the Fisher is enough for a natural
gradient, except for "models with insufficient layer sizes", where entries off the diagonal matter.
Networks of several depths and widths are trained on the digits with AdamW until the training loss
first falls below a threshold, so that they are compared at the same stage and not at the same step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ngeval.grading.evaluate import evaluate
from ngeval.problem.problem import Problem
from ngeval.tasks import Task, get_task
from studies.base import Advance, Size, Study
from studies.diagonal_figure import figure
from studies.diagonal_findings import findings

METHODS = ("sgd", "diag", "diag:0.5", "diag-ef", "diag-ef:0.5", "kfac")
PIXELS, CLASSES = 64, 10
TRAINING_BATCH = 64
MEASURED = 1024
"""Number of training images that the training loss is measured on."""


@dataclass(frozen=True)
class Plan:
    """The extent of a size.

    Attributes:
        depths: numbers of hidden layers.
        widths: numbers of units in each of them.
        seeds: number of seeds, of weights and of the order of samples.
        thresholds: training losses (mean, nats) that define the stages.
        epochs: maximum; a network that stays above a threshold has no rows for that stage.
        batch_size: N of a graded batch.
        num_batches: graded batches at each stage.
        dampings: λ, absolute; each method is judged at its best.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    seeds: int
    thresholds: tuple[float, ...]
    epochs: int
    batch_size: int
    num_batches: int
    dampings: tuple[float, ...]


PLANS: dict[Size, Plan] = {
    "quick": Plan((1, 2), (8, 32), 1, (2.0, 1.0), 8, 24, 2, (1e-6, 1e-3, 1.0)),
    "full": Plan(
        (1, 2, 4),
        (8, 16, 32, 64, 128),
        5,
        (1.0, 0.1),
        60,
        96,
        2,
        tuple(float(f"1e{k}") for k in range(-8, 3)),
    ),
}


def run(size: Size, seed: int, progress: Advance) -> Iterator[pd.DataFrame]:
    """One table for each network and stage: rows of `ngeval.evaluate` for each batch.

    Columns ``depth, width, seed, threshold, train_loss`` (when it was first below the threshold),
    ``epoch, batch, method, damping, gamma, gamma_over_sgd, gamma_over_ng, status, reason``.
    """
    plan = PLANS[size]
    task = get_task("digits-mlp")
    total = len(plan.depths) * len(plan.widths) * plan.seeds
    for depth in plan.depths:
        for width in plan.widths:
            for start in range(seed, seed + plan.seeds):
                place = {"depth": depth, "width": width, "seed": start}
                for stage, table in _stages(task, network(depth, width, start), plan, start):
                    yield table.assign(**place, **stage)[NETWORK + GAMMA]
                progress("networks", total)


NETWORK = ["depth", "width", "seed", "threshold", "train_loss", "epoch", "batch", "num_parameters"]
GAMMA = ["method", "damping", "gamma", "gamma_over_sgd", "gamma_over_ng", "status", "reason"]
"""The columns of the rows."""


def network(depth: int, width: int, seed: int) -> nn.Module:
    """An MLP with ``depth`` hidden layers of ``width`` units, and weights from a seed."""
    sizes = [PIXELS] + [width] * depth
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [
            layer
            for inner, outer in itertools.pairwise(sizes)
            for layer in (nn.Linear(inner, outer), nn.ReLU())
        ]
        return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def _stages(
    task: Task, model: nn.Module, plan: Plan, seed: int
) -> Iterator[tuple[dict[str, float], pd.DataFrame]]:
    """Train, and grade whenever the training loss is first below a threshold."""
    many, labels = next(task.batches(MEASURED, 1, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    left = sorted(plan.thresholds, reverse=True)
    for epoch in range(plan.epochs + 1):
        for inputs, targets in task.batches(TRAINING_BATCH, None, seed + epoch) if epoch else ():
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(model(many), labels))
        while left and loss < left[0]:
            stage = {"threshold": left.pop(0), "train_loss": loss, "epoch": epoch}
            yield stage, _graded(task, model, plan, seed)
        if not left or not math.isfinite(loss):
            return


def _graded(task: Task, model: nn.Module, plan: Plan, seed: int) -> pd.DataFrame:
    """γ of every method on each batch, in float64."""
    tables = []
    for number, (inputs, targets) in enumerate(
        task.batches(plan.batch_size, plan.num_batches, seed)
    ):
        problem = Problem(model.eval(), inputs, targets, "categorical", dtype=torch.float64)
        tables.append(evaluate(problem, METHODS, plan.dampings, seed=seed).assign(batch=number))
    model.train()
    return pd.concat(tables, ignore_index=True)


STUDY = Study(
    "diagonal",
    "When is a diagonal enough? γ/γ_min over the depth and width of a network",
    run,
    figure,
    findings,
    minutes=6,
)
