"""γ of many updates: by Θ, or by the tangents of a common basis.

All that γ needs of updates d_l = Σ_j a_lj b_j in a basis b are the k × k numbers bᵢᵀF bⱼ and the
k numbers bⱼᵀg, which are sums over samples: the basis is pushed through the model chunk by chunk,
and every λ is rebuilt from those sums. The batch that grades may then be a different one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.logit_kernel import DenseKernel, LogitKernel, PushingKernel, columns_in
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import CotangentUpdates, FieldUpdates, SolvedUpdates, Updates
from ngeval.errors import EngineError
from ngeval.grading.nonfinite import finite_updates, with_nan
from ngeval.problem.gamma import gammas_of, quadratics
from ngeval.problem.metric_batch import Forms, Metric
from ngeval.problem.problem import Problem

COMPRESSION = 1e-12
"""The part of an update's length that may be lost where updates are written in a common basis."""

NO_FORMS = Forms(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
"""Of no direction: all updates vanish."""


class Grades(NamedTuple):
    """The quality of L updates: `Quadratics` and ‖d‖², each of shape ``(L,)``."""

    curvature: Tensor
    decrease: Tensor
    gammas: Tensor
    squared_norms: Tensor

    @classmethod
    def concatenate(cls, grades: Sequence[Grades]) -> Grades:
        """The grades of several sets of updates as one."""
        return cls(*(torch.cat(column) for column in zip(*grades, strict=True)))


def grade(kernel: Kernel, updates: Sequence[Updates], metric: Metric | None = None) -> list[Grades]:
    """Grade several methods' updates.

    Args:
        kernel: of the batch that the updates were made from.
        updates: of each method.
        metric: the batch that grades; None for the problem's own.

    Returns:
        The grades of each method; NaN for a λ at which its update is not finite.
    """
    lost: list[set[int]] = [set() for _ in updates]
    finite = [finite_updates(*pair) for pair in zip(updates, lost, strict=True)]
    if metric is None:
        grades = _grade_by_problem(kernel, finite)
    else:
        grades = _grade_by_forms(kernel, metric, finite)
    return [
        Grades(*(with_nan(column, places, member.count) for column in graded))
        for member, places, graded in zip(finite, lost, grades, strict=True)
    ]


def families(updates: Sequence[Updates]) -> list[list[int]]:
    """Indices of updates that are made of the same rows, and so share a basis.

    The first of a family has the rows of all.
    """
    groups: list[list[int]] = []
    vectors = {i: u.vectors for i, u in enumerate(updates) if isinstance(u, CotangentUpdates)}
    for i in sorted(vectors, key=lambda i: -vectors[i].shape[1]):
        for group in groups:
            if columns_in(vectors[group[0]], vectors[i]) is not None:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups + [[i] for i in range(len(updates)) if i not in vectors]


def _grade_by_problem(kernel: Kernel, updates: Sequence[Updates]) -> list[Grades]:
    """By the batch that the updates were made from."""
    theta: LogitKernel | None = None
    if any(isinstance(each, CotangentUpdates | FieldUpdates) for each in updates):
        with contextlib.suppress(EngineError):  # without Θ, by one JVP for each update
            theta = kernel.theta
    problem = kernel.problem
    grades = [_grade_by_theta(problem, theta, each) for each in updates]
    missing = [i for i, graded in enumerate(grades) if graded is None]
    if missing:
        common = _grade_by_forms(kernel, Metric(problem), [updates[i] for i in missing])
        for i, graded in zip(missing, common, strict=True):
            grades[i] = _with_known_decrease(graded, updates[i])
    return [graded for graded in grades if graded is not None]


def _grade_by_theta(problem: Problem, theta: LogitKernel | None, updates: Updates) -> Grades | None:
    """By tangents Θw, or one by one; None where the form of Θ has no tangents."""
    if isinstance(updates, SolvedUpdates):
        parts = gammas_of(updates.curvature, updates.decrease, 0 * updates.decrease)
        return Grades(*parts, updates.squared_norms)
    if isinstance(updates, FieldUpdates) and isinstance(theta, DenseKernel):
        tangents, norms = theta.push_fields(updates.fields)
    elif isinstance(updates, CotangentUpdates) and isinstance(theta, PushingKernel):
        tangents, norms = theta.push(updates.vectors, updates.coefficients)
    elif isinstance(updates, CotangentUpdates) and theta is not None:
        return None
    else:
        grades = []
        for i in range(updates.count):
            direction = updates.direction(i)
            parts = quadratics(problem, problem.jvp(direction).unsqueeze(0))
            grades.append(Grades(*parts, direction.to(torch.float64).square().sum().unsqueeze(0)))
        return Grades.concatenate(grades)
    return _with_known_decrease(Grades(*quadratics(problem, tangents), norms), updates)


def _with_known_decrease(grades: Grades, updates: Updates) -> Grades:
    """Replace dᵀg where the method has computed it more precisely than from tangents."""
    known = updates.decrease if isinstance(updates, CotangentUpdates) else None
    if known is None:
        return grades
    return Grades(*gammas_of(grades.curvature, known, 0 * known), grades.squared_norms)


def _grade_by_forms(kernel: Kernel, metric: Metric, updates: Sequence[Updates]) -> list[Grades]:
    """By the quadratic forms of common bases."""
    grades: dict[int, Grades] = {}
    for family in families(updates):
        members = [updates[i] for i in family]
        first, of_rows = members[0], [u for u in members if isinstance(u, CotangentUpdates)]
        basis = None
        if of_rows and (len(members) > 1 or first.count > 1):
            basis = _row_basis(kernel, of_rows)
        elif _has_room(metric.problem, first.count):
            basis = _direction_basis(metric.problem, first, range(first.count))
        if basis is None:
            graded = [_grade_one_by_one(metric, member) for member in members]
        else:
            graded = _grade_in(basis, metric)
        grades |= zip(family, graded, strict=True)
    return [grades[i] for i in range(len(updates))]


def _grade_in(basis: _Basis, metric: Metric) -> list[Grades]:
    """The grades of all updates in a basis."""
    forms = metric.forms(basis.directions) if len(basis.directions) else NO_FORMS
    grades = []
    for coefficients, lengths in zip(basis.coefficients, basis.lengths, strict=True):
        curvature = ((coefficients @ forms.curvature) * coefficients).sum(1).clamp_min(0)
        terms = coefficients * forms.decrease
        rounding = torch.finfo(torch.float64).eps * terms.abs().sum(1)
        unit = gammas_of(curvature, terms.sum(1), rounding)
        squares = lengths.square()
        grades.append(Grades(curvature * squares, unit.decrease * lengths, unit.gammas, squares))
    return grades


def _grade_one_by_one(metric: Metric, updates: Updates) -> Grades:
    """With one direction in memory at a time: more passes, and the same grades."""
    problem, places = metric.problem, range(updates.count)
    return Grades.concatenate(
        [_grade_in(_direction_basis(problem, updates, [i]), metric)[0] for i in places]
    )


@dataclass(frozen=True)
class _Basis:
    """Updates d_l = ‖d_l‖ Σ_j a_lj b_j.

    Attributes:
        directions: b in the model's dtype, shape ``(k, P)``.
        coefficients: a of every member, float64, shape ``(L, k)``.
        lengths: ‖d_l‖ of every member, float64, shape ``(L,)``.
    """

    directions: Tensor
    coefficients: list[Tensor]
    lengths: list[Tensor]


def _row_basis(kernel: Kernel, members: Sequence[CotangentUpdates]) -> _Basis | None:
    """The smallest orthonormal basis of updates made of the first member's rows R.

    None where it does not fit in the memory budget.

    With RRᵀ = VΣVᵀ, d = Rᵀc = (RᵀVΣ^(−1/2)) y for y = Σ^(1/2)Vᵀc, and ‖d‖ = ‖y‖. A family in λ
    has a small numerical rank: the singular vectors of all y at unit length above `COMPRESSION`
    are the basis; in a coarser dtype, those above a hundredth of its rounding.
    """
    problem, vectors = members[0].problem, members[0].vectors
    gram = kernel.cheapest.gram(vectors)
    coefficients = torch.cat([_coefficients(each, vectors).flatten(1) for each in members])
    spectrum = Spectrum.of_gram(gram, problem.function.row_epsilon, coefficients.norm(dim=0))
    root = spectrum.eigenvalues.sqrt()
    images = (coefficients @ spectrum.eigenvectors) * root
    lengths = images.norm(dim=1)
    unit = images / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
    _, singular, right_vectors = torch.linalg.svd(unit, full_matrices=False)
    part = max(COMPRESSION, 0.01 * problem.function.epsilon)
    kept = singular > part * singular.amax() if singular.numel() else singular > 0
    basis = right_vectors[kept]
    weights = (basis / root) @ spectrum.eigenvectors.T
    sizes = [each.count for each in members]
    if not _has_room(problem, len(weights)):
        return None
    return _Basis(
        kernel.cheapest.combinations(vectors, weights),
        list((unit @ basis.T).split(sizes)),
        list(lengths.split(sizes)),
    )


def _coefficients(updates: CotangentUpdates, vectors: Tensor) -> Tensor:
    """Coefficients of the rows of all vectors: 0 for those that the updates do not use."""
    columns = columns_in(vectors, updates.vectors)
    if columns is None or vectors is updates.vectors:
        return updates.coefficients
    wide = updates.coefficients.new_zeros(updates.count, *vectors.shape[:2])
    wide[..., columns] = updates.coefficients
    return wide


def _direction_basis(problem: Problem, updates: Updates, chosen: Sequence[int]) -> _Basis:
    """Some of the updates themselves."""
    lengths, rows = [], []
    for i in chosen:
        direction = updates.direction(i)
        wide = direction.to(torch.float64)
        length = wide.norm()
        lengths.append(length)
        rows.append((wide / length.clamp_min(1e-300)).to(problem.dtype))
    eye = torch.eye(len(rows), dtype=torch.float64, device=problem.device)
    return _Basis(torch.stack(rows), [eye], [torch.stack(lengths)])


def _has_room(problem: Problem, count: int) -> bool:
    """Whether that many directions fit in the memory budget."""
    return count * problem.num_parameters * problem.dtype.itemsize <= problem.rows.memory
