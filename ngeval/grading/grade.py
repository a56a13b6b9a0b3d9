"""γ of many updates, by the tangents of their span.

All that γ needs of updates d_l = Σ_j a_lj b_j in a basis b are the tangents of the b. Where the
kernel has all rows of J they are products of matrices; otherwise the basis is pushed through the
model, chunk by chunk, and the batch that grades may then be a different one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ngeval.curvature.gram_factor import EPSILON
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, SpaceUpdates, Updates
from ngeval.problem.gamma import root_forms
from ngeval.problem.linearized import Linearized
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem

BASIS = 4 * EPSILON
"""Singular values of updates of unit length below this are rounding."""


SAFETY = 2
"""An error is the largest change times this, as few random changes may miss the worst."""

UNKNOWN = 0.5
"""An error above this part of a number says no more than that it is not known: it is infinite."""

CANCELLATION = 1e11
"""An F-norm over this many times the rounding of the tangent is not looked at again."""


class Noise(NamedTuple):
    """Rounding that an update is graded with again.

    Attributes:
        problems: two, with logits changed at their rounding.
        size: of the change, relative.
    """

    problems: Sequence[Linearized]
    size: float


class Grades(NamedTuple):
    """The quality of L updates: float64 tensors of shape ``(L,)``.

    Attributes:
        gammas: γ, NaN where dᵀg is only rounding, dᵀFd underflows or the update is not finite.
        errors: relative, of γ for the update as it was computed, by the rounding of dᵀg.
        decrease: dᵀg.
        curvature: dᵀFd.
        norms: ‖d‖.
        update_errors: relative, of dᵀg and ‖d‖.
    """

    gammas: Tensor
    errors: Tensor
    decrease: Tensor
    curvature: Tensor
    norms: Tensor
    update_errors: Tensor

    @classmethod
    def concatenate(cls, grades: Sequence[Grades]) -> Grades:
        """The grades of several sets of updates as one."""
        return cls(*(torch.cat(column) for column in zip(*grades, strict=True)))

    @classmethod
    def of_unit(
        cls, roots: Tensor, decrease: Tensor, absolute: Tensor | float, sizes: Tensor
    ) -> Grades:
        """From the forms of updates of length 1 (or 0), and their sizes.

        Args:
            roots: (yᵀFy)^½.
            decrease: gᵀy.
            absolute: the sum of the sizes of its terms; 0 where they do not cancel.
            sizes: ‖d‖.
        """
        rounding = EPSILON * (absolute + torch.zeros_like(decrease))
        slopes = decrease.abs()
        # F has all directions that change the loss: a root of 0 underflows.
        gammas = torch.where((slopes > rounding) & (roots > 0), roots / slopes, math.nan)
        lost = ~torch.isfinite(gammas) | torch.isnan(sizes)
        gammas = gammas.masked_fill(lost, math.nan)
        errors = (rounding / slopes + 4 * EPSILON).masked_fill(lost, math.nan)
        curvature = (roots * sizes).square()
        return cls(gammas, errors, decrease * sizes, curvature, sizes, errors)

    def with_errors(self, errors: Tensor, of_update: Tensor | None = None) -> Grades:
        """At least these errors of γ, and of dᵀg and ‖d‖ if those are different."""
        of_update = errors if of_update is None else of_update
        both = torch.maximum(self.errors, errors), torch.maximum(self.update_errors, of_update)
        known = [torch.where(error > UNKNOWN, math.inf, error) for error in both]
        return self._replace(errors=known[0], update_errors=known[1])

    def changes(self, other: Grades) -> tuple[Tensor, Tensor]:
        """How much γ, and dᵀg and ‖d‖, differ in other grades of the same updates, × `SAFETY`."""
        slopes = relative_change(other.decrease, self.decrease)
        norms = relative_change(other.norms, self.norms)
        gammas = relative_change(other.gammas, self.gammas)
        return SAFETY * gammas, SAFETY * torch.maximum(slopes, norms)


def grade(
    kernel: Kernel,
    updates: Sequence[Updates],
    metric: Metric | None = None,
    noise: Noise | None = None,
) -> list[Grades]:
    """Grade several methods' updates.

    Args:
        kernel: of the batch that the updates were made from.
        updates: of each method.
        metric: the batch that grades; None for the problem's own.
        noise: shows the error of updates that are pushed through the model.

    Returns:
        The grades of each method; NaN for a λ at which its update is not finite.
    """
    grader = Metric(kernel.problem) if metric is None else metric
    grades: dict[int, Grades] = {}
    spaces: dict[int, list[int]] = {}
    for i, member in enumerate(updates):
        if isinstance(member, DirectionUpdates) and member.forms is not None and metric is None:
            forms = member.forms
            grades[i] = Grades.of_unit(forms.roots, forms.decrease, 0.0, forms.sizes)
            continue
        if not isinstance(member, SpaceUpdates):
            grades[i] = _grade_directions(grader, member, noise)
            continue
        tangents = member.space.tangents(member.coordinates) if metric is None else None
        if tangents is None:
            spaces.setdefault(id(member.space), []).append(i)
        else:
            grades[i] = _by_tangents(kernel.problem, tangents, member)
    for family in spaces.values():
        members = [u for i in family if isinstance(u := updates[i], SpaceUpdates)]
        grades |= zip(family, _by_basis(grader, members, own=metric is None), strict=True)
    return [grades[i] for i in range(len(updates))]


def _by_tangents(problem: Problem, tangents: Tensor, updates: SpaceUpdates) -> Grades:
    """With the tangents of the unit vectors, and what the method knows better."""
    if updates.roots is not None:
        return Grades.of_unit(updates.roots, updates.decrease, 0.0, updates.finite_sizes)
    roots = root_forms(problem, tangents)[0]
    grades = Grades.of_unit(roots, updates.decrease, 0.0, updates.finite_sizes)
    rounding = updates.space.tangent_rounding(updates.coordinates)
    if rounding is None:
        return grades
    # Signs at random: the tangents of a unit vector that is almost orthogonal to most rows.
    signs = torch.randn(rounding.shape, generator=torch.Generator().manual_seed(0)).sign()
    lost = root_forms(problem, rounding * signs.to(rounding))[0] / roots
    return grades.with_errors(SAFETY * torch.nan_to_num(lost, nan=0.0), grades.update_errors)


def _by_basis(metric: Metric, members: Sequence[SpaceUpdates], *, own: bool) -> list[Grades]:
    """By pushing an orthonormal basis of all updates in one space through the model.

    Args:
        metric: the batch that grades.
        members: updates in one space.
        own: whether that is the batch that they were made from.
    """
    unit = torch.cat([member.coordinates for member in members])
    finite = torch.isfinite(unit).all(1, keepdim=True)
    unit = torch.where(finite, unit, 0.0)
    _, singular, right = torch.linalg.svd(unit, full_matrices=False)
    basis = right[singular > BASIS * singular.max().clamp_min(1e-300)]
    sizes = [member.count for member in members]
    if not _has_room(metric.problem, len(basis)):
        return [_grade_directions(metric, member, None) for member in members]
    if not len(basis):
        zero = torch.zeros_like(unit[:, 0]) if unit.shape[1] else unit.new_zeros(len(unit))
        forms = zero, zero, zero
    else:
        directions = members[0].space.directions(basis)
        products, decrease, absolute = metric.forms(directions, unit @ basis.T)
        forms = products.diagonal().clamp_min(0).sqrt(), decrease, absolute
    grades = []
    parts = [column.split(sizes) for column in forms]
    for member, roots, decrease, absolute in zip(members, *parts, strict=True):
        if own:
            known = roots if member.roots is None else member.roots
            grades.append(Grades.of_unit(known, member.decrease, 0.0, member.finite_sizes))
        else:
            grades.append(Grades.of_unit(roots, decrease, absolute, member.finite_sizes))
    return grades


def _grade_directions(metric: Metric, updates: Updates, noise: Noise | None) -> Grades:
    """As many whole directions at a time as fit in memory, each at unit length.

    dᵀg is known twice, as uᵀJd and as the inner product of d and g where g is that of the own
    batch: their difference measures the rounding of both, and would show a wrong derivative.
    """
    room = max(1, metric.problem.rows.memory // (4 * max(1, _bytes(metric.problem))))
    step = min(updates.count, room)
    parts = [
        _grade_some(metric, updates, range(i, min(i + step, updates.count)), noise)
        for i in range(0, updates.count, step)
    ]
    return Grades.concatenate(parts)


def _grade_some(metric: Metric, updates: Updates, chosen: range, noise: Noise | None) -> Grades:
    problem = metric.problem
    rows, sizes, slopes = [], [], []
    for i in chosen:
        wide = updates.direction(i).to(torch.float64)
        finite = bool(torch.isfinite(wide).all())
        size = torch.linalg.vector_norm(wide, math.inf) if finite else wide.new_tensor(math.nan)
        scaled = wide / size if finite and float(size) > 0 else torch.zeros_like(wide)
        length = scaled.norm()
        unit = (scaled / length.clamp_min(1e-300)).to(problem.dtype)
        rows.append(unit)
        sizes.append(length * size if finite else size)
        if metric.batches is None:
            slopes.append(unit.to(torch.float64) @ problem.gradient().to(torch.float64))
    if not slopes:
        forms = metric.forms(torch.stack(rows))
        roots = forms.curvature.diagonal().clamp_min(0).sqrt()
        return Grades.of_unit(roots, forms.decrease, forms.absolute, torch.stack(sizes))
    tangents = torch.stack([problem.jvp(row) for row in rows])
    roots, decrease, absolute = root_forms(problem, tangents)
    grades = Grades.of_unit(roots, decrease, absolute, torch.stack(sizes))
    gap = (torch.stack(slopes) - decrease).abs() / decrease.abs()
    errors = grades.errors + torch.nan_to_num(gap, nan=0.0)
    if noise is None:
        return grades.with_errors(errors)
    change = noise.size * _tangent_noise(problem, rows, tangents, roots / noise.size)
    for sign, other in zip((1, -1), noise.problems, strict=True):
        gammas = Grades.of_unit(*root_forms(other, tangents + sign * change), grades.norms).gammas
        errors = torch.maximum(errors, SAFETY * relative_change(gammas, grades.gammas))
    return grades.with_errors(errors)


def _tangent_noise(
    problem: Problem, rows: Sequence[Tensor], tangents: Tensor, roots: Tensor
) -> Tensor:
    """J times each update with random factors, where its F-norm may be the rounding of its tangent.

    Args:
        problem: whose J.
        rows: the updates.
        tangents: theirs.
        roots: their F-norms, over the size of the noise.
    """
    noise, generator = torch.zeros_like(tangents), torch.Generator().manual_seed(0)
    for i in (roots < CANCELLATION * tangents.flatten(1).norm(dim=1)).nonzero().flatten().tolist():
        factors = torch.randn(rows[i].shape, generator=generator).to(rows[i])
        noise[i] = problem.jvp(rows[i] * factors)
    return noise


def relative_change(values: Tensor, reference: Tensor) -> Tensor:
    """|v/r − 1|, ∞ where only one of them is a number."""
    change = (values / reference - 1).abs()
    one_is_missing = torch.isfinite(values) != torch.isfinite(reference)
    return torch.where(one_is_missing, math.inf, torch.nan_to_num(change, nan=0.0))


def _bytes(problem: Problem) -> int:
    return problem.num_parameters * problem.dtype.itemsize


def _has_room(problem: Problem, count: int) -> bool:
    """Whether that many directions fit in the memory budget."""
    return count * _bytes(problem) <= problem.rows.memory
