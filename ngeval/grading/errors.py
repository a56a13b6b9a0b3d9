"""The error of γ by rounding, measured: everything again with rows and logits changed at theirs.

An update made of rows is the solution of a linear system, and how far rounding moves it depends on
λ and on the rows. No bound says that as well as solving again from rows that differ by their
rounding. What is sensitive to rounding is thereby found, whatever the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.natural_gradient import dense_solver
from ngeval.curvature.updates import SENSITIVE, DirectionUpdates, SpaceUpdates, Updates
from ngeval.grading.grade import SAFETY, Grades, Noise, grade
from ngeval.grading.prepare import NUMERICAL, Failure, Prepared, attempt
from ngeval.methods import Method
from ngeval.problem.metric_batch import Metric
from ngeval.problem.probes import ROUNDING_SAMPLES, RowRounding, row_rounding
from ngeval.problem.problem import Problem

RESIDUAL = 1e-4
"""Where a residual changes by more than this with the logits' rounding, so may any update."""

PERTURBATIONS = 2
"""How often everything is computed again; twice as often what turns out to be sensitive, since few
changes by chance may all miss the worst."""

NOISE = 4
"""The least rounding of a row or logit, in units of the problem dtype's machine epsilon."""

ENTRY_SAMPLES = 32
"""At most this many samples show the rounding of single entries, which in float32 underflow."""

LEAST = 1e-150
"""An entry that underflows, relative to the length of its row; its square does not underflow."""


