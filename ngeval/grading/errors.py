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

    @cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels of the changed problems."""
        return [self.kernel.perturbed(self.noise, seed) for seed in range(PERTURBATIONS)]

    def grades(self, method: Method, prepared: Prepared, grades: Grades) -> Grades:
        """Grades with the errors of the update added to those of its grading.

        An update that is not a solution is taken as it is; `grade` has measured the rest.

        Args:
            method: whose update.
            prepared: on the problem as it is.
            grades: of those updates.
        """
        grades = grades._replace(errors=grades.errors + SAFETY * self.noise)
        if not prepared.updates.is_solution:
            return grades
        dampings = [0.0 if math.isnan(value) else value for value in prepared.absolute]

        def again(kernel: Kernel) -> Tensor:
            updates = method.prepare(kernel.problem, kernel, self.seed).updates(dampings)
            return grade(kernel, [updates], self.metric)[0].gammas

        errors = grades.errors
        for kernel in self.kernels:
            gammas = attempt(kernel.problem.shards, partial(again, kernel))
            if isinstance(gammas, Failure):
                return grades._replace(errors=torch.full_like(errors, math.inf))
            errors = torch.maximum(errors, SAFETY * relative_change(gammas, grades.gammas))
        return grades._replace(errors=errors)

    def natural_errors(self, dampings: Sequence[float]) -> np.ndarray:
        """The relative errors of the exact natural gradient's γ at every λ."""
        gammas = dense_solver(self.kernel).gammas(dampings)
        errors = np.full(len(dampings), 1e-15)
        for kernel in self.kernels:
            moved = attempt(
                kernel.problem.shards,
                lambda kernel=kernel: dense_solver(kernel).gammas(dampings),
                NUMERICAL,
            )
            if isinstance(moved, Failure):
                return np.full(len(gammas), math.inf)
            with np.errstate(invalid="ignore", divide="ignore"):
                errors = np.fmax(errors, SAFETY * np.abs(moved / gammas - 1))
        return errors
