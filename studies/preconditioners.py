"""Variants of KFAC against iEF, and Adam as a diagonal natural gradient, over training runs.

Two claims about what approximates the Fisher. Wu et al. (arXiv 2406.06420) report that KFAC with
iEF's scaling of the output gradients (their ieKFAC; ``kfac-ief``) is nearer to the natural gradient
than KFAC with sampled labels (``kfac-sf``) and than KFAC with the data's labels (their eKFAC;
``kfac-ef``), and about as near as iEF. Hwang (arXiv 2405.12807) reads Adam as natural gradient
descent with a diagonal empirical Fisher, which Adam's second moment v̂ stands for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from ngeval.analysis.best_damping import at_best_damping
from ngeval.checkpoints import find_checkpoints
from ngeval.curvature.kernel import Kernel
from ngeval.errors import InputError
from ngeval.grading.evaluate import evaluate
from ngeval.methods import Method
from ngeval.methods.diag import DiagonalState
from ngeval.plots.gamma import draw_stages
from ngeval.plots.style import PAGE, in_style, legend_below, styles_of
from ngeval.problem.problem import Problem
from ngeval.runs.run import Run
from ngeval.runs.units import Unit, iterate_units, labelled
from ngeval.tasks import get_task
from ngeval.training import Training
from studies.base import Advance, Finding, Size, Study, decide
from studies.statistics import Interval, mean_interval

KRONECKER = ("ief", "kfac-ief", "kfac-sf", "kfac-ef", "kfac")
DIAGONALS = ("adam", "diag-ema", "diag-ef:0.5", "diag-ef", "diag")
METHODS = ("sgd", *KRONECKER, *DIAGONALS)
MOMENTS = {"v̂ and Σg²": ("diag-ema", "diag-ef"), "v̂ and diag F": ("diag-ema", "diag")}
"""Pairs of diagonals whose ranks over the parameters are compared."""

GAMMA = ["gamma", "gamma_over_sgd", "gamma_over_ng", "gamma_floor"]
COLUMNS = ["method", "damping", *GAMMA, "status", "reason"]
"""Columns of `ngeval.evaluate` in the rows, which are committed and so had better be few."""

SMALL = 1e-7
SIZES = {"quick": (2, 2, 1, 40, 3), "full": (5, 13, 4, 160, 12)}
"""Seeds, dampings, graded batches, samples in each, and epochs."""

KFAC_SOURCE = "Wu et al., arXiv 2406.06420, comparison of KFAC's kinds"
NOT_CLAIMED = "not in the paper, which samples KFAC's labels"
ADAM_SOURCE = "Hwang, arXiv 2405.12807, §3.4.1"
CLOSER = "KFAC with iEF's scaling is nearer to the natural gradient than KFAC with"
KINDS = (
    ("sampled labels", SMALL, "kfac-sf", KFAC_SOURCE),
    ("the data's labels", SMALL, "kfac-ef", KFAC_SOURCE),
    ("sampled labels, at each one's best damping", None, "kfac-sf", KFAC_SOURCE),
    ("the data's labels, at each one's best damping", None, "kfac-ef", KFAC_SOURCE),
    ("exact expectations over labels, at each one's best damping", None, "kfac", NOT_CLAIMED),
)
"""Comparisons of ``kfac-ief``: with what in words, at which λ (None: the best), method, source."""

ADAMS = (
    ("Adam's step", None, "adam"),
    ("The gradient over the root of Adam's second moment, undamped,", SMALL, "diag-ema"),
    (
        "The gradient over the root of the batch's own empirical Fisher diagonal, at its best "
        "damping,",
        None,
        "diag-ef:0.5",
    ),
)
"""Comparisons with the gradient: of what in words, at which λ (None: the best), method."""

RULE = (
    "at every checkpoint after the first, the 95 % t interval over seeds of the logarithm of the "
    "ratio of γ (a seed's mean over batches) lies below 0: confirmed; at some: under conditions"
)


def run(size: Size, seed: int, progress: Advance) -> Iterator[pd.DataFrame]:
    """Train digits-mlp with Adam, a run for each seed, and grade checkpoints of all stages."""
    seeds, count, batches, samples, epochs = SIZES[size]
    dampings = [SMALL, *np.geomspace(1e-6, 1e3, count).tolist()]
    task = get_task("digits-mlp")
    for number in range(seed, seed + seeds):
        with tempfile.TemporaryDirectory() as folder:
            for _ in Training(task, Path(folder), "adam", epochs=epochs, seed=number).run():
                progress("training", seeds * (epochs + 1))
            checkpoints = find_checkpoints([folder])
            # From the first epoch on, so that Adam has a state.
            stages = sorted({1, *range(epochs // 3, epochs + 1, epochs // 3)})
            job = Run(task, [checkpoints[i] for i in stages], samples, batches, seed=number)
            for unit in iterate_units(job, METHODS):
                table = evaluate(unit.problem, unit.methods, dampings, seed=number)
                parts = [table[COLUMNS].assign(part="gamma"), _moments(unit, number)]
                rows = labelled(pd.concat(parts, ignore_index=True), unit.columns)
                # A name that is the same in every run: the folder is temporary.
                stage = f"epoch {unit.columns['epoch']:g}"
                yield rows.assign(checkpoint=stage, seed=number)
                progress("grading", seeds * job.num_units)


def _moments(unit: Unit, seed: int) -> pd.DataFrame:
    """Spearman's ρ of Adam's v̂ with two diagonals of the Fisher, over the parameters."""
    diagonals = {
        method.name: _diagonal(method, unit.problem, seed)
        for method in unit.methods
        if method.name in {name for pair in MOMENTS.values() for name in pair}
    }
    rows = []
    for label, pair in MOMENTS.items():
        first, second = (diagonals[name] for name in pair)
        positive = (first > 0) & (second > 0)  # pixels that are always 0 would agree trivially
        value = spearmanr(first[positive], second[positive]).statistic
        rows.append({"part": "moments", "method": label, "correlation": value, "status": "ok"})
    return pd.DataFrame(rows)


def _diagonal(method: Method, problem: Problem, seed: int) -> np.ndarray:
    state = method.prepare(problem, Kernel(problem), seed)
    if not isinstance(state, DiagonalState):
        raise InputError(f"{method.name} has no diagonal")
    diagonal: np.ndarray = state.diagonal.cpu().numpy()
    return diagonal


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One finding for each claim of both papers."""
    gammas = rows[rows["part"] == "gamma"]
    best = _best(gammas)
    tables = {SMALL: gammas[np.isclose(gammas["damping"], SMALL, rtol=1e-6)], None: best}
    kinds = [
        _compared(f"{CLOSER} {what}", tables[damping], "kfac-ief", other, source)
        for what, damping, other, source in KINDS
    ]
    diagonals = [
        _compared(
            f"{what} is nearer to the natural gradient than the gradient",
            tables[damping],
            first,
            "sgd",
            ADAM_SOURCE,
        )
        for what, damping, first in ADAMS
    ]
    return [*kinds, _near(best), *diagonals, _second_moment(rows[rows["part"] == "moments"])]