class Perturbations:
    """The same problem with its rows and logits changed at their rounding, a few times."""

    def __init__(self, kernel: Kernel, seed: int, metric: Metric | None) -> None:
        self.kernel = kernel
        self.seed = seed
        self.metric = metric
        self._problems: dict[int, Problem] = {}

    @cached_property
    def rounding(self) -> RowRounding:
        """That of rows, as measured on a few samples; at least `NOISE`."""
        problem = self.kernel.problem
        least = NOISE * torch.finfo(problem.dtype).eps
        measured = self._measured(ROUNDING_SAMPLES)
        return measured._replace(relative=max(least, measured.relative))

    def _measured(self, samples: int) -> RowRounding:
        problem = self.kernel.problem
        measure = partial(row_rounding, problem.rows, problem.residual, samples)
        result = attempt(problem.shards, measure)
        nothing = problem.outputs.new_zeros((), dtype=torch.float64)
        return RowRounding(0.0, nothing) if isinstance(result, Failure) else result

    @property
    def noise(self) -> float:
        """The size of the change, relative."""
        return self.rounding.relative

    @cached_property
    def _entries(self) -> Tensor:
        """The rounding of each entry of rows: more than 0 where one may underflow."""
        problem = self.kernel.problem
        tiny, mask = torch.finfo(problem.dtype).tiny ** 0.5, problem.distribution.mask
        lost = self._changed_problem(0).residual.abs() < tiny
        unseen = bool((lost if mask is None else lost & mask).any())
        entries = self.rounding.entries
        if problem.dtype != torch.float64:
            entries = self._measured(ENTRY_SAMPLES).entries
            unseen |= problem.num_samples > ENTRY_SAMPLES
        return entries.clamp_min(LEAST if unseen else 0.0)

    @cached_property
    def of_logits(self) -> Noise:
        """The problem with changed logits alone."""
        return Noise([self._changed_problem(seed) for seed in range(PERTURBATIONS)], self.noise)

    def _changed_problem(self, seed: int) -> Problem:
        if seed not in self._problems:
            generator = torch.Generator().manual_seed(seed)
            self._problems[seed] = self.kernel.problem.with_noise(self.noise, generator)
        return self._problems[seed]

    def errors(
        self, outcomes: Sequence[tuple[Method, Prepared, Grades]], dampings: Sequence[float]
    ) -> tuple[list[Grades], np.ndarray]:
        """Grades with the errors of their updates added, and those of the exact natural gradient.

        An update that is not a solution is taken as it is, unless rounding of the logits changes
        the residuals that it is made of; `grade` has measured the rest.

        Args:
            outcomes: methods, their updates, and the grades of those.
            dampings: λ of the natural gradient by a factorisation; none if there is no such.

        Returns:
            The grades, and the relative errors of the natural gradient's γ at every λ.
        """
        results = [self._graded(*outcome) for outcome in outcomes]
        natural = np.full(len(dampings), 1e-15)
        solved = [
            i
            for i, (_, each, _) in enumerate(outcomes)
            if each.updates.is_solution or self.residual_change > RESIDUAL
        ]
        sensitive = torch.finfo(self.kernel.problem.dtype).eps ** SENSITIVE
        for seed in range(2 * PERTURBATIONS):
            if seed == PERTURBATIONS:
                solved = [i for i in solved if bool((results[i].errors > sensitive).any())]
                dampings = dampings if bool((natural > sensitive).any()) else []
            if not solved and not dampings:
                break
            kernel = self._changed_kernel(seed)  # one at a time: they are large
            for i in solved:
                results[i] = results[i].with_errors(*self._solved_again(kernel, *outcomes[i]))
            if dampings:
                natural = np.fmax(natural, self._natural_changes(kernel, dampings))
        return results, natural

    def _graded(self, _: Method, prepared: Prepared, grades: Grades) -> Grades:
        """With the rounding of its γ, and of an update that is computed directly."""
        result = grades.with_errors(grades.errors + SAFETY * self.noise)
        updates = prepared.updates
        if isinstance(updates, SpaceUpdates) and not updates.space.resolves_rank:
            unknown = [math.inf if damping == 0 else 0.0 for damping in prepared.absolute]
            result = result.with_errors(result.errors.new_tensor(unknown))
        if not isinstance(updates, DirectionUpdates) or updates.changed is None:
            return result
        make = updates.changed(lambda: self._entries)
        if make is None:
            return result
        changed = partial(DirectionUpdates, updates.count, make)
        error, of_update = self._changes(grades, self.kernel, changed)
        unresolved = updates.unresolved or [
            _distance(updates.direction(i), make(i)) for i in range(updates.count)
        ]
        of_update = torch.maximum(of_update, of_update.new_tensor(unresolved))
        # Of an update that is nothing but rounding, no γ is right.
        error = torch.where(of_update > 1, of_update, error)
        if self.metric is None and prepared.bounds is not None:
            error = torch.from_numpy(prepared.bounds.distances(grades.gammas.numpy()))
        return result.with_errors(error, of_update)

    @cached_property
    def residual_change(self) -> float:
        """The largest relative change of a residual u_n with the logits."""
        problem = self.kernel.problem
        sizes = problem.residual.flatten(1).norm(dim=1)
        changes = [
            (other.residual - problem.residual).flatten(1).norm(dim=1) / sizes
            for other in map(self._changed_problem, range(PERTURBATIONS))
        ]
        return max(float(torch.nan_to_num(change, nan=0.0).max()) for change in changes)

    def _changed_kernel(self, seed: int) -> Kernel:
        """With other residuals a span of their rows is made again."""
        if self.kernel.is_dense or self.residual_change <= RESIDUAL:
            return self.kernel.perturbed(self.noise, seed)
        problem = self._changed_problem(seed)
        return Kernel(problem, exact=self.kernel.exact, pushes=self.kernel.pushes)

    def _solved_again(
        self, kernel: Kernel, method: Method, prepared: Prepared, grades: Grades
    ) -> tuple[Tensor, Tensor]:
        """How much grades differ for a changed kernel; and how much what a relative λ scales."""
        largest = math.nan

        def updates() -> Updates:
            nonlocal largest
            state = method.prepare(kernel.problem, kernel, self.seed)
            if not math.isnan(prepared.largest):
                largest = state.largest_curvature
            values = [0.0 if math.isnan(value) else value for value in prepared.absolute]
            return state.updates(values)

        error, of_update = self._changes(grades, kernel, updates)
        change = SAFETY * abs(largest / prepared.largest - 1) if prepared.largest else 0.0
        return error, of_update if math.isnan(change) else of_update.clamp_min(change)

    def _changes(
        self, grades: Grades, kernel: Kernel, updates: Callable[[], Updates]
    ) -> tuple[Tensor, Tensor]:
        """How much grades differ for updates that are computed in a different way."""
        result = attempt(kernel.problem.shards, lambda: grade(kernel, [updates()], self.metric)[0])
        if isinstance(result, Failure):
            infinite = torch.full_like(grades.errors, math.inf)
            return infinite, infinite
        return grades.changes(result)

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


def _distance(direction: Tensor, other: Tensor) -> float:
    """‖other − d‖/‖d‖."""
    return float((other - direction).norm() / direction.norm())
