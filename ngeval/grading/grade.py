"""γ of many updates: by Θ where it is kept, by the tangents of a common basis where it is not.

All that γ needs of updates d_l = Σ_j a_lj b_j in a basis b are the k × k numbers bᵢᵀF bⱼ and the
k numbers bⱼᵀg, which are sums over samples: the basis is pushed through the model chunk by chunk,
and every λ is rebuilt from those sums. The batch that grades may then be any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.logit_kernel import (
    DenseKernel,
    LogitKernel,
    PushingKernel,
    columns_in,
)
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import CotangentUpdates, FieldUpdates, SolvedUpdates, Updates
from ngeval.errors import EngineError
from ngeval.grading.nonfinite import FiniteUpdates
from ngeval.problem.gamma import Quadratics, gammas_of, quadratics
from ngeval.problem.metric_batch import Forms, Metric
from ngeval.problem.problem import Problem

COMPRESSION = 1e-12
"""What part of an update's length may be lost where updates are written in a common basis."""


NO_FORMS = Forms(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
"""Of no direction: all updates vanish."""


@dataclass(frozen=True)
class Grades:
    """What L updates are worth.

    Attributes:
        quadratics: dᵀFd, dᵀg and γ.
        squared_norms: ‖d‖², shape ``(L,)``.
    """

    quadratics: Quadratics
    squared_norms: Tensor


def grade(kernel: Kernel, updates: Sequence[Updates], metric: Metric | None = None) -> list[Grades]:
    """Grade several methods' updates.

    Args:
        kernel: of the batch that the updates were made from.
        updates: of each method.
        metric: the batch that grades; None for the problem's own.

    Returns:
        Those of each method; NaN for a λ at which its update is not finite.
    """
    finite = [FiniteUpdates(one) for one in updates]
    graded = _grade_finite(kernel, [one.updates for one in finite], metric)
    return [
        Grades(
            Quadratics(*(one.restore(column) for column in grades.quadratics)),
            one.restore(grades.squared_norms),
        )
        for one, grades in zip(finite, graded, strict=True)
    ]


def _grade_finite(
    kernel: Kernel, updates: Sequence[Updates], metric: Metric | None
) -> list[Grades]:
    problem = kernel.problem
    if metric is None:
        of_rows = any(isinstance(one, CotangentUpdates | FieldUpdates) for one in updates)
        theta = _theta(kernel) if of_rows else None
        graded = [_grade_by_theta(problem, theta, one) for one in updates]
        loose = [i for i, grades in enumerate(graded) if grades is None]
        if loose:
            common = _grade_by_forms(kernel, Metric(problem), [updates[i] for i in loose])
            for i, grades in zip(loose, common, strict=True):
                graded[i] = _with_known(grades, updates[i])
        return [grades for grades in graded if grades is not None]
    return _grade_by_forms(kernel, metric, updates)


def _theta(kernel: Kernel) -> LogitKernel | None:
    """What of Θ there is; None, and one JVP for each update, where there is no room for any."""
    try:
        return kernel.theta
    except EngineError:
        return None


def families(updates: Sequence[Updates]) -> list[list[int]]:
    """Which updates are made of the same rows, and so share a basis; by their places.

    The first of a family has the rows of all.
    """
    found: list[list[int]] = []
    vectors = {i: one.vectors for i, one in enumerate(updates) if isinstance(one, CotangentUpdates)}
    for i in sorted(vectors, key=lambda i: -vectors[i].shape[1]):
        for family in found:
            if columns_in(vectors[family[0]], vectors[i]) is not None:
                family.append(i)
                break
        else:
            found.append([i])
    return found + [[i] for i in range(len(updates)) if i not in vectors]


def _grade_by_theta(problem: Problem, theta: LogitKernel | None, updates: Updates) -> Grades | None:
    """By tangents Θw, singly, or as it came; None where Θ would be needed and is not there."""
    if isinstance(updates, SolvedUpdates):
        parts = gammas_of(updates.curvature, updates.decrease, 0 * updates.decrease)
        return Grades(parts, updates.squared_norms)
    if isinstance(updates, FieldUpdates) and isinstance(theta, DenseKernel):
        tangents, norms = theta.push_fields(updates.fields)
    elif isinstance(updates, CotangentUpdates) and isinstance(theta, PushingKernel):
        tangents, norms = theta.push(updates.vectors, updates.coefficients)
    elif isinstance(updates, CotangentUpdates) and theta is not None:
        return None
    else:
        return _grade_singly(problem, updates)
    return _with_known(Grades(quadratics(problem, tangents), norms), updates)


def _with_known(grades: Grades, updates: Updates) -> Grades:
    """With the dᵀg that a method has more exactly than from tangents."""
    known = updates.decrease if isinstance(updates, CotangentUpdates) else None
    if known is None:
        return grades
    return Grades(gammas_of(grades.quadratics.curvature, known, 0 * known), grades.squared_norms)


def _grade_singly(problem: Problem, updates: Updates) -> Grades:
    """One JVP for each update."""
    parts, norms = [], []
    for i in range(updates.count):
        direction = updates.direction(i)
        parts.append(quadratics(problem, problem.jvp(direction).unsqueeze(0)))
        norms.append(direction.to(torch.float64).square().sum())
    joined = Quadratics(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Grades(joined, torch.stack(norms))


def _grade_by_forms(kernel: Kernel, metric: Metric, updates: Sequence[Updates]) -> list[Grades]:
    graded: list[Grades | None] = [None] * len(updates)
    for family in families(updates):
        members = [updates[i] for i in family]
        cotangent = [one for one in members if isinstance(one, CotangentUpdates)]
        single = len(members) == 1 and members[0].count == 1
        basis = None
        if cotangent and not single:
            basis = _row_basis(kernel, cotangent)
        elif _has_room(metric.problem, members[0].count):
            basis = _own_basis(metric.problem, members[0], range(members[0].count))
        if basis is None:
            found = [_grade_one_by_one(metric, one) for one in members]
        else:
            found = _grade_in(basis, metric)
        for i, grades in zip(family, found, strict=True):
            graded[i] = grades
    return [grades for grades in graded if grades is not None]


def _grade_in(basis: _Basis, metric: Metric) -> list[Grades]:
    """The grades of all updates that a basis is for."""
    forms = metric.forms(basis.directions) if len(basis.directions) else NO_FORMS
    found = []
    for coefficients, lengths in zip(basis.coefficients, basis.lengths, strict=True):
        curvature = ((coefficients @ forms.curvature) * coefficients).sum(1).clamp_min(0)
        terms = coefficients * forms.decrease
        rounding = torch.finfo(torch.float64).eps * terms.abs().sum(1)
        parts = gammas_of(curvature, terms.sum(1), rounding)
        scaled = Quadratics(
            parts.curvature * lengths.square(), parts.decrease * lengths, parts.gammas
        )
        found.append(Grades(scaled, lengths.square()))
    return found


def _grade_one_by_one(metric: Metric, updates: Updates) -> Grades:
    """With one direction in memory at a time: more passes, and the same grades."""
    found = [
        _grade_in(_own_basis(metric.problem, updates, [i]), metric)[0] for i in range(updates.count)
    ]
    parts = zip(
        *((g.quadratics.curvature, g.quadratics.decrease, g.quadratics.gammas) for g in found),
        strict=True,
    )
    joined = Quadratics(*(torch.cat(part) for part in parts))
    return Grades(joined, torch.cat([grades.squared_norms for grades in found]))


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
    """An orthonormal basis of updates made of the first one's rows R, as few as they need.

    None where not even these fit in the memory budget.

    With RRᵀ = VΣVᵀ, d = Rᵀc = (RᵀVΣ^(−1/2)) y for y = Σ^(1/2)Vᵀc, and ‖d‖ = ‖y‖. A family in λ
    has a small numerical rank: the singular vectors of all y at unit length above `COMPRESSION`
    are the basis; in a coarser dtype, those above a hundredth of its rounding.
    """
    problem, vectors = members[0].problem, members[0].vectors
    gram = kernel.theta.gram(vectors)
    everything = torch.cat([_coefficients(one, vectors).flatten(1) for one in members])
    spectrum = Spectrum.of_gram(gram, problem.function.row_epsilon, everything.norm(dim=0))
    root = spectrum.eigenvalues.sqrt()
    images = (everything @ spectrum.eigenvectors) * root
    lengths = images.norm(dim=1)
    unit = images / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
    _, singular, right_vectors = torch.linalg.svd(unit, full_matrices=False)
    part = max(COMPRESSION, 0.01 * problem.function.epsilon)
    kept = singular > part * singular.amax() if singular.numel() else singular > 0
    basis = right_vectors[kept]
    weights = (basis / root) @ spectrum.eigenvectors.T
    sizes = [one.count for one in members]
    if not _has_room(problem, len(weights)):
        return None
    return _Basis(
        kernel.theta.combinations(vectors, weights),
        list((unit @ basis.T).split(sizes)),
        list(lengths.split(sizes)),
    )


def _coefficients(updates: CotangentUpdates, vectors: Tensor) -> Tensor:
    """Of rows J_nᵀv_nq for more vectors v than those of the updates: 0 for the others."""
    columns = columns_in(vectors, updates.vectors)
    if columns is None or vectors is updates.vectors:
        return updates.coefficients
    wide = updates.coefficients.new_zeros(updates.count, *vectors.shape[:2])
    wide[..., columns] = updates.coefficients
    return wide


def _own_basis(problem: Problem, updates: Updates, chosen: Sequence[int]) -> _Basis:
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