def _best(gammas: pd.DataFrame) -> pd.DataFrame:
    """Each method at its best λ for a seed and a checkpoint."""
    parts = [at_best_damping(part) for _, part in gammas.groupby("seed")]
    return pd.concat(parts, ignore_index=True)


def _ratios(table: pd.DataFrame, first: str, second: str) -> dict[float, Interval]:
    """γ of a method over γ of another by epoch: each seed's geometric mean over batches."""
    keys = ["seed", "epoch", "batch"]
    wide = table[table["status"] == "ok"].pivot_table("gamma", keys, "method").reset_index()
    logs = wide.assign(log=np.log(wide[first]) - np.log(wide[second]))
    return {epoch: interval.exp() for epoch, interval in _over_seeds(logs, "log").items()}


def _over_seeds(rows: pd.DataFrame, column: str) -> dict[float, Interval]:
    """Mean over seeds of each seed's mean, by epoch."""
    means = rows.groupby(["epoch", "seed"])[column].mean().reset_index()
    return {float(str(e)): mean_interval(part[column]) for e, part in means.groupby("epoch")}


def _compared(claim: str, table: pd.DataFrame, first: str, second: str, source: str) -> Finding:
    """Whether γ of one method is below γ of another."""
    ratios = _ratios(table, first, second)
    evidence = f"γ of {first} over γ of {second}: {_by_epoch(ratios)}"
    outcomes = [interval.high < 1 for interval in _later(ratios)]
    return Finding(claim, source, decide(outcomes), evidence, RULE)


