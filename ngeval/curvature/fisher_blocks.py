"""The exact Fisher's diagonal blocks F_ll, one for each group of parameters, factored.

With A_l = SᵀJ_l, F_ll = A_lᵀA_l, and g_l = A_lᵀr for r = S⁺u. J_l is known by its columns of J if
that is kept, and in coordinates otherwise, by the products of its rows; but for a group with fewer
parameters than the batch has outputs, of which F_ll itself is factored.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.damped_inverse import DampedInverse, RowSum
from ngeval.curvature.gram_factor import GramFactor
from ngeval.curvature.kernel import Kernel, fisher_rows
from ngeval.curvature.row_space import DENSE_SIZE, JacobianSpace, row_noise
from ngeval.curvature.row_svd import RowSvd
from ngeval.curvature.updates import KnownForms
from ngeval.errors import EngineError
from ngeval.jacobians import CapturedRows
from ngeval.jacobians.captured_rows import group_grams, group_squares
from ngeval.model.parameter_groups import Group
from ngeval.problem.fisher import factor_columns, unit_cotangents
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

WORKSPACE = 5
"""Matrices of a block's size that exist at the same time while it is decomposed."""


@dataclass(frozen=True)
class Block:
    """A group's A_l, factored in coordinates of rows or of the parameters.

    Attributes:
        group: the group of parameters.
        inverse: (A_lᵀA_l + λI)⁻¹g_l.
        factor: of J_lJ_lᵀ or of F_ll; None where J_l itself is known.
        by_rows: whether the coordinates are those of rows of J_l, not the parameters.
    """

    group: Group
    inverse: DampedInverse
    factor: GramFactor | None
    by_rows: bool


class FisherBlocks:
    """The exact Fisher's diagonal blocks for groups of parameters, factored.

    Args:
        problem: the model on its batch.
        groups: of parameters, one for each block.
        space: J, if it is kept.

    Raises:
        EngineError: they are out of reach.
    """

    def __init__(
        self, problem: Problem, groups: Sequence[Group], space: JacobianSpace | None = None
    ) -> None:
        self.problem = problem
        factors: dict[str, GramFactor] = {} if space is not None else _factors(problem, groups)
        self.blocks: dict[str, Block] = {}
        for group in groups:
            factor = factors.get(group.name)
            by_rows = factor is not None and not _by_parameters(problem, group)
            rows, lengths, gradient = _rows(problem, group, factor, space)
            inverse = DampedInverse(RowSvd.of(rows, lengths), gradient)
            self.blocks[group.name] = Block(group, inverse, factor, by_rows)

    def perturbed(
        self, problem: Problem, space: JacobianSpace | None, noise: float, seed: int
    ) -> FisherBlocks:
        """The blocks of a changed problem: see `Kernel.perturbed`."""
        generator = torch.Generator().manual_seed(seed)
        other = copy(self)
        other.problem, other.blocks = problem, {}
        for name, block in self.blocks.items():
            factor = block.factor and block.factor.perturbed(noise, generator)
            rows, _, gradient = _rows(problem, block.group, factor, space)
            if factor is None:  # the space's noise is within the span of whole rows
                rows = rows + row_noise(rows, noise, generator)
            inverse = DampedInverse(block.inverse.rows.moved(rows), gradient)
            other.blocks[name] = Block(block.group, inverse, factor, block.by_rows)
        return other

    @property
    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(block.inverse.rows.largest for block in self.blocks.values())

    @property
    def rank(self) -> int:
        """The rank of all blocks at λ = 0."""
        return sum(block.inverse.rows.at_zero.rank for block in self.blocks.values())

    def least_gammas(self) -> dict[str, float]:
        """(g_lᵀF_ll⁺g_l)^(−1/2) by group: the least γ of an update of that group alone."""
        return {name: block.inverse.least_gamma() for name, block in self.blocks.items()}

    def forms(self, dampings: Sequence[float]) -> KnownForms | None:
        """‖SᵀJd‖, gᵀd and ‖d‖ of every λ, without rounding in parameter space.

        None where a block is not known by rows of SᵀJ_l.
        """
        if any(block.inverse.gradient.right is None for block in self.blocks.values()):
            return None
        parts = [[b.inverse.solve(damping) for b in self.blocks.values()] for damping in dampings]
        return KnownForms.stack([KnownForms.of_sum(solutions) for solutions in parts])

    def directions(self, dampings: Sequence[float]) -> Tensor:
        """(F_ll + λI)⁻¹g_l of every λ, concatenated: float64, shape ``(L, P)``."""
        problem = self.problem
        shape = (len(dampings), problem.num_parameters)
        update = torch.zeros(shape, dtype=torch.float64, device=problem.device)
        by_rows: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            solutions = [block.inverse.solve(damping) for damping in dampings]
            solved = torch.stack([solution.vector * solution.size for solution in solutions])
            if block.factor is not None and block.by_rows:
                by_rows[name] = block.factor.weights(solved)
                continue
            places = block.group.places
            sizes = [place.stop - place.start for place in places]
            for place, part in zip(places, solved.split(sizes, 1), strict=True):
                update[:, place] = part
        if by_rows:
            names = _names([self.blocks[name].group for name in by_rows])
            captured = CapturedRows(problem.rows, unit_cotangents(problem))
            update += captured.group_combinations(names, by_rows)
        return update


