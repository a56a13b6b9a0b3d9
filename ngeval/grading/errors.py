"""The error of γ by rounding, measured: everything again with rows and logits changed at theirs.

An update made of rows is the solution of a linear system, and how far rounding moves it depends on
λ and on the rows. No bound says that as well as solving again from rows that differ by their
rounding. What is sensitive to rounding is thereby found, whatever the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.natural_gradient import dense_solver
from ngeval.grading.grade import SAFETY, Grades, Noise, grade, relative_change
from ngeval.grading.prepare import NUMERICAL, Failure, Prepared, attempt
from ngeval.methods import Method
from ngeval.problem.metric_batch import Metric
from ngeval.problem.probes import row_rounding

PERTURBATIONS = 2
"""How often everything is computed again."""

NOISE = 2
"""The least rounding of a row or logit, in units of the problem dtype's machine epsilon."""


class Perturbations:
    """The same problem with its rows and logits changed at their rounding, a few times."""

    def __init__(self, kernel: Kernel, seed: int, metric: Metric | None) -> None:
        self.kernel = kernel
        self.seed = seed
        self.metric = metric

    @cached_property
    def noise(self) -> float:
        """The size of the change, relative: the rows' rounding, as measured on a few samples."""
        problem = self.kernel.problem
        least = NOISE * torch.finfo(problem.dtype).eps
        measured = attempt(problem.shards, partial(row_rounding, problem.rows, problem.residual))
        return least if isinstance(measured, Failure) else max(least, measured)

    @cached_property
    def of_logits(self) -> Noise:
        """The problem with changed logits alone."""
        generators = (torch.Generator().manual_seed(seed) for seed in range(PERTURBATIONS))
        problems = [self.kernel.problem.with_noise(self.noise, g) for g in generators]
        return Noise(problems, self.noise)

    def errors(
        self, outcomes: Sequence[tuple[Method, Prepared, Grades]], dampings: Sequence[float]
    ) -> tuple[list[Grades], np.ndarray]:
        """Grades with the errors of their updates added, and those of the exact natural gradient.

        An update that is not a solution is taken as it is; `grade` has measured the rest.

        Args:
            outcomes: methods, their updates, and the grades of those.
            dampings: λ of the natural gradient by a factorisation; none if there is no such.

        Returns:
            The grades, and the relative errors of the natural gradient's γ at every λ.
        """
        results = [
            grades._replace(errors=grades.errors + SAFETY * self.noise) for _, _, grades in outcomes
        ]
        natural = np.full(len(dampings), 1e-15)
        solved = [i for i, (_, each, _) in enumerate(outcomes) if each.updates.is_solution]
        for seed in range(PERTURBATIONS if solved or dampings else 0):
            kernel = self.kernel.perturbed(self.noise, seed)  # one at a time: they are large
            for i in solved:
                errors = self._changes(kernel, *outcomes[i])
                results[i] = results[i]._replace(errors=torch.maximum(results[i].errors, errors))
            if dampings:
                natural = np.fmax(natural, self._natural_changes(kernel, dampings))
        return results, natural

    def _changes(
        self, kernel: Kernel, method: Method, prepared: Prepared, grades: Grades
    ) -> Tensor:
        """How much γ changes with the rows, times `SAFETY`."""
        dampings = [0.0 if math.isnan(value) else value for value in prepared.absolute]

        def again() -> Tensor:
            updates = method.prepare(kernel.problem, kernel, self.seed).updates(dampings)
            return grade(kernel, [updates], self.metric)[0].gammas

        gammas = attempt(kernel.problem.shards, again)
        if isinstance(gammas, Failure):
            return torch.full_like(grades.errors, math.inf)
        return SAFETY * relative_change(gammas, grades.gammas)

    def _natural_changes(self, kernel: Kernel, dampings: Sequence[float]) -> np.ndarray:
        def ratios() -> np.ndarray:
            exact, moved = dense_solver(self.kernel), dense_solver(kernel)
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios: np.ndarray = moved.gammas(dampings) / exact.gammas(dampings)
            return ratios

        result = attempt(kernel.problem.shards, ratios, NUMERICAL)
        if isinstance(result, Failure):
            return np.full(len(dampings), math.inf)
        changes: np.ndarray = SAFETY * np.abs(result - 1)
        return changes