def _near(table: pd.DataFrame) -> Finding:
    """Whether KFAC with iEF's scaling is within a tenth of iEF."""
    ratios = _ratios(table, "kfac-ief", "ief")
    return Finding(
        "KFAC with iEF's scaling is as near to the natural gradient as iEF",
        KFAC_SOURCE,
        decide([interval.high < 1.1 for interval in _later(ratios)]),
        f"γ of kfac-ief over γ of ief, each at its best λ: {_by_epoch(ratios)}",
        "the 95 % t interval over seeds of the ratio of γ ends below 1.1 at every checkpoint after "
        "the first: confirmed; at some: under conditions",
    )


def _second_moment(rows: pd.DataFrame) -> Finding:
    """How similar the ranks of v̂ and of two diagonals are."""
    intervals = {
        label: _over_seeds(rows[rows["method"] == label], "correlation") for label in MOMENTS
    }
    first = next(iter(intervals.values()))
    return Finding(
        "Adam's second moment stands for the diagonal of the empirical Fisher",
        ADAM_SOURCE,
        decide([interval.low > 0.9 for interval in _later(first)]),
        "Spearman's ρ over the parameters, "
        + "; ".join(f"{label}: {_by_epoch(by_epoch)}" for label, by_epoch in intervals.items()),
        "the 95 % t interval over seeds of ρ with Σ_n g_n² lies above 0.9 at every checkpoint "
        "after the first: confirmed; at some: under conditions",
    )


def _later(by_epoch: dict[float, Interval]) -> list[Interval]:
    """All but the first checkpoint's, where nothing has been learnt so far."""
    return [by_epoch[epoch] for epoch in sorted(by_epoch)[1:]]


def _by_epoch(intervals: dict[float, Interval]) -> str:
    return ", ".join(f"{intervals[epoch].text()} (epoch {epoch:g})" for epoch in sorted(intervals))


def figure(rows: pd.DataFrame) -> Figure:
    """γ/γ_SGD over training: KFAC's variants at one λ and at the best λ, diagonals at the best λ.

    Geometric means over seeds and batches, with 95 % bootstrap intervals.
    """
    gammas = rows[(rows["part"] == "gamma") & (rows["status"] == "ok")]
    fixed, best = gammas[np.isclose(gammas["damping"], SMALL, rtol=1e-6)], _best(gammas)
    panels: list[tuple[str, pd.DataFrame, Sequence[str]]] = [
        ("KFAC's kinds,\nall at λ = 10⁻⁷", fixed, KRONECKER),
        ("KFAC's kinds,\neach at its best λ", best, KRONECKER),
        ("Adam and diagonals,\neach at its best λ", best, DIAGONALS),
    ]
    styles = styles_of(gammas)
    with in_style():
        drawn, grid = plt.subplots(1, 3, figsize=(PAGE, 2.8), layout="constrained")
        for axes, (title, table, methods) in zip(grid, panels, strict=True):
            draw_stages(table[table["method"].isin(["sgd", *methods])], axes, styles)
            axes.set_title(title)
            axes.set_ylabel("γ/γ_SGD")
        legend_below(*grid)
    return drawn


STUDY = Study(
    "preconditioners",
    "KFAC's kinds, Adam and diagonals: what stands for the Fisher",
    run,
    figure,
    findings,
    minutes=6,
)