def fisher_blocks(kernel: Kernel, groups: Sequence[Group]) -> FisherBlocks:
    """The blocks of a kernel's problem, factored at most once."""
    explicit = kernel.form is JacobianSpace
    space = kernel.logits if explicit and isinstance(kernel.logits, JacobianSpace) else None
    if kernel.base is None:
        return kernel.once(FisherBlocks, tuple(groups), space)
    base = fisher_blocks(kernel.base, groups)
    return base.perturbed(kernel.problem, space, kernel.noise, kernel.seed)


def _factors(problem: Problem, groups: Sequence[Group]) -> dict[str, GramFactor]:
    _check_sizes(problem, groups)
    factors: dict[str, GramFactor] = {}
    small = [group for group in groups if _by_parameters(problem, group)]
    for part in _batches(problem, small):
        squares = group_squares(problem.rows, factor_columns(problem), _names(part))
        factors |= {group.name: GramFactor.of(squares.pop(group.name)) for group in part}
    for part in _batches(problem, [group for group in groups if group not in small]):
        grams = group_grams(problem.rows, unit_cotangents(problem), _names(part))
        factors |= {group.name: GramFactor.of(grams.pop(group.name)) for group in part}
    return factors


def _rows(
    problem: Problem, group: Group, factor: GramFactor | None, space: JacobianSpace | None
) -> tuple[Tensor, Tensor | None, RowSum]:
    """A_l, the lengths of its terms and g_l, in the coordinates of a block."""
    if factor is not None and _by_parameters(problem, group):
        gradient = problem.gradient().to(torch.float64)
        slope = torch.cat([gradient[place] for place in group.places])
        return factor.lower.T, None, RowSum(slope, float(slope.norm()))
    if space is not None:
        jacobian = space.jacobian[
            :, torch.cat([torch.arange(p.start, p.stop) for p in group.places])
        ]
    elif factor is not None:
        jacobian = factor.lower
    samples = jacobian.unflatten(0, (problem.num_samples, -1))
    residual = problem.residual.flatten(1)
    total = torch.einsum("nc,ncr->r", residual, samples)
    length = float((residual.abs() * samples.norm(dim=2)).sum())
    right = problem.distribution.whitened_residual().flatten()
    return *fisher_rows(problem, jacobian), RowSum(total, length, right)


def _by_parameters(problem: Problem, group: Group) -> bool:
    return group.num_parameters <= problem.num_samples * problem.num_outputs


def _names(groups: Sequence[Group]) -> dict[str, list[str]]:
    return {group.name: list(group.parameters) for group in groups}


def _side(problem: Problem, group: Group) -> int:
    """The size of the matrix that a group is solved by."""
    return min(group.num_parameters, problem.num_samples * problem.num_outputs)


def _check_sizes(problem: Problem, groups: Sequence[Group]) -> None:
    largest = max(groups, key=lambda group: _side(problem, group))
    side = _side(problem, largest)
    if side > DENSE_SIZE:
        raise EngineError(
            f"block-ng solves layer {largest.name!r} by a matrix of {side} rows, the lesser of its "
            f"{largest.num_parameters} parameters and the batch's "
            f"{problem.num_samples * problem.num_outputs} outputs; over {DENSE_SIZE} is out of "
            "reach: use fewer samples"
        )
    needed = 8 * (WORKSPACE * side**2 + sum(_side(problem, group) ** 2 for group in groups))
    if needed > problem.rows.memory:
        raise EngineError(
            f"the blocks of {len(groups)} layers take {describe_bytes(needed)}, over the memory "
            f"budget of {describe_bytes(problem.rows.memory)}; use fewer samples or raise memory="
        )


def _batches(problem: Problem, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose matrices together fit in a quarter of the memory."""
    batches: list[list[Group]] = []
    room = 0.0
    for group in groups:
        needed = 8 * _side(problem, group) ** 2
        if not batches or needed > room:
            batches.append([])
            room = problem.rows.memory / 4
        batches[-1].append(group)
        room -= needed
    return batches
