"""Why the empirical Fisher fails: its updates favour samples that are already learnt.

digits-mlp is trained with AdamW. At every epoch EF, iEF, SF and the natural gradient are graded by
γ over a range of dampings, and their effect on every sample is measured. Source of the claims: Wu
et al., "An improved empirical Fisher approximation for natural gradient descent" (arXiv
2406.06420).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ngeval.checkpoints import find_checkpoints
from ngeval.curvature.kernel import Kernel
from ngeval.grading.evaluate import evaluate
from ngeval.grading.gradient_norms import gradient_norms
from ngeval.methods import get_methods
from ngeval.problem.gamma import loss_change
from ngeval.problem.problem import Problem
from ngeval.runs.run import Run
from ngeval.runs.units import iterate_units
from ngeval.tasks import get_task
from ngeval.training import Training
from studies.base import Advance, Size, Study
from studies.toy.least_squares import OFFSETS, LeastSquares, trajectories
from studies.why_ef_fails_figure import figure
from studies.why_ef_fails_findings import SMALL, findings

METHODS = ("sgd", "ef", "sf", "ief")
SAMPLED = {"sgd": 0.0, "ef": 0.0, "ief": 0.0, "sf": SMALL, "ng": SMALL}
"""The updates whose effect on single samples is measured, with their λ. The claims on EF and iEF
are for λ = 0; SF's pseudo-inverse at λ = 0 differs from its limit."""

RATES = {"sgd": 0.1, "ng": 0.1, "ief": 0.1, "ef": 0.02}
"""Learning rates on the toy: for the natural gradient one that shows the path, for EF one that
brings the losses to 0 in about as many steps, for SGD about a fifth of the largest stable one."""

SEEDS_APART = 1000
"""Distance of the seeds of trainings, so that runs with different seeds do not share any."""


@dataclass(frozen=True)
class Plan:
    """The extent of a size.

    Attributes:
        trainings: number of trainings, each with a different seed.
        epochs: of AdamW; a checkpoint after each.
        num_batches: graded batches at each checkpoint.
        batch_size: N.
        dampings: λ, absolute.
        steps: of the toy's paths.
    """

    trainings: int
    epochs: int
    num_batches: int
    batch_size: int
    dampings: tuple[float, ...]
    steps: int


PLANS: dict[Size, Plan] = {
    "quick": Plan(1, 2, 2, 40, (SMALL, 1e-3, 1.0), 8),
    "full": Plan(3, 12, 4, 160, tuple(float(f"1e{k}") for k in range(-9, 4)), 150),
}


def run(size: Size, seed: int, progress: Advance) -> Iterator[pd.DataFrame]:
    """The toy's paths, then γ and effects on samples at every checkpoint of every training.

    The column ``part`` distinguishes the rows: ``toy`` (see `studies.toy`), ``gamma`` (rows of
    `ngeval.evaluate`, with the ``imbalance`` of the batch) and ``samples``.
    """
    plan = PLANS[size]
    for table in trajectories(LeastSquares(), RATES, steps=plan.steps):
        yield table.assign(part="toy")
        progress("two parameters", len(RATES) * len(OFFSETS))
    for training in range(plan.trainings):
        training_seed = seed * SEEDS_APART + training
        with tempfile.TemporaryDirectory() as folder:
            job = Training(
                get_task("digits-mlp"), Path(folder), epochs=plan.epochs, seed=training_seed
            )
            for _ in job.run():
                progress("training", plan.trainings * (plan.epochs + 1))
            graded = Run(
                job.task,
                find_checkpoints([folder]),
                batch_size=plan.batch_size,
                num_batches=plan.num_batches,
                seed=training_seed,
                dtype=torch.float64,
            )
            for table in _graded(graded, plan, with_samples=training == 0):
                yield table.assign(training_seed=training_seed)
                progress("grading", plan.trainings * graded.num_units)


def _graded(job: Run, plan: Plan, *, with_samples: bool) -> Iterator[pd.DataFrame]:
    """γ at every damping; on the first batch also the effect on each sample."""
    for unit in iterate_units(job):
        batch = int(unit.columns["batch"])
        seed = job.seed + batch
        table = evaluate(unit.problem, METHODS, plan.dampings, seed=seed, natural=False)
        imbalance = gradient_norms(unit.problem).attrs["imbalance"]
        parts = [table.assign(part="gamma", imbalance=imbalance)]
        if with_samples and batch == 0:
            parts.append(sample_rows(unit.problem, seed).assign(part="samples"))
        place = {key: unit.columns[key] for key in ("epoch", "step", "batch")}
        table = pd.concat(parts, ignore_index=True).assign(**place)
        yield table[[column for column in UPDATE + GAMMA + SAMPLE if column in table]]


UPDATE = ["part", "epoch", "step", "batch", "method", "damping", "status", "reason"]
GAMMA = ["gamma", "gamma_over_sgd", "gamma_floor", "imbalance"]
SAMPLE = ["sample", "loss", "residual_square", "gradient_norm", "loss_change", "projection"]
"""Columns of the parts ``gamma`` and ``samples``: of both, and of each alone."""


def sample_rows(problem: Problem, seed: int) -> pd.DataFrame:
    """The effect of each update on every sample of a batch: one row for each pair.

    Returns:
        ``sample, loss`` (ℓ_n, nats), ``residual_square`` (s_n = ‖u_n‖²), ``gradient_norm`` (‖g_n‖),
        ``method, damping``; ``loss_change``, the first-order change of ℓ_n for the unit step −d,
        and ``projection``, the length of d along g_n: both from the tangent Jd.
    """
    norms, kernel = gradient_norms(problem), Kernel(problem)
    base = norms.assign(residual_square=norms["residual_norm"].pow(2)).drop(columns="residual_norm")
    tables = []
    for method, damping in zip(get_methods(SAMPLED), SAMPLED.values(), strict=True):
        state = method.prepare(problem, kernel, seed)
        change = loss_change(problem, state.direction(damping))
        tables.append(
            base.assign(
                method=method.name,
                damping=damping,
                status="ok",
                reason="",
                loss_change=change.numpy(),
                projection=-change.numpy() / base["gradient_norm"].to_numpy(),
            )
        )
    return pd.concat(tables, ignore_index=True)


STUDY = Study(
    "why-ef-fails",
    "Why the empirical Fisher fails: what updates do to learnt samples",
    run,
    figure,
    findings,
    minutes=4,
)
